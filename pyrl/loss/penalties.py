"""Penalties: what is added to a policy loss, from the distance to another policy or an entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyrl.checks import finite
from pyrl.loss.aggregate import Aggregate
from pyrl.loss.axis import Select


@dataclass(frozen=True)
class KL:
    """A penalty towards the frozen initial model; coefficient 0 needs no such model."""

    coef: float = 0.001
    estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k2+", "k3+"] = "k3"
    """Of D = logprob - ref_logprob: D, |D|, D^2 / 2, exp(-D) + D - 1 (arXiv:2402.03300 uses k3);
    with "+" the gradient is k2's, which is that of the reverse KL on policy."""

    def __post_init__(self) -> None:
        finite(self, "coef")


@dataclass(frozen=True)
class Penalty:
    """coef times an estimate of the distance to a target policy, on the selected tokens."""

    coef: float = 1.0
    estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k2+", "k3+"] = "k3"
    """As in `KL`."""
    target: Literal["ref", "old", "proxy"] = "ref"
    select: Select | None = None
    aggregate: Aggregate | None = None
    """None: the loss's."""

    def __post_init__(self) -> None:
        finite(self, "coef")


@dataclass(frozen=True)
class ExpertLeak:
    """CalibRL: coef |A| LeakyReLU(s (logprob - expert_logprob)) (arXiv:2602.20197).

    s = -1 where the reward exceeds `passed`, else 1: pushes passing responses up to an expert's
    log-probability at the same position, and failing ones down to it; beyond, `slope` of that.
    """

    coef: float = 0.1
    slope: float = 0.5
    passed: float = 0.1
    aggregate: Aggregate | None = None


@dataclass(frozen=True)
class EntropySmoothing:
    """EPO: adds coef times height where the entropy leaves a band about its history.

    Without a gradient, as released: it moves the reported loss only (arXiv:2509.22576). Without a
    history every token counts as outside, with height 1.
    """

    coef: float = 0.001
    height: float = 0.1
    low: float = 0.8
    high: float = 1.2
    level: Literal["token", "sequence"] = "token"

    def epoch_weight(self, epoch: float | None) -> float:
        """Of the released schedule over 150 epochs; 1 without an epoch."""
        if epoch is None:
            return 1.0
        if epoch <= 75:
            return float(1 - 0.2 * (1 - np.exp(-2 * epoch / 75)))
        return float(0.8 * np.exp(-3 * (epoch - 75) / 75))


@dataclass(frozen=True)
class NucleusAnchor:
    """SIREN: coef (mean nucleus entropy of each response's peaks - its first value)^2.

    Peaks: tokens above the response's quantile (arXiv:2509.25133). The nucleus, whose mass is .8
    there, is the business of `token_stats`.
    """

    coef: float = 0.005
    quantile: float = 0.8
