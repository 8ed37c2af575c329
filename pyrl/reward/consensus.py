"""Consensus: rewards from how many leaves of a prompt say the same, without any true answer.

A class is what `--equivalence` takes for one answer, its share is of all leaves of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers
from pyrl.checks import at_least, described, finite, one_of, shares
from pyrl.foreign import TIME_LIMIT, Foreign
from pyrl.reward.function import function_at
from pyrl.vote import Votes

if TYPE_CHECKING:
    from pyrl.leaves import Leaves
    from pyrl.reward import Question


def groups_of(leaves: Leaves) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each prompt that has leaves, and their ordinals."""
    for group in np.unique(leaves.group_N).tolist():
        yield group, np.flatnonzero(leaves.group_N == group)


def class_share_N(leaves: Leaves, answers: Answers) -> NDArray[np.float64]:
    """The share of each leaf's class in its prompt; 0 without an answer."""
    share_N = np.zeros(len(answers.class_N))
    for _, member in groups_of(leaves):
        class_N = answers.class_N[member]
        counts = np.bincount(class_N[class_N >= 0], minlength=1)
        share_N[member] = np.where(class_N >= 0, counts[class_N], 0) / member.size
    return share_N


@cache
def _relation(path: str) -> Callable[[str, str], bool]:
    """A user's function of two answers, which is asked once for each pair."""
    what = "FrequencyReward.relation"
    function = function_at(path, what, Foreign(f"{what} {path}", TIME_LIMIT, None))

    @cache
    def same(one: str, other: str) -> bool:
        if one == other:
            return True
        with Foreign(f"{what} {path}", TIME_LIMIT, None):
            said = function(one, other)
        if not isinstance(said, bool | np.bool_):
            raise ValueError(f"{what} {path}: expected True or False, got {described(said)}")
        return bool(said)

    return same


class OfConsensus:
    """What rewards from the leaves alone have in common."""

    def usable(self, answers: Answers, votes: Votes, reward_N: NDArray[np.float64]) -> bool:
        """Whether an answer could be read."""
        return bool((np.isfinite(reward_N) & (answers.class_N >= 0)).any())


@dataclass(frozen=True)
class FrequencyReward(OfConsensus):
    """EMPO: a leaf earns the share of its class, so that answers agree more (arXiv:2504.05812).

    Without an answer 0. All leaves of a prompt get 0 where the gate is closed.
    """

    gate: Literal["different", "frequency", "open"] = "different"
    """Closed where all leaves say something else; where no share reaches `least`; or never."""
    least: float = 0.25
    """Share that the most frequent answer must have for the gate "frequency"."""
    relation: str = ""
    """`module:function` or `file.py:function` of two answers that says whether they mean the same;
    empty: the relation of --equivalence. An answer joins the first class whose first it is like."""

    def __post_init__(self) -> None:
        one_of(self.gate, ("different", "frequency", "open"), "gate of FrequencyReward")
        shares(self, "least")
        if self.relation:
            _relation(self.relation)

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        share_N = self._share_N(leaves, answers)
        for member in self._closed(leaves, share_N):
            share_N[member] = 0.0
        return share_N

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        share_N = self._share_N(leaves, answers)
        closed = sum(1 for _ in self._closed(leaves, share_N))
        return {
            "reward/class_share": float(share_N.mean()),
            "reward/closed": closed / max(1, leaves.groups),
        }

    def _share_N(self, leaves: Leaves, answers: Answers) -> NDArray[np.float64]:
        """The share of each leaf's class, by the relation."""
        if not self.relation:
            return class_share_N(leaves, answers)
        same, class_N = _relation(self.relation), np.full(len(answers.class_N), -1, np.int64)
        for _, member in groups_of(leaves):
            told = [(n, text) for n in member.tolist() if (text := answers.answer_N[n]) is not None]
            firsts: list[str] = []
            for n, text in told:
                of = next((i for i, one in enumerate(firsts) if same(one, text)), len(firsts))
                firsts += [text] * (of == len(firsts))
                class_N[n] = of
        return class_share_N(leaves, replace(answers, class_N=class_N))

    def _closed(self, leaves: Leaves, share_N: NDArray[np.float64]) -> Iterator[NDArray[np.int64]]:
        """The leaves of each prompt whose gate is closed."""
        for _, member in groups_of(leaves):
            most = share_N[member].max()
            apart = self.gate == "different" and most * member.size <= 1
            if apart or (self.gate == "frequency" and most < self.least):
                yield member


