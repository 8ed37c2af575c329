"""Loss terms: what a token's loss takes from the whole mini-batch, computed once per update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl import _core
from pyrl.loss import (
    BinaryKL,
    Clip,
    EntropyClip,
    EntropySmoothing,
    ExpertLeak,
    Loss,
    LossState,
    NucleusAnchor,
    Penalty,
    PositionClip,
    Range,
    TotalVariation,
    Unbounded,
)
from pyrl.loss.aggregate import Aggregate, TokenMean, TokenSum
from pyrl.pack import gather, offsets

Values = NDArray[np.float32] | NDArray[np.float64]

LOWERED = (Clip, Unbounded, Range, PositionClip, EntropyClip, TotalVariation, BinaryKL)
"""Bounds that the C++ side knows; others are columns of radii."""
SLOTS = 3
"""Penalties that a loss may have, the first being `Loss.kl`."""


@dataclass(frozen=True)
class Terms:
    """Columns of T tokens in N responses; None where the loss does not use them."""

    offset_N1: NDArray[np.int64]
    """Where each response's tokens begin, and the end of the last."""
    mask_T: NDArray[np.bool_] | None
    """The tokens that take part; None: all."""
    weight_N: NDArray[np.float64]
    """In the sum over tokens, for each that takes part."""
    advantage_T: Values
    low_T: Values | None = None
    """Clip radii."""
    high_T: Values | None = None
    factor_T: NDArray[np.float64] | None = None
    heat_T: NDArray[np.float64] | None = None
    addend_T: NDArray[np.float64] | None = None
    scale_0_T: NDArray[np.float64] | None = None
    scale_1_T: NDArray[np.float64] | None = None
    scale_2_T: NDArray[np.float64] | None = None
    nucleus_T: NDArray[np.float64] | None = None
    """d loss / d nucleus entropy."""
    nucleus_gap: NDArray[np.float64] | None = None
    """Between the nucleus entropy of peaks and what it is held to (nats). Without an axis, not a
    number: torch.compile would compile anew for each."""

    @property
    def weight_T(self) -> NDArray[np.float64]:
        weight_T = np.repeat(self.weight_N, np.diff(self.offset_N1))
        return weight_T if self.mask_T is None else np.where(self.mask_T, weight_T, 0.0)

    def take(self, leaf_N: NDArray[np.int64]) -> Terms:
        """Those of these responses, in the given order."""
        row_T = gather(self.offset_N1, leaf_N)
        columns = {f.name: vars(self)[f.name] for f in fields(self) if f.name.endswith("_T")}
        taken: dict[str, Any] = {n: None if v is None else v[row_T] for n, v in columns.items()}
        return replace(
            self,
            offset_N1=offsets(np.diff(self.offset_N1)[leaf_N]),
            weight_N=self.weight_N[leaf_N],
            **taken,
        )


def loss_terms(
    loss: Loss,
    columns: Mapping[str, Values],
    *,
    mask_T: NDArray[np.bool_] | None = None,
    offset_N1: NDArray[np.int64] | None = None,
    group_N: NDArray[np.int64] | None = None,
    state: LossState | None = None,
) -> Terms:
    """Reduce the mini-batch's columns, all of one length, by the loss's axes.

    `columns` by name: "advantage_T", and what the axes name. `logprob_T` and `entropy_T` may be of
    the policy before the update, so that no pass of the update depends on another. Sums run in
    float64 in token order; ties go to the lower index.

    Raises ValueError: a column that an axis needs is missing, or a column or what an axis returns
    has another length or dtype.
    """
    if "advantage_T" not in columns:
        raise ValueError("loss_terms: needs the column advantage_T")
    for name, values, dtype in (
        ("mask_T", mask_T, np.bool_),
        ("offset_N1", offset_N1, np.int64),
        ("group_N", group_N, np.int64),
    ):
        if values is not None and (values.dtype != dtype or values.ndim != 1):
            raise ValueError(
                f"{name}: expected {np.dtype(dtype)} with one axis, got "
                f"{values.dtype}{list(values.shape)}"
            )
    state = replace(state or LossState(), radii=_radii(loss))
    tokens = len(columns["advantage_T"])
    if offset_N1 is None:
        if not isinstance(loss.aggregate, TokenMean | TokenSum):
            name = type(loss.aggregate).__name__
            raise ValueError(f"loss.aggregate: {name} needs the column offset_N1")
        whole_N1 = np.array([0, tokens], np.int64)
    else:
        whole_N1 = offset_N1
    rest = {k: v for k, v in columns.items() if k not in ("clip_low_T", "clip_high_T")}
    core = _core.loss.LossColumns(tokens, rest, mask_T, offset_N1, group_N)
    for reshape in loss.reshape:
        rest = rest | {"advantage_T": reshape(core, state)}
        core = _core.loss.LossColumns(tokens, rest, mask_T, offset_N1, group_N)
    factor_T, kept_T = _factor(loss, core, state, mask_T, tokens)
    tokens_N = _core.loss.count_tokens(tokens, kept_T, whole_N1)
    weight_N = loss.aggregate(tokens_N)
    heat = isinstance(loss.bounds, EntropyClip) or loss.redistribute != 0
    low_T, high_T = _radius_columns(loss, columns)
    terms = Terms(
        offset_N1=whole_N1,
        mask_T=kept_T,
        weight_N=weight_N,
        advantage_T=rest["advantage_T"],
        low_T=low_T,
        high_T=high_T,
        factor_T=factor_T,
        heat_T=core.entropy_heat() if heat else None,
    )
    return replace(terms, **_penalty_terms(loss, core, state, terms, tokens_N))


