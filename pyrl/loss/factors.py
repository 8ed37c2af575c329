"""Factors: detached weights of the policy term, for the engine's mismatch or a token's effect."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyrl._core.loss import LossColumns
from pyrl.checks import at_least, ordered
from pyrl.loss.axis import LossState

LEVELS = {"token": 0, "sequence": 1}


@dataclass(frozen=True)
class TIS:
    """Truncated importance weight max(floor, min(rho, cap)) of a token or a whole response."""

    cap: float = 2.0
    level: Literal["token", "sequence"] = "token"
    floor: float = 0.0
    normalize: bool = False
    """Divide by the mean over tokens, or responses."""

    def __post_init__(self) -> None:
        at_least(0, self, "floor")
        ordered(self, self.floor, self.cap)

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: old_logprob_T, rollout_logprob_T."""
        return columns.importance(LEVELS[self.level], self.cap, self.floor, self.normalize)


@dataclass(frozen=True)
class IcePop:
    """rho where it lies in [low, high], else 0: such a token has no policy term."""

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: old_logprob_T, rollout_logprob_T."""
        return columns.importance_window(self.low, self.high)


@dataclass(frozen=True)
class Steer:
    """Smaller weights for tokens that change the entropy more (arXiv:2510.10150).

    linear: from `most` down to `least` over the batch's range of |Omega|; exp: from 1 to `least`.
    """

    shape: Literal["linear", "exp"] = "linear"
    least: float = 0.8
    most: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most < inf:
            raise ValueError(f"Steer: expected 0 < least <= most, got {self.least}, {self.most}")

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: logprob_T, old_logprob_T, advantage_T, entropy_T."""
        return columns.steer(self.shape == "exp", self.least, self.most)
