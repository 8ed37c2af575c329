"""Loss: the choices of a policy loss. `policy_loss` computes; these say with which numbers.

Each choice is an axis with a neutral value, and a method names what differs. In their order: the
advantage is reshaped, the ratio R of policies is bounded, a surrogate of R and the advantage is
capped, multiplied by detached factors, regularised and aggregated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl._core import LossColumns
from pyrl.checks import at_least, check_axes, finite, ordered
from pyrl.loss.aggregate import Aggregate, TokenMean
from pyrl.pack import TokenBatch


@dataclass(frozen=True)
class Ratio:
    """R of the current policy to another one; its gradient goes through the token's own share."""

    of: Literal["one", "token", "seq_geo", "seq_prod", "cum_prod", "cum_geo", "min_prefix"] = (
        "token"
    )
    """1; the token's own; the response's geometric mean (GSPO) or product; the same of the prefix
    (CTPO); the token's times the smallest before it (MinPRO)."""
    to: Literal["old", "rollout"] = "old"
    """The policy before the update, or the one that the rollout engine reported."""
    pre_clip: float | None = None
    """GMPO: largest |log R| of a token, on the side to which its advantage pushes, before tokens
    are reduced to a response's ratio; beyond it a token has no gradient (arXiv:2507.20673)."""

    def __post_init__(self) -> None:
        if self.pre_clip is None:
            return
        if self.of in ("one", "token") or not self.pre_clip > 0:
            got = f"{self.pre_clip} of {self.of}"
            raise ValueError(f"Ratio.pre_clip: expected > 0, and a ratio of responses, got {got}")


# -- bounds: how far a ratio may move before its gradient is cut --


class Bounds(Protocol):
    """Bounds of one's own, in Python."""

    def __call__(self, batch: TokenBatch) -> tuple[NDArray[Any], NDArray[Any]]:
        """Clip radii [T]: a ratio has a gradient between 1 - low and 1 + high."""


@dataclass(frozen=True)
class Clip:
    """PPO's interval [1 - low, 1 + high] (arXiv:1707.06347; high > low: arXiv:2503.14476)."""

    low: float = 0.2
    high: float = 0.2

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

    def __call__(self, batch: TokenBatch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        radius_T = self.radius(batch)[batch.leaf_T]
        return radius_T, radius_T


@dataclass(frozen=True)
class Unbounded:
    """No bounds."""


@dataclass(frozen=True)
class Range:
    """low <= R <= high."""

    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)


@dataclass(frozen=True)
class PositionClip:
    """CTPO: [exp(-low t^power), exp(high t^power)] at the t-th token of a response that takes part.

    A < 0 is capped at exp(dual t^power). arXiv:2605.07331; power -0.5 with `Ratio("cum_geo")`.
    """

    low: float = 0.025
    high: float = 0.05
    dual: float = 0.05
    power: float = 0.5

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
    high: float = 0.2
    alpha: float = 1.0

    def __post_init__(self) -> None:
        at_least(0, self, "low", "high", "alpha")


@dataclass(frozen=True)
class TotalVariation:
    """Cuts A > 0 where pi - pi_old > delta, and A < 0 where it is < -delta (DPPO)."""

    delta: float = 0.15

    def __post_init__(self) -> None:
        ordered(self, 0.0, self.delta)


@dataclass(frozen=True)
class BinaryKL:
    """As `TotalVariation`, by the KL divergence of {this token, any other} (DPPO)."""

    delta: float = 0.05

    def __post_init__(self) -> None:
        ordered(self, 0.0, self.delta)


# -- surrogates: value V and gradient G of a token, loss = -A V, d loss / d logprob = -A G --


@dataclass(frozen=True)
class Clipped:
    """PPO: V = R inside the bounds, else the bound, without a gradient (arXiv:1707.06347)."""


@dataclass(frozen=True)
class MaskedLogp:
    """V = G logprob, G = min(R, cap) inside the bounds, else 0: a detached weight."""

    cap: float | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "cap")


@dataclass(frozen=True)
class ClampedLogp:
    """V = G logprob, G = R clipped to the bounds: no token is lost (CISPO, arXiv:2506.13585)."""


