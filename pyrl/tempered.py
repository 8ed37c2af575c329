"""Tempered: rows that the policy drew at another temperature, to hold its entropy at a target.

AEPO (arXiv:2510.08141): what is learnt from good answers at a raised temperature raises the
entropy of the policy, and at a lowered one lowers it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrl.checks import at_least, finite, shares
from pyrl.pack import TokenBatch, joined


@dataclass(frozen=True)
class Tempered:
    """Some questions of a step are sampled again, and right answers take the place of rows."""

    share: float = 0.0
    """Share of the step's questions that are sampled again; 0: none."""
    target: float = 0.75
    """Mean token entropy (nats) up to which the temperature is raised, and above it lowered."""
    high: float = 1.2
    """What a raised temperature is, times that of sampling."""
    low: float = 0.8
    """What a lowered one is."""
    least: float = 0.05
    """Advantage above which such an answer trains; its advantage is 1 then (REINFORCE)."""
    rows: int = 60
    """Rows of a step that such answers replace at most; half as many at the lowered temperature."""

    def __post_init__(self) -> None:
        shares(self, "share")
        finite(self, "target", "high", "low", "least")
        at_least(0, self, "target", "rows")
        if not 0 < self.low <= 1 <= self.high:
            raise ValueError(
                f"Tempered: expected 0 < low <= 1 <= high, got low={self.low} and high={self.high}"
            )

    def questions(self, count: int) -> int:
        """How many of so many are sampled again: the first ones, whose order is random."""
        return math.ceil(self.share * count)

    def factor(self, entropy: float) -> float:
        """Of the temperature, where the step's own answers have this entropy."""
        return self.high if entropy <= self.target else self.low

    def chosen(self, advantage_N: NDArray[np.float64], entropy: float) -> NDArray[np.int64]:
        """Which of the answers at that temperature train, the first ones in their order."""
        good_N = np.flatnonzero(advantage_N > self.least)
        most = min(self.rows, good_N.size)
        return good_N[: most if entropy <= self.target else most // 2]


def mixed(
    batch: TokenBatch,
    group_N: NDArray[np.int64],
    rows: TokenBatch,
    other_N: NDArray[np.int64],
) -> tuple[TokenBatch, int]:
    """The batch with rows of these questions in the place of its own, from the last of each
    question on, and how many: rows for which a question has no place are left out."""
    order_N = np.arange(len(batch))
    for group in np.unique(other_N):
        places = np.flatnonzero(group_N == group)[::-1]
        taken = np.flatnonzero(other_N == group)
        count = min(places.size, taken.size)
        order_N[places[:count]] = len(batch) + taken[:count]
    replaced = int((order_N >= len(batch)).sum())
    return (joined(batch, rows).take(order_N) if replaced else batch), replaced