def _radii(loss: Loss) -> tuple[float, float]:
    bounds = loss.bounds
    return (bounds.low, bounds.high) if isinstance(bounds, Clip) else (np.inf, np.inf)


def _radius_columns(
    loss: Loss, columns: Mapping[str, Values]
) -> tuple[Values | None, Values | None]:
    if isinstance(loss.bounds, LOWERED):
        return None, None
    for name in ("clip_low_T", "clip_high_T"):
        if name not in columns:
            bounds = type(loss.bounds).__name__
            raise ValueError(f"loss.bounds: {bounds} needs the column {name}, as it returns them")
    return columns["clip_low_T"], columns["clip_high_T"]


def _factor(
    loss: Loss,
    core: _core.loss.LossColumns,
    state: LossState,
    mask_T: NDArray[np.bool_] | None,
    tokens: int,
) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_] | None]:
    """The product of factors, 0 where a token is dropped, and the mask without those that leave."""
    factor_T: NDArray[np.float64] | None = None
    for factor in (loss.behaviour, loss.weight):
        if factor is not None:
            value_T = _of_tokens(factor, factor(core, state), tokens, np.float64)
            factor_T = value_T if factor_T is None else np.multiply(factor_T, value_T, factor_T)
    kept_T = mask_T
    for keep in loss.keep:
        stays_T = _of_tokens(keep, keep(core, state), tokens, np.bool_)
        if keep.shrink:
            kept_T = stays_T if kept_T is None else kept_T & stays_T
        elif factor_T is None:
            factor_T = stays_T.astype(np.float64)
        else:
            np.copyto(factor_T, 0.0, where=~stays_T)
    return factor_T, kept_T


def _of_tokens(axis: object, values: NDArray[Any], tokens: int, dtype: type) -> NDArray[Any]:
    """What an axis returned; ValueError unless it is one value of this type for each token."""
    if values.dtype != dtype or values.shape != (tokens,):
        raise ValueError(
            f"{type(axis).__name__}: expected it to return {np.dtype(dtype)}[{tokens}], got "
            f"{values.dtype}{list(values.shape)}"
        )
    return values


def _penalty_terms(
    loss: Loss,
    core: _core.loss.LossColumns,
    state: LossState,
    terms: Terms,
    tokens_N: NDArray[np.int64],
) -> dict[str, Any]:
    result: dict[str, Any] = {}

    def scaled(value_T: NDArray[Any] | None, aggregate: Aggregate | None) -> NDArray[Any] | None:
        if aggregate is None:
            return None if value_T is None else value_T.astype(np.float64, copy=False)
        ratio_N = np.divide(
            aggregate(tokens_N),
            terms.weight_N,
            out=np.zeros(len(tokens_N)),
            where=terms.weight_N != 0,
        )
        ratio_T = np.repeat(ratio_N, np.diff(terms.offset_N1))
        return ratio_T if value_T is None else ratio_T * value_T

    for slot, penalty in enumerate(slots(loss), 1):
        value_T: NDArray[Any] | None = None
        if isinstance(penalty, ExpertLeak):
            value_T = core.expert_scale(penalty.passed)
        elif penalty.select is not None:
            value_T = penalty.select(core, state)
            _of_tokens(penalty.select, value_T, len(terms.advantage_T), np.bool_)
        result[f"scale_{slot}_T"] = scaled(value_T, penalty.aggregate)
    for other in loss.penalties:
        if isinstance(other, EntropySmoothing):
            addend_T = _smoothing(other, core, state)
            result["addend_T"] = result.get("addend_T", 0.0) + addend_T
        elif isinstance(other, NucleusAnchor):
            if state.nucleus_entropy is None:
                raise ValueError("NucleusAnchor: needs state.nucleus_entropy, what it holds on to")
            mean, peak_T = core.nucleus_peaks(other.quantile)
            gap = mean - state.nucleus_entropy
            result |= {"nucleus_T": 2 * other.coef * gap * peak_T, "nucleus_gap": np.array(gap)}
    return result


def _smoothing(
    axis: EntropySmoothing, core: _core.loss.LossColumns, state: LossState
) -> NDArray[np.float64]:
    level = 0 if axis.level == "token" else 1
    weight = axis.coef * axis.epoch_weight(state.epoch)
    if state.entropy is None:  # no history: outside
        return core.entropy_band(level, np.inf, -np.inf, weight)
    low, high = axis.low * state.entropy, axis.high * state.entropy
    return core.entropy_band(level, low, high, weight * axis.height)


def slots(loss: Loss) -> list[Penalty | ExpertLeak]:
    """The penalties on a log-probability, beside `loss.kl`."""
    found = [p for p in loss.penalties if isinstance(p, Penalty | ExpertLeak)]
    if len(found) >= SLOTS:
        raise ValueError(f"loss.penalties: expected at most {SLOTS - 1} of them, got {len(found)}")
    return found
