"""Bounds: how far a ratio may move before its gradient is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl.checks import at_least, finite, ordered
from pyrl.loss.columns import LossColumns
from pyrl.pack import TokenBatch

RADII = ("clip_low_T", "clip_high_T")
"""Columns of bounds in Python: the radii that they returned."""


class Bounds(Protocol):
    """Bounds in Python: radii per token."""

    def __call__(self, batch: TokenBatch) -> tuple[NDArray[Any], NDArray[Any]]:
        """Clip radii [T]: a ratio has a gradient between 1 - low and 1 + high."""


@dataclass(frozen=True)
class Clip:
    """PPO's interval [1 - low, 1 + high] (arXiv:1707.06347; high > low: arXiv:2503.14476)."""

    low: float = 0.2
    """How far a ratio may fall below 1."""
    high: float = 0.2
    """How far a ratio may rise above 1."""
    needs = ()

    def __post_init__(self) -> None:
        at_least(0, self, "low", "high")

    def __call__(self, batch: TokenBatch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        tokens = len(batch.label_T)
        return np.full(tokens, self.low), np.full(tokens, self.high)


@dataclass(frozen=True)
class ConfidenceClip:
    """ECHO's CA-Clip: a smaller radius where the answer's tail is confident (arXiv:2602.02150).

    radius = minimum + (maximum - minimum) * sigmoid(kappa * (centre - tail confidence)). The
    paper's centre is 1; None takes the batch's median, so that the radius uses its range.
    """

    minimum: float = 0.05
    """Radius where the tail is most confident."""
    maximum: float = 0.2
    """Radius where it is least confident."""
    kappa: float = 4.0
    """Steepness between the two."""
    tail: int = 16
    """Last tokens of a response whose mean confidence counts."""
    centre: float | None = None
    """Tail confidence of the middle radius; None: the median of the batch."""
    of: Literal["mass", "token"] = "mass"
    """Confidence is the mass of the five most probable tokens, or the sampled one's probability, as
    in the released scripts."""
    needs = RADII

    def radius(self, batch: TokenBatch) -> NDArray[np.float64]:
        """One clip radius per leaf [N]."""
        end_N = batch.token_offset_N1[1:]
        begin_N = np.maximum(batch.token_offset_N1[:-1], end_N - self.tail)
        sure_T = batch.confidence_T if self.of == "mass" else np.exp(batch.old_logprob_T)
        total = np.concatenate([[0.0], np.cumsum(sure_T, dtype=np.float64)])
        tail_N = (total[end_N] - total[begin_N]) / np.maximum(end_N - begin_N, 1)
        centre = float(np.median(tail_N)) if self.centre is None else self.centre
        gate_N = 1 / (1 + np.exp(-self.kappa * (centre - tail_N)))
        return np.asarray(self.minimum + (self.maximum - self.minimum) * gate_N)

    def __call__(self, batch: TokenBatch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        radius_T = self.radius(batch)[batch.leaf_T]
        return radius_T, radius_T


@dataclass(frozen=True)
class Unbounded:
    """No bounds."""

    needs = ()


@dataclass(frozen=True)
class Range:
    """low <= R <= high."""

    low: float = 0.0
    """Smallest ratio with a gradient."""
    high: float = 2.0
    """Largest ratio with a gradient."""
    needs = ()

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)


@dataclass(frozen=True)
class PositionClip:
    """CTPO: [exp(-low t^power), exp(high t^power)] at the t-th token of a response that takes part.

    A < 0 is capped at exp(dual t^power). arXiv:2605.07331; power -0.5 with `Ratio("cum_geo")`.
    """

    low: float = 0.025
    """How far log R may fall at the first token."""
    high: float = 0.05
    """How far it may rise."""
    dual: float = 0.05
    """Cap of log R for negative advantages."""
    power: float = 0.5
    """Growth of all three with the position t."""
    needs = ()

    def __post_init__(self) -> None:
        finite(self, "low", "high", "dual", "power")
        if self.power == 0:
            raise ValueError("PositionClip.power: expected a number other than 0; that is a Clip")


@dataclass(frozen=True)
class EntropyClip:
    """HAPO: PPO's interval, wider below for tokens of low entropy and above for those of high.

    With heat in [-1, 1] the log-entropy about its 0.8 quantile over the batch: low (1 - alpha heat)
    where heat < 0, high (1 + alpha heat) where heat > 0 (arXiv:2509.16591; the released code has
    the sign of negative heat wrong).
    """

    low: float = 0.2
    """How far a ratio may fall below 1 at no heat."""
    high: float = 0.2
    """How far it may rise above 1."""
    alpha: float = 1.0
    """How far heat widens the interval."""
    needs = ("entropy_T",)

    def __post_init__(self) -> None:
        at_least(0, self, "low", "high", "alpha")


@dataclass(frozen=True)
class TotalVariation:
    """Cuts A > 0 where pi - pi_old > delta, and A < 0 where it is < -delta (DPPO)."""

    delta: float = 0.15
    """Largest change of the token's probability."""
    needs = ()

    def __post_init__(self) -> None:
        ordered(self, 0.0, self.delta)


@dataclass(frozen=True)
class BinaryKL:
    """Cuts where `TotalVariation` would, by the KL divergence of {this token, any other} (DPPO)."""

    delta: float = 0.05
    """Largest divergence (nats)."""
    needs = ()

    def __post_init__(self) -> None:
        ordered(self, 0.0, self.delta)


def has_radii(bounds: Any) -> TypeGuard[Bounds]:
    """Whether bounds are Python's, so that their radii are columns."""
    return not hasattr(bounds, "needs") or bounds.needs == RADII


def entropy_heat(columns: LossColumns) -> Tensor:
    """HAPO's heat [T]: the log-entropy about its 0.8 quantile, scaled to [-1, 1] on each side."""
    entropy_T, whole = columns["entropy_T"], columns.whole
    # The logarithm grows: its quantile and ends are those of the entropy.
    pivot = _log(whole.nearest_quantile("entropy_T", entropy_T, 0.8))
    up = _log(whole.largest(entropy_T)) - pivot
    down = pivot - _log(whole.smallest(entropy_T))
    # The scale by the deviation about the pivot cancels when both sides are scaled to 1.
    away_T = _log(entropy_T) - pivot
    side_T = torch.where(away_T > 0, up, down)
    return columns.used_or_zero(torch.where(side_T > 0, away_T / side_T, 0.0))


def _log(entropy: Tensor) -> Tensor:
    return entropy.clamp(min=1e-8).log()
