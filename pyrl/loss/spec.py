"""Loss spec: a loss as the plain numbers that the kernels read (csrc/loss/spec.h, TokenSpec)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from pyrl.loss import (
    BinaryKL,
    ClampedLogp,
    Clip,
    EntropyClip,
    ExpertLeak,
    Loss,
    MaskedLogp,
    PositionClip,
    Range,
    Sigmoid,
    SoftClipped,
    TotalVariation,
    Unbounded,
)
from pyrl.loss.terms import slots

TOKEN_COLUMNS = (
    *("logprob", "entropy", "anchor", "trust", "log_ratio", "advantage", "weight"),
    *("low", "high", "dual", "factor", "heat", "addend"),
    *("target_0", "target_1", "target_2", "scale_0", "scale_1", "scale_2"),
)
"""Columns of the per-token part, in the order of the kernels (csrc/loss/spec.h, TokenColumn)."""

_ONE, _TOKEN, _GIVEN = 0.0, 1.0, 2.0
_SCANS = {
    "one": 0,
    "token": 0,
    "seq_geo": 1,
    "seq_prod": 2,
    "cum_prod": 3,
    "cum_geo": 4,
    "min_prefix": 5,
}
_PENALTIES = {"k1": 1, "abs": 2, "k2": 3, "k3": 4, "k1+": 5, "k2+": 3, "k3+": 6, "leaky": 7}


@dataclass
class TokenSpec:
    """The fields of the struct, in its order; neutral values."""

    ratio: float = _TOKEN
    log_ratio_low: float = -20.0
    log_ratio_high: float = 20.0
    pre_clip: float = inf
    bounds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    widen: float = 0.0
    trust: float = 0.0
    surrogate: float = 0.0
    cap: float = inf
    outer_low: float = 0.0
    outer_high: float = 0.0
    outer_value: float = 0.0
    tau_positive: float = 1.0
    tau_other: float = 1.0
    dual: float = inf
    redistribute: float = 0.0
    penalty: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    penalty_coef: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    leak: float = 0.0
    entropy_coef: float = 0.0

    def numbers(self) -> list[float]:
        """One list, as the kernels take it."""
        flat: list[float] = []
        for value in vars(self).values():
            flat.extend(value if isinstance(value, list) else [value])
        return [float(x) for x in flat]


@dataclass(frozen=True)
class Lowered:
    """What the kernels read of a loss, beside columns."""

    spec: list[float]
    scan: int
    """How log R is reduced along a response; 0: it is local to the token."""
    position: list[float]
    """Power and bases of `PositionClip`; power 0: none."""
    anchor: str
    """Column in the ratio's denominator."""
    targets: tuple[str | None, ...]
    """Column that each penalty is measured from."""


def lower(loss: Loss, has_reference: bool) -> Lowered:
    """`has_reference`: report `Loss.kl` also where its coefficient is 0."""
    spec = TokenSpec(entropy_coef=loss.entropy, redistribute=loss.redistribute)
    spec.dual = inf if loss.dual is None else loss.dual
    spec.trust = float(loss.trust == "old")
    if loss.ratio.of == "one":
        spec.ratio = _ONE
    elif loss.ratio.of != "token":
        spec.ratio = _GIVEN
        if loss.ratio.of != "min_prefix":
            spec.log_ratio_low, spec.log_ratio_high = -inf, 10.0
    spec.pre_clip = inf if loss.ratio.pre_clip is None else loss.ratio.pre_clip
    position = _bounds(loss, spec)
    _surrogate(loss, spec)
    targets: list[str | None] = [None, None, None]
    if loss.kl.coef or has_reference:
        targets[0] = "ref_logprob_T"
        spec.penalty[0] = _PENALTIES[loss.kl.estimator]
        spec.penalty_coef[0] = loss.kl.coef
    for slot, penalty in enumerate(slots(loss), 1):
        spec.penalty_coef[slot] = penalty.coef
        if isinstance(penalty, ExpertLeak):
            targets[slot] = "expert_logprob_T"
            spec.penalty[slot] = _PENALTIES["leaky"]
            spec.leak = penalty.slope
        else:
            targets[slot] = f"{penalty.target}_logprob_T"
            spec.penalty[slot] = _PENALTIES[penalty.estimator]
    return Lowered(
        spec=spec.numbers(),
        scan=_SCANS[loss.ratio.of],
        position=position,
        anchor=f"{loss.ratio.to}_logprob_T",
        targets=tuple(targets),
    )


def _bounds(loss: Loss, spec: TokenSpec) -> list[float]:
    position = [0.0, 0.0, 0.0, 0.0]
    match loss.bounds:
        case Unbounded():
            spec.bounds = 0
        case Range(low, high):
            spec.bounds, spec.low, spec.high = 2, low, high
        case PositionClip(low, high, dual, power):
            spec.bounds, position = 2, [power, low, high, dual]
        case TotalVariation(delta):
            spec.bounds, spec.high = 3, delta
        case BinaryKL(delta):
            spec.bounds, spec.high = 4, delta
        case EntropyClip(low, high, alpha):
            spec.bounds, spec.low, spec.high, spec.widen = 1, low, high, alpha
        case Clip(low, high):
            spec.bounds, spec.low, spec.high = 1, low, high
        case _:  # radii per token
            spec.bounds = 1
    return position


def _surrogate(loss: Loss, spec: TokenSpec) -> None:
    match loss.surrogate:
        case MaskedLogp(cap):
            spec.surrogate, spec.cap = 1, inf if cap is None else cap
        case ClampedLogp():
            spec.surrogate = 2
        case SoftClipped(low, high, scale_value):
            spec.surrogate = 3
            spec.outer_low, spec.outer_high, spec.outer_value = low, high, float(scale_value)
        case Sigmoid(positive, other):
            spec.surrogate, spec.tau_positive, spec.tau_other = 4, positive, other
