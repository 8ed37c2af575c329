"""Sampling: the distribution that tokens are drawn from, and tokens that are not drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrl.checks import described


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    top_h: float = 1.0
    """Keep as many tokens as have, renormalised, at most this share of the entropy of the whole
    distribution; 1 keeps all (Top-H, arXiv:2509.02510)."""

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
        if not 0 < self.top_h <= 1:
            raise ValueError(f"top_h: expected 0 < top_h <= 1, got {self.top_h}")


@dataclass(frozen=True)
class Exclude:
    """Tokens that each of B rows may not draw; in any order, and twice is as good as once."""

    token_E: NDArray[np.int32]
    """The tokens of all rows, row after row."""
    offset_B1: NDArray[np.int64]
    """Where the tokens of each row begin, and the end of the last row's."""

    @classmethod
    def of_rows(cls, token_lists: Sequence[NDArray[np.int32]]) -> Exclude | None:
        """The tokens of each row; None if no row has any."""
        offset_B1 = np.zeros(len(token_lists) + 1, np.int64)
        offset_B1[1:] = np.cumsum([*map(len, token_lists)])
        return cls(np.concatenate(token_lists), offset_B1) if offset_B1[-1] else None

    def check(self, rows: int, vocabulary: int) -> None:
        """TypeError or ValueError unless these are tokens of a vocabulary for that many rows."""
        for name, values, dtype in (
            ("token_E", self.token_E, np.int32),
            ("offset_B1", self.offset_B1, np.int64),
        ):
            if not isinstance(values, np.ndarray):
                raise TypeError(f"exclude.{name}: expected a numpy array, got {described(values)}")
            if values.ndim != 1 or values.dtype != dtype:
                raise ValueError(
                    f"exclude.{name}: expected {np.dtype(dtype).name} with one axis, "
                    f"got {values.dtype}{list(values.shape)}"
                )
        offset_B1, size = self.offset_B1, len(self.token_E)
        ends = len(offset_B1) == rows + 1 and offset_B1[0] == 0 and offset_B1[-1] == size
        if not ends or not (offset_B1[1:] >= offset_B1[:-1]).all():
            raise ValueError(
                f"exclude.offset_B1: expected {rows + 1} numbers that rise from 0 to {size}, "
                f"got {offset_B1}"
            )
        if size and not 0 <= self.token_E.min() <= self.token_E.max() < vocabulary:
            raise ValueError(
                f"exclude.token_E: expected ids in 0..{vocabulary - 1}, got {self.token_E}"
            )
