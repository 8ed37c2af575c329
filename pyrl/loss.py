"""Loss: the choices of a policy loss. `policy_loss` computes; these say with which numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl.pack import TokenBatch
from pyrl.policy_loss import Aggregate, TokenMean


class Bounds(Protocol):
    """How far a token's ratio may move before its gradient is cut."""

    def __call__(self, batch: TokenBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Clip radii [T]: a ratio has a gradient between 1 - low and 1 + high."""


@dataclass(frozen=True)
class Clip:
    """PPO's interval [1 - low, 1 + high] (arXiv:1707.06347; high > low: arXiv:2503.14476)."""

    low: float = 0.2
    high: float = 0.2

    def __call__(self, batch: TokenBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        tokens = len(batch.label_T)
        return np.full(tokens, self.low, np.float32), np.full(tokens, self.high, np.float32)


@dataclass(frozen=True)
class ConfidenceClip:
    """ECHO's CA-Clip: a smaller radius where the answer's tail is confident (arXiv:2602.02150).

    radius = minimum + (maximum - minimum) * sigmoid(kappa * (centre - tail confidence)). The
    paper's centre is 1; None takes the batch's median, so that the radius uses its range.
    """

    minimum: float = 0.05
    maximum: float = 0.2
    kappa: float = 4.0
    tail: int = 16
    """Last tokens of a response whose mean confidence counts."""
    centre: float | None = None

    def radius(self, batch: TokenBatch) -> NDArray[np.float64]:
        """One clip radius per leaf [N]."""
        end_N = batch.token_offset_N1[1:]
        begin_N = np.maximum(batch.token_offset_N1[:-1], end_N - self.tail)
        total = np.concatenate([[0.0], np.cumsum(batch.confidence_T, dtype=np.float64)])
        tail_N = (total[end_N] - total[begin_N]) / np.maximum(end_N - begin_N, 1)
        centre = float(np.median(tail_N)) if self.centre is None else self.centre
        gate_N = 1 / (1 + np.exp(-self.kappa * (centre - tail_N)))
        return np.asarray(self.minimum + (self.maximum - self.minimum) * gate_N)

    def __call__(self, batch: TokenBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        radius_T = self.radius(batch)[batch.leaf_T].astype(np.float32)
        return radius_T, radius_T


@dataclass(frozen=True)
class KL:
    """A penalty towards the frozen initial model; coefficient 0 needs no such model."""

    coef: float = 0.001
    estimator: Literal["k1", "k2", "k3"] = "k3"


@dataclass(frozen=True)
class Loss:
    """PPO's clipped surrogate and what is added to it; see `policy_loss` for the formula."""

    bounds: Bounds = field(default_factory=Clip)
    dual: float | None = 3.0
    """Cap on the ratio of tokens with a negative advantage (arXiv:1912.09729); None is no cap."""
    kl: KL = field(default_factory=KL)
    entropy: float = 0.0
    """Coefficient of the entropy bonus."""
    aggregate: Aggregate = field(default_factory=TokenMean)
