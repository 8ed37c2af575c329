"""Rewards: one number for each leaf; NaN where it is unknown.

`Prompt.answer`, the true answer, is read by `TrueReward` (supervised training), by
`FunctionReward` if told to, and by `pyrl.report.step.label_metrics`, which nothing trains on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers, Equivalence, truth
from pyrl.answers.truth import has_truth, right
from pyrl.checks import at_least, described, finite, shares
from pyrl.reward.function import FunctionReward
from pyrl.reward.weighted import WeightedReward, function_reward
from pyrl.vote import Votes

if TYPE_CHECKING:
    from pyrl.leaves import Leaves

__all__ = [
    "FunctionReward",
    "LengthReward",
    "OverlongReward",
    "Question",
    "RandomReward",
    "Reward",
    "TrueReward",
    "VoteReward",
    "WeightedReward",
    "check_answers",
    "function_reward",
    "grade",
    "metrics_of",
    "rewards",
]


class Question(truth.Question, Protocol):
    """What a reward reads of a `pyrl.prompts.Prompt`."""

    @property
    def messages(self) -> Sequence[Mapping[str, Any]] | None: ...
    @property
    def truth(self) -> Mapping[str, Any]: ...


_Q = TypeVar("_Q", bound=Question)


class Reward(Protocol):
    """Scores the leaves of a step; `prompts` are those of the step, in the order of the groups.

    `leaves.rows` has the tokens of all leaves with their entropies, `leaves.texts` the spans of
    their characters. A reward may name in `needs` what it reads of `Leaves`. One that remembers
    something from step to step has a method `initial`: see `pyrl.run.states`.
    """

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]: ...

    def usable(self, answers: Answers, votes: Votes, reward_N: NDArray[np.float64]) -> bool:
        """Whether these rewards say anything: False where no answer could be read at all."""


def rewards(
    reward: Reward,
    leaves: Leaves,
    answers: Answers,
    votes: Votes,
    prompts: Sequence[Question],
    state: Any = None,
    known_N: Sequence[float] | NDArray[np.float64] = (),
) -> NDArray[np.float64]:
    """The reward of each leaf, NaN where it is unknown; `state` is what the reward remembers.

    `known_N`: rewards of the first leaves, which are not asked for again. ValueError if it gives
    something else.
    """
    if len(known_N):
        new_N = np.arange(len(known_N), len(leaves.leaf_N))
        asked = leaves.take(new_N), answers.take(new_N), votes, prompts
        return np.concatenate([known_N, rewards(reward, *asked, state)])
    reward_N = reward(replace(leaves, state=state), answers, votes, prompts)
    size, name = len(leaves.leaf_N), type(reward).__name__
    expected = f"reward: {name}: expected a finite number, or NaN, for each of {size} leaves"
    if not (isinstance(reward_N, np.ndarray) and reward_N.shape == (size,)):
        raise ValueError(f"{expected}, got {described(reward_N)}")
    if np.isinf(reward_N).any():
        first = int(np.isinf(reward_N).argmax())
        raise ValueError(f"{expected}, got {reward_N[first]} for leaf {first}")
    return reward_N


@runtime_checkable
class RewardMetrics(Reward, Protocol):
    """A reward that tells what it did."""

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        """For the report of the step, after its rewards; finite numbers."""


def metrics_of(
    reward: Reward, leaves: Leaves, answers: Answers, votes: Votes, state: Any = None
) -> dict[str, float]:
    """What a reward tells of a step; nothing of one that has no `metrics`."""
    if not isinstance(reward, RewardMetrics):
        return {}
    return reward.metrics(replace(leaves, state=state), answers, votes)


@dataclass(frozen=True)
class VoteReward:
    """1 for the leaves in the class of the label, 0 for the others (arXiv:2504.16084).

    A prompt without a label has no right leaf, hence no advantage. NaN, which takes no part in the
    baseline, where a comparison with the label ran into a limit.
    """

    no_answer: float | None = 0.0
    """For a leaf without an answer; None: unknown, it takes no part in the baseline."""
    wrong: float = 0.0
    """For a leaf with another answer than the label."""

    @property
    def values(self) -> set[float]:
        """All rewards that there can be."""
        return {1.0, self.wrong} | ({self.no_answer} if self.no_answer is not None else set())

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        silent_N = answers.class_N < 0
        label_N = votes.class_G[leaves.group_N]
        no_answer = math.nan if self.no_answer is None else self.no_answer
        reward_N = np.where(answers.class_N == label_N, 1.0, self.wrong)
        reward_N[_undecided(leaves, answers, votes)] = math.nan
        return np.where(silent_N, no_answer, reward_N)

    def usable(self, answers: Answers, votes: Votes, reward_N: NDArray[np.float64]) -> bool:
        return bool((votes.class_G >= 0).any())


def _undecided(leaves: Leaves, answers: Answers, votes: Votes) -> NDArray[np.bool_]:
    """Whether nobody knows if a leaf's answer is the label: they were taken for different."""
    undecided_N = np.zeros(len(answers.answer_N), bool)
    if not answers.unknown:
        return undecided_N
    first: dict[tuple[int, int], str | None] = {}
    """Answer of each group's classes, which was compared for all of the class."""
    keys = [*zip(leaves.group_N.tolist(), answers.class_N.tolist(), strict=True)]
    for key, answer in zip(keys, answers.answer_N, strict=True):
        first.setdefault(key, answer)
    for (group, of), answer in first.items():
        label = votes.label_G[group]
        if answer is None or label is None or of == votes.class_G[group]:
            continue
        if answers.equivalence.same(label, answer) is None:
            undecided_N |= (leaves.group_N == group) & (answers.class_N == of)
    return undecided_N


