"""Factors: detached weights of the policy term, for the engine's mismatch or a token's effect."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import Literal

import torch
from torch import Tensor

from pyrl.checks import at_least, ordered
from pyrl.loss.axis import LossState
from pyrl.loss.columns import LossColumns, Parts, one_part


@dataclass(frozen=True)
class TIS:
    """Truncated importance weight max(floor, min(rho, cap)) of a token or a whole response."""

    cap: float = 2.0
    """Largest weight."""
    level: Literal["token", "sequence"] = "token"
    """Whether a token or a whole response gets a weight."""
    floor: float = 0.0
    """Smallest weight."""
    normalize: bool = False
    """Divide by the mean over tokens, or responses."""

    def __post_init__(self) -> None:
        at_least(0, self, "floor")
        ordered(self, self.floor, self.cap)

    @property
    def needs(self) -> tuple[str, ...]:
        of_responses = () if self.level == "token" else ("offset_N1",)
        return ("old_logprob_T", "rollout_logprob_T", *of_responses)

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        distance_T = columns["old_logprob_T"] - columns["rollout_logprob_T"]
        if self.level == "token":
            return self._factor(distance_T, columns.whole)
        responses = columns.responses
        distance_N = responses.sum(distance_T)
        return responses.spread(self._factor(distance_N, one_part(distance_N, responses.any_P)))

    def _factor(self, distance: Tensor, all_of_them: Parts) -> Tensor:
        factor = distance.clamp(-20, 20).exp().clamp(self.floor, self.cap)
        if not self.normalize:
            return factor
        mean = all_of_them.mean(factor)
        return factor / torch.where(mean > 0, mean, 1.0)


@dataclass(frozen=True)
class IcePop:
    """rho where it lies in [low, high], else 0: such a token has no policy term."""

    low: float = 0.5
    """Smallest rho that counts."""
    high: float = 5.0
    """Largest rho that counts."""
    needs = ("old_logprob_T", "rollout_logprob_T")

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        rho_T = (columns["old_logprob_T"] - columns["rollout_logprob_T"]).clamp(-20, 20).exp()
        return torch.where((rho_T >= self.low) & (rho_T <= self.high), rho_T, 0.0)


@dataclass(frozen=True)
class Steer:
    """Smaller weights for tokens that change the entropy more (arXiv:2510.10150).

    linear: from `most` down to `least` over the batch's range of |Omega|; exp: from 1 to `least`.
    Omega = r A (1 - pi) (log pi + H).
    """

    shape: Literal["linear", "exp"] = "linear"
    """How the weight falls."""
    least: float = 0.8
    """Smallest weight."""
    most: float = 1.2
    """Largest weight, of linear alone."""
    needs = ("logprob_T", "old_logprob_T", "advantage_T", "entropy_T")

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most < inf:
            raise ValueError(f"Steer: expected 0 < least <= most, got {self.least}, {self.most}")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        logprob_T, whole = columns["logprob_T"], columns.whole
        ratio_T = (logprob_T - columns["old_logprob_T"]).clamp(-20, 20).exp()
        pull_T = ratio_T * columns["advantage_T"] * (1 - logprob_T.exp())
        change_T = (pull_T * (logprob_T + columns["entropy_T"])).abs()
        largest = whole.largest(change_T)
        if self.shape == "exp":
            rate = log(self.least) / largest.clamp(min=0.02)
            return (rate * change_T).exp().clamp(self.least, 1.0)
        smallest = whole.smallest(change_T)
        span = largest - smallest
        slope = torch.where(span > 0, (self.most - self.least) / span, 0.0)
        return (self.most - (change_T - smallest) * slope).clamp(self.least, self.most)