@dataclass(frozen=True)
class SelectiveReward(OfConsensus):
    """SCRL: a label counts if its vote is clear, rare unsure answers are wrong (arXiv:2603.19880).

    The label has to have a share of `clear`, and more than `ahead` beyond that of the next answer;
    then its leaves earn their share p. Leaves of answers with p < `rare` whose mean entropy is not
    below the prompt's earn p - `rare`. All with an answer lose `entropy` times what the mean
    entropy of their class is above the prompt's (nats). As released, with its numbers.
    """

    clear: float = 0.375
    """Least share of the label."""
    ahead: float = 0.125
    """Its distance to the next answer has to be larger."""
    rare: float = 0.125
    """Share below which an answer can be wrong."""
    entropy: float = 0.1
    """Price of a nat of entropy."""
    no_answer: float = -1.0
    """For a leaf without an answer."""
    needs = ("entropy_N",)

    def __post_init__(self) -> None:
        shares(self, "clear", "ahead", "rare")
        finite(self, "entropy", "no_answer")

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        share_N = class_share_N(leaves, answers)
        reward_N = -self.entropy * self._over_N(leaves, answers)
        right_N = self._right_N(leaves, answers, votes)
        wrong_N = self._wrong_N(leaves, answers, votes)
        reward_N[right_N] += share_N[right_N]
        reward_N[wrong_N] += share_N[wrong_N] - self.rare
        return np.where(answers.class_N < 0, self.no_answer, reward_N)

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        return {
            "reward/taken_right": float(self._right_N(leaves, answers, votes).mean()),
            "reward/taken_wrong": float(self._wrong_N(leaves, answers, votes).mean()),
        }

    def _right_N(self, leaves: Leaves, answers: Answers, votes: Votes) -> NDArray[np.bool_]:
        """Leaves of a label that is clear."""
        label_N = votes.class_G[leaves.group_N]
        clear_G = np.zeros(len(votes.class_G), bool)
        for group, member in groups_of(leaves):
            class_N = answers.class_N[member]
            counts = np.bincount(class_N[class_N >= 0], minlength=2) / member.size
            first = votes.class_G[group]
            if first >= 0:
                second = np.delete(counts, first).max()
                ahead = second == 0 or counts[first] - second > self.ahead
                clear_G[group] = counts[first] >= self.clear and ahead
        right_N: NDArray[np.bool_] = (answers.class_N == label_N) & (answers.class_N >= 0)
        return right_N & clear_G[leaves.group_N]

    def _wrong_N(self, leaves: Leaves, answers: Answers, votes: Votes) -> NDArray[np.bool_]:
        """Leaves of rare and unsure answers."""
        rare_N = class_share_N(leaves, answers) < self.rare
        unsure_N = self._over_N(leaves, answers) >= 0
        right_N = self._right_N(leaves, answers, votes)
        return (answers.class_N >= 0) & np.asarray(rare_N & unsure_N & ~right_N)

    def _over_N(self, leaves: Leaves, answers: Answers) -> NDArray[np.float64]:
        """The mean entropy of each leaf's class less that of the prompt (nats)."""
        over_N = np.zeros(len(answers.class_N))
        for _, member in groups_of(leaves):
            mean = leaves.entropy_N[member].mean()
            for of in np.unique(answers.class_N[member]):
                inside = member[answers.class_N[member] == of]
                over_N[inside] = leaves.entropy_N[inside].mean() - mean
        return over_N


