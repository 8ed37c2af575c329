"""Sampling: the distribution that tokens are drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature}")
        if self.top_k < 0 or self.top_k % 1 != 0:
            raise ValueError(
                f"top_k: expected a whole number >= 0 (0 keeps all tokens), got {self.top_k}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: expected 0 <= min_p < 1, got {self.min_p}")
