"""Loss spec: a loss as the plain numbers that the kernels read (csrc/loss/spec.h)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import IntEnum
from math import inf
from typing import Any, TypeVar

from pyrl import _core
from pyrl._core.loss import BoundsKind, PenaltyKind, RatioKind, Scan, SurrogateKind, TokenColumn
from pyrl.loss.bounds import (
    BinaryKL,
    Clip,
    EntropyClip,
    PositionClip,
    Range,
    TotalVariation,
    Unbounded,
)
from pyrl.loss.loss import Loss
from pyrl.loss.penalties import ExpertLeak
from pyrl.loss.surrogates import ClampedLogp, MaskedLogp, Sigmoid, SoftClipped
from pyrl.loss.terms import slots

TOKEN_COLUMNS = tuple(TokenColumn.__members__)
"""Columns of the per-token part, in the order of the kernels."""

_SCANS = {"one": Scan.none, "token": Scan.none} | {
    of: Scan[of] for of in ("seq_geo", "seq_prod", "cum_prod", "cum_geo", "min_prefix")
}
_PENALTIES = {name: PenaltyKind[name] for name in ("k1", "abs", "k2", "k3")} | {
    "k1+": PenaltyKind.k1_plus,
    "k2+": PenaltyKind.k2,
    "k3+": PenaltyKind.k3_plus,
}
_NO_PENALTIES = (PenaltyKind.none, PenaltyKind.none, PenaltyKind.none)


@dataclass
class TokenSpec:
    """The loss of a token; neutral values. csrc/loss/spec.h says what the fields mean."""

    ratio: RatioKind = RatioKind.token
    log_ratio_low: float = -20.0
    log_ratio_high: float = 20.0
    pre_clip: float = inf
    bounds: BoundsKind = BoundsKind.none
    low: float = 0.0
    high: float = 0.0
    widen: float = 0.0
    trust: bool = False
    surrogate: SurrogateKind = SurrogateKind.ppo
    cap: float = inf
    outer_low: float = 0.0
    outer_high: float = 0.0
    outer_value: bool = False
    tau_positive: float = 1.0
    tau_other: float = 1.0
    dual: float = inf
    redistribute: float = 0.0
    penalty: tuple[PenaltyKind, PenaltyKind, PenaltyKind] = _NO_PENALTIES
    penalty_coef: tuple[float, float, float] = (0.0, 0.0, 0.0)
    leak: float = 0.0
    entropy_coef: float = 0.0


@dataclass
class PositionBounds:
    """Bases and power of `PositionClip`; power 0: none."""

    power: float = 0.0
    low: float = 0.0
    high: float = 0.0
    dual: float = 0.0


@dataclass
class LossSpec:
    """What the kernels read of a loss, beside columns."""

    token: TokenSpec = field(default_factory=TokenSpec)
    scan: Scan = Scan.none
    """How log R is reduced along a response; none: it is local to the token."""
    position: PositionBounds = field(default_factory=PositionBounds)

    def numbers(self) -> list[float]:
        """The fields one after the other, as the schema of an op of torch.library takes them."""
        return _packed(self)

    @staticmethod
    def of(numbers: Sequence[float]) -> LossSpec:
        """The spec whose `numbers` these are."""
        return _unpacked(LossSpec(), iter(numbers))

    def kernel_arguments(self) -> dict[str, Any]:
        """The core's records, by the names of the kernels' arguments."""
        return {
            "spec": _filled(_core.loss.TokenSpec(), self.token),
            "scan": self.scan,
            "position": _filled(_core.loss.PositionBounds(), self.position),
        }


_Record = TypeVar("_Record")


def _packed(record: object) -> list[float]:
    numbers: list[float] = []
    for value in vars(record).values():
        if is_dataclass(value):
            numbers += _packed(value)
        elif isinstance(value, tuple):
            numbers += [_number(part) for part in value]
        else:
            numbers.append(_number(value))
    return numbers


def _number(value: float | IntEnum) -> float:
    return float(value.value if isinstance(value, IntEnum) else value)


def _unpacked(neutral: _Record, numbers: Iterator[float]) -> _Record:
    """A record of the type of this one, each of its values of the type of the neutral one."""

    def unpacked(value: Any) -> Any:
        if is_dataclass(value):
            return _unpacked(value, numbers)
        if isinstance(value, tuple):
            return tuple(unpacked(part) for part in value)
        return type(value)(next(numbers))

    return type(neutral)(**{name: unpacked(value) for name, value in vars(neutral).items()})


def _filled(core: _Record, record: object) -> _Record:
    """The core's record with the values of ours, by name."""
    for name, value in vars(record).items():
        setattr(core, name, value)
    return core