@dataclass(frozen=True)
class BalancedReward(OfConsensus):
    """DDRL: 1 for leaves of the label and -1 for the rarest answers, the middle is unknown.

    At most half of the `keep` leaves of a prompt are the label's, the rest are those of least
    frequent answers, none at all counting as least (arXiv:2604.21327). They are advantages as they
    are (--advantage return). A prompt without a label has none. Without the source's training on
    agreeing responses afterwards.
    """

    keep: int = 32
    """Leaves of a prompt that are rewarded; the votes beyond it are dropped."""

    def __post_init__(self) -> None:
        at_least(1, self, "keep")

    values = frozenset({-1.0, 1.0})
    """All rewards that there can be."""

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        reward_N = np.full(len(answers.class_N), math.nan)
        share_N = class_share_N(leaves, answers)
        for group, member in groups_of(leaves):
            label = votes.class_G[group]
            if label < 0:
                continue
            right = answers.class_N[member] == label
            keep = min(self.keep, member.size)
            first = min(int(right.sum()), keep // 2)
            order = np.lexsort((~right, -share_N[member]))  # of equal shares the label's first
            chosen = np.append(order[:first], order[member.size - (keep - first) :])
            reward_N[member[chosen]] = np.where(right[chosen], 1.0, -1.0)
        return reward_N

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        reward_N = self(leaves, answers, votes, ())
        return {"reward/dropped": float(np.isnan(reward_N).mean())}


@dataclass(frozen=True)
class NoveltyReward(OfConsensus):
    """EVOL-RL: the vote gives the sign, novelty among the like the size (arXiv:2509.15194).

    Leaves of the label get 0.5 to 1, others -1 to -0.5, the more the less they resemble others: a
    half of their mean likeness to those of their sign and a half of the largest to any leaf, scaled
    to the prompt's range. -1 without an answer. Likeness is the cosine of the counts of token
    n-grams: ours, where the source asks an embedding model.
    """

    ngram: int = 2
    """Tokens that are counted together."""
    spread: float = 0.5
    """Range of the sizes; 0: 0.75 for each, the vote alone."""

    def __post_init__(self) -> None:
        at_least(1, self, "ngram")
        shares(self, "spread")

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        reward_N = np.full(len(answers.class_N), -1.0)
        novel_N = self._novel_N(leaves, answers, votes)
        right_N = answers.class_N == votes.class_G[leaves.group_N]
        size_N = np.where(right_N, 0.75, -0.75) + self.spread * (novel_N - 0.5)
        told_N = answers.class_N >= 0
        reward_N[told_N] = size_N[told_N]
        return reward_N

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        novel_N = self._novel_N(leaves, answers, votes)
        return {"reward/novelty_std": float(novel_N.std())}

    def _novel_N(self, leaves: Leaves, answers: Answers, votes: Votes) -> NDArray[np.float64]:
        """Novelty in [0, 1] among the leaves of the prompt with an answer of the same sign."""
        novel_N = np.full(len(answers.class_N), 0.5)
        for group, member in groups_of(leaves):
            told = member[answers.class_N[member] >= 0]
            if told.size < 2:
                continue
            like = self._likeness([leaves.token_N[n] for n in told])
            right = answers.class_N[told] == votes.class_G[group]
            for sign in (right, ~right):
                own = np.flatnonzero(sign)
                if own.size == 0:
                    continue
                others = like[own] - np.eye(told.size)[own] * like[own]
                among = others[:, own].sum(axis=1) / max(1, own.size - 1)
                if own.size == 1:
                    among = others.sum(axis=1) / (told.size - 1)
                value = 1 - (among + others.max(axis=1)) / 2
                spread = np.ptp(value)
                if own.size == 1:
                    novel_N[told[own]] = 1.0
                elif spread > 1e-12:
                    novel_N[told[own]] = (value - value.min()) / spread
        return novel_N

    def _likeness(self, token_N: Sequence[NDArray[np.int32]]) -> NDArray[np.float64]:
        """The cosine of the counts of n-grams of each pair; a short response is one n-gram."""
        grams: dict[tuple[int, ...], int] = {}
        rows = []
        for token in token_N:
            ids, n = token.tolist(), self.ngram
            found = [tuple(ids[i : i + n]) for i in range(max(1, len(ids) - n + 1))]
            rows.append([grams.setdefault(gram, len(grams)) for gram in found])
        count_NG = np.stack([np.bincount(row, minlength=len(grams)) for row in rows])
        unit_NG = count_NG / np.linalg.norm(count_NG, axis=1, keepdims=True)
        like: NDArray[np.float64] = unit_NG @ unit_NG.T
        return like