@dataclass(frozen=True)
class TrueReward:
    """1 for the true answer, 0 for another or none: supervised training.

    NaN where the verifier is unsure or the prompt has no true answer. Answers are compared by the
    relation that sorted them.
    """

    wrong: float = 0.0
    """For a leaf with another answer than the true one, or without an answer."""

    @property
    def values(self) -> set[float]:
        """All rewards that there can be."""
        return {1.0, self.wrong}

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        right_N = grade(leaves, answers, prompts, answers.equivalence)
        return np.where(right_N == 0, self.wrong, right_N)

    def usable(self, answers: Answers, votes: Votes, reward_N: NDArray[np.float64]) -> bool:
        return bool((np.isfinite(reward_N) & (answers.class_N >= 0)).any())


@dataclass(frozen=True)
class OverlongReward(TrueReward):
    """The true reward less what a response has in its last tokens before the limit.

    DAPO's soft punishment (arXiv:2503.14476): penalty (length - limit + buffer) / buffer where that
    is above 0, with the limit of `--sample.max-tokens`; `buffer` is a share of it.
    """

    buffer: float = 0.2
    """Share of the longest response in which the punishment grows; the paper's is 4,096 of 20,480
    tokens."""
    penalty: float = 1.0
    """Punishment of a response at the limit; 0: none."""

    def __post_init__(self) -> None:
        shares(self, "buffer")
        finite(self, "penalty")
        at_least(0, self, "penalty")
        if self.buffer == 0:
            raise ValueError("OverlongReward.buffer: expected a share above 0, got 0")

    @property
    def values(self) -> set[float]:
        """The largest and smallest rewards that there can be."""
        return super().values | {value - self.penalty for value in super().values}

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        right_N = super().__call__(leaves, answers, votes, prompts)
        return np.asarray(right_N - self._punishment(leaves))

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        return {"reward/overlong": float(self._punishment(leaves).mean())}

    def _punishment(self, leaves: Leaves) -> NDArray[np.float64]:
        at_least(1, leaves, "limit")
        buffer = self.buffer * leaves.limit
        over_N = (leaves.length_N - leaves.limit + buffer) / buffer
        return np.asarray(self.penalty * np.clip(over_N, 0, 1))