@dataclass(frozen=True)
class Lowered:
    """A loss for the kernels, and where its columns come from."""

    spec: LossSpec
    sources: dict[str, str]
    """The given column that a column of the kernels is."""


def lower(loss: Loss, has_reference: bool) -> Lowered:
    """`has_reference`: report `Loss.kl` also where its coefficient is 0."""
    spec = TokenSpec(entropy_coef=loss.entropy, redistribute=loss.redistribute)
    spec.dual = inf if loss.dual is None else loss.dual
    spec.trust = loss.trust == "old"
    if loss.ratio.of == "one":
        spec.ratio = RatioKind.one
    elif loss.ratio.of != "token":
        spec.ratio = RatioKind.given
        if loss.ratio.of != "min_prefix":
            spec.log_ratio_low, spec.log_ratio_high = -inf, 10.0
    spec.pre_clip = inf if loss.ratio.pre_clip is None else loss.ratio.pre_clip
    position = _bounds(loss, spec)
    _surrogate(loss, spec)
    sources = _penalties(loss, spec, has_reference)
    if loss.reads_anchor:
        sources["anchor"] = loss.ratio.anchor
    if spec.trust:
        sources["trust"] = "old_logprob_T"
    return Lowered(LossSpec(spec, _SCANS[loss.ratio.of], position), sources)


def _penalties(loss: Loss, spec: TokenSpec, has_reference: bool) -> dict[str, str]:
    """Set the penalties; the column that each is measured from."""
    kinds, coefs, sources = list(_NO_PENALTIES), [0.0, 0.0, 0.0], {}
    if loss.kl.coef or has_reference:
        kinds[0], coefs[0] = _PENALTIES[loss.kl.estimator], loss.kl.coef
        sources["target_0"] = "ref_logprob_T"
    for slot, penalty in enumerate(slots(loss), 1):
        coefs[slot], sources[f"target_{slot}"] = penalty.coef, penalty.column
        if isinstance(penalty, ExpertLeak):
            kinds[slot], spec.leak = PenaltyKind.leaky, penalty.slope
        else:
            kinds[slot] = _PENALTIES[penalty.estimator]
    spec.penalty = (kinds[0], kinds[1], kinds[2])
    spec.penalty_coef = (coefs[0], coefs[1], coefs[2])
    return sources


def _bounds(loss: Loss, spec: TokenSpec) -> PositionBounds:
    match loss.bounds:
        case Unbounded():
            spec.bounds = BoundsKind.none
        case Range(low, high):
            spec.bounds, spec.low, spec.high = BoundsKind.range, low, high
        case PositionClip(low, high, dual, power):
            spec.bounds = BoundsKind.range
            return PositionBounds(power, low, high, dual)
        case TotalVariation(delta):
            spec.bounds, spec.high = BoundsKind.total_variation, delta
        case BinaryKL(delta):
            spec.bounds, spec.high = BoundsKind.binary_kl, delta
        case EntropyClip(low, high, alpha):
            spec.bounds, spec.low, spec.high = BoundsKind.radius, low, high
            spec.widen = alpha
        case Clip(low, high):
            spec.bounds, spec.low, spec.high = BoundsKind.radius, low, high
        case _:  # radii per token
            spec.bounds = BoundsKind.radius
    return PositionBounds()


def _surrogate(loss: Loss, spec: TokenSpec) -> None:
    match loss.surrogate:
        case MaskedLogp(cap):
            spec.surrogate, spec.cap = SurrogateKind.mask_logp, inf if cap is None else cap
        case ClampedLogp():
            spec.surrogate = SurrogateKind.clamp_logp
        case SoftClipped(low, high, scale_value):
            spec.surrogate = SurrogateKind.gppo
            spec.outer_low, spec.outer_high, spec.outer_value = low, high, scale_value
        case Sigmoid(positive, other):
            spec.surrogate = SurrogateKind.sigmoid
            spec.tau_positive, spec.tau_other = positive, other
