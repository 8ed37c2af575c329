"""Votes: the label that the leaves of a prompt elect, without any knowledge of the truth.

Ties go to the class that is seen first in leaf order (roots come before their forks), or to none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers, Equivalence

if TYPE_CHECKING:
    from pyrl.leaves import Leaves

Tie = Literal["first", "skip"]
_TIE_TOLERANCE = 1e-9
"""Relative: 1/3 + 1/3 + 1/3 ties with 1."""


@dataclass(frozen=True)
class Votes:
    """The outcome of each prompt's vote. Shares are of all leaves, also of those without answer."""

    class_G: NDArray[np.int64]
    """The class of the label (`Answers.class_N`); -1: no label."""
    label_G: tuple[str | None, ...]
    """The first answer of that class; None: no label."""
    ratio_G: NDArray[np.float64]
    """The label's share of the weight, 0 without a label."""
    margin_G: NDArray[np.float64]
    """Its distance to the share of the runner-up, 0 without a label."""
    answered_G: NDArray[np.int64]
    """Leaves with an answer."""
    entropy_G: NDArray[np.float64]
    """Entropy of the distribution of the answers (nats), leaves without answer left out."""
    icc: float
    """Correlation of the votes of one trunk, see `trunk_correlation`."""


class Vote(Protocol):
    """Elects a label for each prompt; it may name in `needs` what it reads of `Leaves`."""

    def __call__(self, leaves: Leaves, answers: Answers) -> Votes: ...


@runtime_checkable
class VoteMetrics(Vote, Protocol):
    """A vote that tells what it did."""

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        """For the report of the step; finite numbers."""