@dataclass(frozen=True)
class LengthReward(TrueReward):
    """The true reward and a part for a response of a good length, as OpenVLThinkerV2 has it.

    weight times a trapezoid of the length: it rises from 0 to 1 between two shares of the longest
    response (`--sample.max-tokens`), stays, and falls to 0 between two others (arXiv:2604.08539).
    The source has such bounds for each kind of task and does not print them: these are ours.
    """

    rise: tuple[float, float] = (0.02, 0.1)
    """Shares of the longest response between which the part grows."""
    fall: tuple[float, float] = (0.6, 0.9)
    """Shares of it between which the part shrinks."""
    weight: float = 0.1
    """The whole part; 0: none."""

    def __post_init__(self) -> None:
        finite(self, "weight")
        bounds = (*self.rise, *self.fall)
        if not 0 <= bounds[0] < bounds[1] <= bounds[2] < bounds[3] < math.inf:
            raise ValueError(
                f"LengthReward: expected 0 <= rise < rise <= fall < fall, got rise {self.rise} and "
                f"fall {self.fall}"
            )

    @property
    def values(self) -> set[float]:
        """The largest and smallest rewards that there can be."""
        return super().values | {value + self.weight for value in super().values}

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        right_N = super().__call__(leaves, answers, votes, prompts)
        return np.asarray(right_N + self.weight * self._shape_N(leaves))

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        return {"reward/length": float(self.weight * self._shape_N(leaves).mean())}

    def _shape_N(self, leaves: Leaves) -> NDArray[np.float64]:
        at_least(1, leaves, "limit")
        share_N = leaves.length_N / leaves.limit
        (a, b), (c, d) = self.rise, self.fall
        return np.clip(np.minimum((share_N - a) / (b - a), (d - share_N) / (d - c)), 0, 1)


def grade(
    leaves: Leaves, answers: Answers, prompts: Sequence[Question], equivalence: Equivalence
) -> NDArray[np.float64]:
    """Accuracy of each leaf; NaN also where the prompt has no true answer."""
    return right(answers.answer_N, [prompts[group] for group in leaves.group_N], equivalence)


@dataclass(frozen=True)
class RandomReward:
    """1 with probability p, whatever the answer: the control that shows what the reward is worth.

    The draws depend on the seed and on all texts of the step, so they differ from step to step and
    are the same when a run is repeated or resumed.
    """

    p: float = 0.5
    """Probability of 1."""
    seed: int = 0
    """Another seed draws other rewards."""

    values = frozenset({0.0, 1.0})
    """All rewards that there can be."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p: expected a probability, got {self.p}")

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        digest = hashlib.blake2b(f"{self.seed}".encode(), digest_size=16)
        for text in leaves.text_N:
            digest.update(b"\0" + text.encode(errors="surrogatepass"))
        random = np.random.default_rng(int.from_bytes(digest.digest()))
        draw_N = random.random(len(leaves.text_N))
        return np.where(draw_N < self.p, 1.0, 0.0)

    def usable(self, answers: Answers, votes: Votes, reward_N: NDArray[np.float64]) -> bool:
        return True


def check_answers(reward: Reward, prompts: list[_Q], data: str) -> list[_Q]:
    """The prompts; ValueError if the reward needs something of them that none of them has."""
    known = any(map(has_truth, prompts))
    supervised = isinstance(reward, TrueReward)
    functions: tuple[FunctionReward, ...] = ()
    if isinstance(reward, FunctionReward | WeightedReward):
        functions = (reward,) if isinstance(reward, FunctionReward) else reward.parts
        supervised = reward.pass_answers
        known |= any(value is not None for p in prompts for value in p.truth.values())
    if supervised and not known:
        raise ValueError(
            f"{data}: expected questions with true answers (a column answer, solution or "
            f"ground_truth), which the reward {type(reward).__name__} needs, got none"
        )
    for function in functions:
        function.check(prompts, data)
    return prompts
