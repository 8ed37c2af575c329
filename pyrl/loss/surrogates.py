"""Surrogates: value V and gradient G of a token; loss = -A V, d loss / d logprob = -A G."""

from __future__ import annotations

from dataclasses import dataclass

from pyrl.checks import at_least


@dataclass(frozen=True)
class Clipped:
    """PPO: V = R inside the bounds, else the bound, without a gradient (arXiv:1707.06347)."""


@dataclass(frozen=True)
class MaskedLogp:
    """V = G logprob, G = min(R, cap) inside the bounds, else 0: a detached weight."""

    cap: float | None = None
    """Largest weight; None: no cap."""

    def __post_init__(self) -> None:
        at_least(0, self, "cap")


@dataclass(frozen=True)
class ClampedLogp:
    """V = G logprob, G = R clipped to the bounds: no token is lost (CISPO, arXiv:2506.13585)."""


@dataclass(frozen=True)
class SoftClipped:
    """PPO whose gradient outside is low or high times the bound, not 0 (arXiv:2509.20712)."""

    low: float = 0.5
    """Share of the gradient below the bounds."""
    high: float = 1.0
    """Share of the gradient above the bounds."""
    scale_value: bool = True
    """The displayed value outside is scaled too."""

    def __post_init__(self) -> None:
        at_least(0, self, "low", "high")


@dataclass(frozen=True)
class Sigmoid:
    """V = 4 / tau sigmoid(tau (R - 1)): no bounds, the gradient fades (SAPO, arXiv:2511.20347)."""

    positive: float = 1.0
    """tau where A > 0."""
    other: float = 1.05
    """tau elsewhere."""

    def __post_init__(self) -> None:
        if not (self.positive > 0 and self.other > 0):
            raise ValueError(f"Sigmoid: expected tau > 0, got {self.positive} and {self.other}")
