"""Several rewards at once: their sum with weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers
from pyrl.foreign import TIME_LIMIT
from pyrl.reward.function import FunctionReward
from pyrl.vote import Votes

if TYPE_CHECKING:
    from pyrl.leaves import Leaves
    from pyrl.reward import Question


class WeightedReward:
    """The sum of functions' rewards, each with its weight, of those that are known, as TRL has it.

    A leaf's reward is unknown where all of them are.
    """

    def __init__(self, parts: Sequence[FunctionReward], weights: Sequence[float] = ()) -> None:
        """`weights`: one for each; none: 1 each. ValueError: others, or a name comes twice."""
        self.parts, self.weights = tuple(parts), tuple(weights) or (1.0,) * len(parts)
        if len(self.weights) != len(self.parts) or not all(map(math.isfinite, self.weights)):
            raise ValueError(
                f"reward_weights: expected {len(self.parts)} finite numbers, one for each reward "
                f"function, got {list(self.weights)}"
            )
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"reward: expected functions of different names, got {names}")
        self._known: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}

    @property
    def pass_answers(self) -> bool:
        """Whether any of them sees the true answers."""
        return any(part.pass_answers for part in self.parts)

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        total_N, known_N = np.zeros(len(leaves.leaf_N)), np.zeros(len(leaves.leaf_N), bool)
        for part, weight in zip(self.parts, self.weights, strict=True):
            reward_N = part(leaves, answers, votes, prompts)
            there_N = np.isfinite(reward_N)
            self._known[part.name].append(reward_N[there_N])
            total_N[there_N] += weight * reward_N[there_N]
            known_N |= there_N
        return np.where(known_N, total_N, math.nan)

    def usable(self, answers: Answers, votes: Votes, reward_N: NDArray[np.float64]) -> bool:
        """Whether anything is known."""
        return bool(np.isfinite(reward_N).any())

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        """The mean of each since the last call; without one that knew nothing."""
        found = {name: np.concatenate(parts) for name, parts in self._known.items() if parts}
        for parts in self._known.values():
            parts.clear()
        return {f"reward/of/{name}": float(of.mean()) for name, of in found.items() if len(of)}


def function_reward(
    functions: Sequence[str | Callable[..., Any]],
    weights: Sequence[float] = (),
    *,
    pass_answers: bool = False,
    time_limit: float = TIME_LIMIT,
) -> FunctionReward | WeightedReward:
    """The reward that these functions make: one is its own, without a weight."""
    parts = [FunctionReward(function, pass_answers, time_limit) for function in functions]
    return WeightedReward(parts, weights) if len(parts) != 1 or weights else parts[0]