def told(vote: Vote, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
    """What a vote tells of a step; nothing of one that has no `metrics`."""
    return vote.metrics(leaves, answers, votes) if isinstance(vote, VoteMetrics) else {}


@dataclass(frozen=True)
class Majority:
    """One leaf, one vote (arXiv:2504.16084)."""

    tie: Tie = "first"
    """A tie goes to the answer that was seen first, or leaves the question without a label."""

    def __post_init__(self) -> None:
        _check_tie(self.tie)

    def __call__(self, leaves: Leaves, answers: Answers) -> Votes:
        return _elect(leaves, answers, np.ones(len(answers.answer_N)), self.tie)

    def quorum(self, missing: int) -> int:
        """Leaves below which no label is certain: a lead is at most their number."""
        return missing + 1

    def undecided(
        self, class_N: NDArray[np.int64], missing: int, mass_N: NDArray[np.float64]
    ) -> int:
        """Least number of further leaves after which the label of a prompt can be certain.

        `class_N`: classes of the leaves so far, -1 without answer; `missing`: those to come. 0: the
        first is ahead of the second by more than `missing`, so no leaf can change the label, and
        no tie is possible.
        """
        count = np.sort(np.bincount(class_N[class_N >= 0], minlength=2))
        lead = int(count[-1] - count[-2])
        # Each leaf adds at most one to the lead and takes one from what is missing.
        return max(0, (missing - lead) // 2 + 1)


class Countable(Vote, Protocol):
    """A vote whose label can be certain before the last leaf; `pyrl.poll.Poll` asks it."""

    def quorum(self, missing: int) -> int:
        """Finished leaves of a prompt below which nothing is certain, if so many are missing."""

    def undecided(
        self, class_N: NDArray[np.int64], missing: int, mass_N: NDArray[np.float64]
    ) -> int:
        """0: certain; otherwise the least number of further leaves after which it can be.

        [N] are the finished leaves: their classes, -1 without answer, and their probabilities
        (NaN unless they are drawn without replacement); `missing` leaves are to come.
        """


@dataclass(frozen=True)
class Mass:
    """Leaves drawn without replacement vote with their weights, which estimate probabilities.

    The label is the answer that the policy is most likely to give, as far as these leaves show.
    """

    tie: Tie = "first"
    """A tie goes to the answer that was seen first, or leaves the question without a label."""

    def __post_init__(self) -> None:
        _check_tie(self.tie)

    def __call__(self, leaves: Leaves, answers: Answers) -> Votes:
        return _elect(leaves, answers, leaves.weight_N, self.tie)

    def quorum(self, missing: int) -> int:
        return 1

    def undecided(
        self, class_N: NDArray[np.int64], missing: int, mass_N: NDArray[np.float64]
    ) -> int:
        """0: the first class is more probable than the second with all that no leaf has shown."""
        unseen = 1 - mass_N.sum()
        mass = np.sort(np.bincount(class_N[class_N >= 0], mass_N[class_N >= 0], minlength=2))
        return 0 if mass[-1] > mass[-2] + max(unseen, 0.0) else 1


@dataclass(frozen=True)
class Weighted:
    """Leaves vote with a weight.

    "inverse_width": a trunk's leaves share one vote, so that a prefix that forked often does not
    outvote the others; "confidence": the mean confidence of the leaf's last tokens.
    """

    by: Literal["inverse_width", "confidence"] = "inverse_width"
    """What a leaf weighs."""
    tie: Tie = "first"
    """A tie goes to the answer that was seen first, or leaves the question without a label."""

    def __post_init__(self) -> None:
        _check_tie(self.tie)
        if self.by not in ("inverse_width", "confidence"):
            raise ValueError(f"by: expected 'inverse_width' or 'confidence', got {self.by!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("confidence_N",) if self.by == "confidence" else ()

    def __call__(self, leaves: Leaves, answers: Answers) -> Votes:
        weight_N = leaves.weight_N if self.by == "inverse_width" else leaves.confidence_N
        if not (np.isfinite(weight_N).all() and (weight_N >= 0).all()):
            raise ValueError(f"vote weights ({self.by}): expected finite and >= 0, got {weight_N}")
        return _elect(leaves, answers, weight_N, self.tie)


def _check_tie(tie: str) -> None:
    if tie not in ("first", "skip"):
        raise ValueError(f"tie: expected 'first' or 'skip', got {tie!r}")


@dataclass(frozen=True)
class _Result:
    """The vote of one prompt; the defaults are that of no answer."""

    label: int = -1
    first: int = -1
    """Ordinal of the first leaf that voted for the label."""
    ratio: float = 0.0
    margin: float = 0.0
    answered: int = 0
    entropy: float = 0.0


def _count(class_N: NDArray[np.int64], weight_N: NDArray[np.float64], tie: Tie) -> _Result:
    """The vote of one prompt over its leaves in order."""
    voter_N = np.flatnonzero(class_N >= 0)
    classes, first, choice = np.unique(class_N[voter_N], return_index=True, return_inverse=True)
    weights = np.bincount(choice, weight_N[voter_N], minlength=len(classes))
    if weights.sum() == 0:
        return _Result(answered=len(voter_N))
    order = np.argsort(first)  # classes as they are seen
    weights, first, classes = weights[order], first[order], classes[order]
    share = weights[weights > 0] / weights.sum()
    entropy = float(-(share * np.log(share)).sum())
    tied = np.flatnonzero(weights >= weights.max() * (1 - _TIE_TOLERANCE))
    if len(tied) > 1 and tie == "skip":
        return _Result(answered=len(voter_N), entropy=entropy)
    winner = tied[0]
    rest = np.delete(weights, winner)
    second = rest.max() if len(rest) else 0.0
    return _Result(
        label=int(classes[winner]),
        first=int(voter_N[first[winner]]),
        ratio=float(weights[winner] / weight_N.sum()),
        margin=0.0 if len(tied) > 1 else float((weights[winner] - second) / weight_N.sum()),
        answered=len(voter_N),
        entropy=entropy,
    )


def _elect(leaves: Leaves, answers: Answers, weight_N: NDArray[np.float64], tie: Tie) -> Votes:
    bound = np.searchsorted(leaves.group_N, np.arange(leaves.groups + 1))
    results = [
        _count(answers.class_N[begin:end], weight_N[begin:end], tie)
        for begin, end in pairwise(bound)
    ]
    class_G = np.array([result.label for result in results], np.int64)
    return Votes(
        class_G=class_G,
        label_G=tuple(
            answers.answer_N[begin + result.first] if result.label >= 0 else None
            for begin, result in zip(bound[:-1], results, strict=True)
        ),
        ratio_G=np.array([result.ratio for result in results], np.float64),
        margin_G=np.array([result.margin for result in results], np.float64),
        answered_G=np.array([result.answered for result in results], np.int64),
        entropy_G=np.array([result.entropy for result in results], np.float64),
        icc=trunk_correlation(leaves, answers.class_N, class_G),
    )


def trunk_correlation(
    leaves: Leaves, class_N: NDArray[np.int64], class_G: NDArray[np.int64]
) -> float:
    """Intra-class correlation of "votes for the label" among the leaves of one trunk.

    One-way analysis of variance of trunks within prompts, pooled over the prompts that have a
    label and at least two trunks; between -1/(m-1) and 1. With m leaves a trunk, n votes are worth
    n / (1 + (m - 1) icc) independent ones. NaN where it cannot be estimated: no trunk has two
    leaves, or all agree.
    """
    voted_N = class_G[leaves.group_N] >= 0
    group_N, trunk_N = leaves.group_N[voted_N], leaves.trunk_N[voted_N]
    hit_N = (class_N == class_G[leaves.group_N])[voted_N].astype(np.float64)
    pairs, trunk_of_N = np.unique(np.stack([group_N, trunk_N]), axis=1, return_inverse=True)
    trunk_of_N = trunk_of_N.reshape(-1)
    size = np.bincount(trunk_of_N, minlength=pairs.shape[1]).astype(np.float64)  # per trunk
    hits = np.bincount(trunk_of_N, hit_N, minlength=pairs.shape[1])
    groups, group_of = np.unique(pairs[0], return_inverse=True)
    trunks = np.bincount(group_of, minlength=len(groups))
    several = trunks > 1
    size_G = np.bincount(group_of, size, minlength=len(groups))
    mean_G = np.bincount(group_of, hits, minlength=len(groups)) / size_G
    between = several[group_of] * size * (hits / size - mean_G[group_of]) ** 2
    within = several[group_of] * (hits - hits**2 / size)  # of a 0/1 variable
    free_between = float((trunks[several] - 1).sum())
    free_within = float((size_G - trunks)[several].sum())
    if free_between == 0 or free_within == 0:
        return float("nan")
    square_G = np.bincount(group_of, size**2, minlength=len(groups))
    leaves_per_trunk = float((size_G - square_G / size_G)[several].sum()) / free_between
    mean_between = float(between.sum()) / free_between
    mean_within = float(within.sum()) / free_within
    scale = mean_between + (leaves_per_trunk - 1) * mean_within
    return (mean_between - mean_within) / scale if scale > 0 else float("nan")


class _Indexed(Protocol):
    @property
    def index(self) -> int: ...


@dataclass
class FlipCounter:
    """How often the label of a prompt changes from one visit to the next."""

    label: dict[str, str] = field(default_factory=dict)
    """The last label of each prompt that had one, by its `Prompt.index` in digits: JSON."""

    def update(self, votes: Votes, prompts: Sequence[_Indexed], equivalence: Equivalence) -> float:
        """Share of the prompts with a label now and before whose label changed; NaN for none."""
        flips = []
        for prompt, label in zip(prompts, votes.label_G, strict=True):
            if label is None:
                continue
            key = str(prompt.index)
            if key in self.label:
                flips.append(equivalence.same(self.label[key], label) is False)
            self.label[key] = label
        return float(np.mean(flips)) if flips else float("nan")

    def state_dict(self) -> dict[str, str]:
        return dict(self.label)

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self.label = dict(state)
