"""Reshape: other advantages for the tokens of a mini-batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyrl._core.loss import LossColumns
from pyrl.loss.axis import LossState


@dataclass(frozen=True)
class EntropyZ:
    """A (1 + scale z), z the entropy standardised over the batch (arXiv:2510.14545)."""

    scale: float = 0.2

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T, entropy_T."""
        return columns.entropy_advantage(self.scale)


@dataclass(frozen=True)
class Blend:
    """DCPO: mixes in reward times the ratio of a second temperature to the first.

    (1 - alpha) A + alpha R rho, alpha = a / (1 + a), a = min(|target - entropy|, limit) / share of
    responses with a reward; alpha = 0 without any. The second temperature is the caller's choice.
    """

    target: float = 0.5
    """Wanted entropy (nats)."""
    limit: float = 0.1

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T, reward_T, second_logprob_T, old_logprob_T; state.entropy."""
        if state.entropy is None:
            raise ValueError("Blend: needs state.entropy, the entropy of the last update")
        return columns.blend_advantage(self.target, self.limit, state.entropy)


@dataclass(frozen=True)
class TokenGroup:
    """HAPO: rewards normalised over all tokens of a question (arXiv:2509.16591).

    A question keeps its advantages if a normalised reward is `limit` or more.
    """

    limit: float = 5.0

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T, reward_T, group_N."""
        return columns.token_group_advantage(self.limit)


@dataclass(frozen=True)
class EntropyBand:
    """Entrocraft: only positive rewards above a band of the batch's entropy, only negative below.

    Rewards must be -1 or 1. The band moves from its first to its second pair over the run.
    """

    low: tuple[float, float] = (0.6, 0.4)
    high: tuple[float, float] = (0.7, 0.5)
    cosine: bool = False

    def band(self, progress: float) -> tuple[float, float]:
        """Of a share of the run (nats)."""
        share = 0.5 * (1 - cos(pi * progress)) if self.cosine else progress
        low, high = (start + (end - start) * share for start, end in (self.low, self.high))
        return low, high

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T, reward_T, entropy_T."""
        return columns.band_advantage(*self.band(state.progress))


@dataclass(frozen=True)
class SignFilter:
    """Keeps advantages of one sign; the others become 0."""

    keep: Literal["positive", "negative"] = "positive"

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T."""
        return columns.sign_advantage(self.keep == "positive")