@dataclass(frozen=True)
class SoftClipped:
    """PPO whose gradient outside is low or high times the bound, not 0 (arXiv:2509.20712)."""

    low: float = 0.5
    high: float = 1.0
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

    def __post_init__(self) -> None:
        if not (self.positive > 0 and self.other > 0):
            raise ValueError(f"Sigmoid: expected tau > 0, got {self.positive} and {self.other}")


@dataclass(frozen=True)
class KL:
    """A penalty towards the frozen initial model; coefficient 0 needs no such model."""

    coef: float = 0.001
    estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k2+", "k3+"] = "k3"
    """Of D = logprob - ref_logprob: D, |D|, D^2 / 2, exp(-D) + D - 1 (arXiv:2402.03300 uses k3);
    with "+" the gradient is k2's, which is that of the reverse KL on policy."""

    def __post_init__(self) -> None:
        finite(self, "coef")


# -- the other axes; pyrl/loss_axes.py has their values --


@dataclass(frozen=True)
class LossState:
    """What an axis takes from the run, beside the tokens."""

    seed: int = 0
    """Of random choices; a token's number depends on it and on its index alone."""
    progress: float = 0.0
    """Share of the run that is done, in [0, 1]."""
    entropy: float | None = None
    """Mean entropy measured over earlier updates (nats); None: not measured."""
    nucleus_entropy: float | None = None
    """The aggregate that `NucleusAnchor` holds on to: that of the first step (nats)."""
    epoch: float | None = None
    radii: tuple[float, float] = (np.inf, np.inf)
    """Of `Loss.bounds`, set by `loss_terms`."""


class Reshape(Protocol):
    """Other advantages for the tokens."""

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Advantages [T]."""


class Factor(Protocol):
    """A detached factor of the policy term, clipped as it is."""

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Factors [T], an array of its own: it is written to."""


class Keep(Protocol):
    """A choice of the tokens whose policy term counts."""

    @property
    def shrink(self) -> bool:
        """A dropped token leaves the response: denominators, scans and penalties too."""

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """True [T] where the token stays."""


class Select(Protocol):
    """The tokens that a penalty is put on."""

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """True [T] where it is."""


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


@dataclass(frozen=True)
class Loss:
    """The axes of a policy loss. The defaults are PPO with a dual clip and a KL penalty."""

    bounds: (
        Bounds | Clip | Unbounded | Range | PositionClip | EntropyClip | TotalVariation | BinaryKL
    ) = field(default_factory=Clip)
    dual: float | None = 3.0
    """Cap on the ratio of tokens with a negative advantage (arXiv:1912.09729); None is no cap."""
    kl: KL = field(default_factory=KL)
    entropy: float = 0.0
    """Coefficient of the entropy bonus."""
    aggregate: Aggregate = field(default_factory=TokenMean)
    ratio: Ratio = field(default_factory=Ratio)
    trust: Literal["ratio", "old"] = "ratio"
    """What the bounds test: the ratio, or the token's own ratio to the old policy."""
    surrogate: Clipped | MaskedLogp | ClampedLogp | SoftClipped | Sigmoid = field(
        default_factory=Clipped
    )
    reshape: tuple[Reshape, ...] = ()
    """Of the advantages, in order."""
    redistribute: float = 0.0
    """HAPO: A (1 + redistribute heat), for positive heat outside half the bounds, for negative heat
    inside (`EntropyClip` says what heat is)."""
    behaviour: Factor | None = None
    """Correction of the rollout engine's mismatch with the old policy."""
    weight: Factor | None = None
    keep: tuple[Keep, ...] = ()
    """A token stays if all of them keep it."""
    penalties: tuple[Penalty | ExpertLeak | EntropySmoothing | NucleusAnchor, ...] = ()

    def __post_init__(self) -> None:
        check_axes(self)
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"loss.dual: expected > 1, got {self.dual}")
        if self.ratio.to == "rollout" and self.behaviour is not None:
            raise ValueError(
                "loss.behaviour: expected None where Ratio.to is 'rollout', which it would count "
                f"twice, got {self.behaviour}"
            )

    @property
    def has_reference(self) -> bool:
        """A penalty is measured from the frozen initial model."""
        targets = [p.target for p in self.penalties if isinstance(p, Penalty)]
        return self.kl.coef != 0 or "ref" in targets

    @property
    def needs_advantage(self) -> bool:
        """A token without an advantage has no gradient."""
        return not (self.kl.coef or self.entropy or self.penalties)
