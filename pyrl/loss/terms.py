"""Loss terms: what a token's loss takes from the whole mini-batch, computed once per update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl.checks import described
from pyrl.logits.kernels import check_tensors
from pyrl.loss.aggregate import Aggregate
from pyrl.loss.axis import LossState, check_needs
from pyrl.loss.bounds import Clip, entropy_heat, has_radii
from pyrl.loss.columns import Columns, LossColumns, Parts, checked, checked_offsets, kind
from pyrl.loss.loss import Loss, check_loss
from pyrl.loss.penalties import EntropySmoothing, OfLogprob, OfNucleus, Penalty
from pyrl.pack import gather, offsets

SLOTS = 3
"""Penalties that a loss may have, the first being `Loss.kl`."""

NAMES = frozenset({"logprob_T", "entropy_T", *Columns.__annotations__})


@dataclass(frozen=True)
class Terms:
    """Columns of T tokens in N responses; None where the loss does not use them.

    [T] lies on the device of the mini-batch's columns, [N] on the CPU.
    """

    offset_N1: Tensor
    """Where each response's tokens begin, and the end of the last."""
    mask_T: Tensor | None
    """The tokens that take part; None: all."""
    weight_N: Tensor
    """In the sum over tokens, for each that takes part."""
    advantage_T: Tensor
    low_T: Tensor | None = None
    """Clip radii."""
    high_T: Tensor | None = None
    factor_T: Tensor | None = None
    heat_T: Tensor | None = None
    addend_T: Tensor | None = None
    scale_0_T: Tensor | None = None
    scale_1_T: Tensor | None = None
    scale_2_T: Tensor | None = None
    nucleus_T: Tensor | None = None
    """d loss / d nucleus entropy."""
    nucleus_gap: Tensor | None = None
    """Between the nucleus entropy of peaks and what it is held to (nats)."""

    @property
    def weight_T(self) -> Tensor:
        tokens, device = len(self.advantage_T), self.advantage_T.device
        length_N = self.offset_N1.diff()
        weight_T = self.weight_N.repeat_interleave(length_N, output_size=tokens).to(device)
        return weight_T if self.mask_T is None else torch.where(self.mask_T, weight_T, 0.0)

    def take(self, leaf_N: NDArray[np.int64]) -> Terms:
        """The terms of these responses, in the given order."""
        offset_N1 = self.offset_N1.numpy()
        row_T = torch.from_numpy(gather(offset_N1, leaf_N)).to(self.advantage_T.device)
        columns = {f.name: vars(self)[f.name] for f in fields(self) if f.name.endswith("_T")}
        taken: dict[str, Any] = {n: None if v is None else v[row_T] for n, v in columns.items()}
        return replace(
            self,
            offset_N1=torch.from_numpy(offsets(np.diff(offset_N1)[leaf_N])),
            weight_N=self.weight_N[torch.from_numpy(leaf_N)],
            **taken,
        )


def loss_terms(
    loss: Loss,
    columns: Mapping[str, Tensor],
    *,
    mask_T: Tensor | None = None,
    offset_N1: Tensor | None = None,
    group_N: Tensor | None = None,
    state: LossState | None = None,
) -> Terms:
    """Reduce the mini-batch's columns, all of one length and device, by the loss's axes.

    `columns` by name: "advantage_T", and what the axes name. `logprob_T` and `entropy_T` may be of
    the policy before the update, so that no pass of the update depends on another. Sums run in
    float64 in token order; ties go to the lower index.

    Raises ValueError: a column that an axis needs is missing, or a column or what an axis returns
    has another length or dtype.
    """
    check_loss(loss)
    check_tensors(**columns)
    if "advantage_T" not in columns:
        raise ValueError("loss_terms: needs the column advantage_T")
    for name, column in columns.items():
        if name not in NAMES:
            raise ValueError(f"columns: there is no {name}")
        if column.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: expected float32 or float64, got {kind(column)}")
        if column.shape != (len(columns["advantage_T"]),):
            expected = f"{len(columns['advantage_T'])} entries"
            raise ValueError(f"{name}: expected {expected}, got {kind(column)}")
    return reduced(loss, columns, mask_T, offset_N1, group_N, state)


def reduced(
    loss: Loss,
    columns: Mapping[str, Tensor],
    mask_T: Tensor | None,
    offset_N1: Tensor | None,
    group_N: Tensor | None,
    state: LossState | None,
) -> Terms:
    """`loss_terms` of columns that are checked."""
    if not isinstance(state, LossState | None):
        raise TypeError(f"state: expected a LossState or None, got {described(state)}")
    state = replace(state or LossState(), radii=_radii(loss))
    responses = {"mask_T": mask_T, "offset_N1": offset_N1, "group_N": group_N}
    there = [name for name, tensor in responses.items() if tensor is not None]
    check_needs(loss.terms_needs, {*columns, *there, *state.known})
    given, whole_N1 = _held(columns, mask_T, offset_N1, group_N)
    for reshape in loss.reshape:
        given = replace(given, given={**given.given, "advantage_T": reshape(given, state)})
    factor_T, kept_T = _factor(loss, given, state)
    tokens_N = _tokens(whole_N1, kept_T)
    weight_N = loss.aggregate(tokens_N)
    radii = has_radii(loss.bounds)
    return Terms(
        offset_N1=whole_N1,
        mask_T=kept_T,
        weight_N=weight_N,
        advantage_T=given.given["advantage_T"].detach(),
        low_T=given.given["clip_low_T"].detach() if radii else None,
        high_T=given.given["clip_high_T"].detach() if radii else None,
        factor_T=factor_T,
        heat_T=entropy_heat(given) if loss.reads_heat else None,
        **_penalty_terms(loss, given, state, _Responses(whole_N1, tokens_N, weight_N)),
    )


def _radii(loss: Loss) -> tuple[float, float]:
    bounds = loss.bounds
    return (bounds.low, bounds.high) if isinstance(bounds, Clip) else (inf, inf)


def _held(
    columns: Mapping[str, Tensor],
    mask_T: Tensor | None,
    offset_N1: Tensor | None,
    group_N: Tensor | None,
) -> tuple[LossColumns, Tensor]:
    """What the axes read, and the offsets on the CPU; without offsets, of all as one response."""
    tokens, device = len(columns["advantage_T"]), columns["advantage_T"].device
    _check_kind("mask_T", mask_T, torch.bool)
    _check_kind("offset_N1", offset_N1, torch.int64)
    _check_kind("group_N", group_N, torch.int64)
    if mask_T is not None:
        if len(mask_T) != tokens:
            raise ValueError(f"mask_T: expected {tokens} entries, got {len(mask_T)}")
        mask_T = mask_T.to(device)
    if offset_N1 is None:
        whole_N1 = torch.tensor([0, tokens])
    else:
        whole_N1 = checked_offsets(offset_N1, tokens)
        offset_N1 = whole_N1.to(device)
    if group_N is not None:
        group_N = _checked_groups(group_N.to(device), len(whole_N1) - 1)
    return LossColumns(columns, mask_T, offset_N1, group_N), whole_N1


def _check_kind(name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
    if tensor is None:
        return
    check_tensors(**{name: tensor})
    if tensor.dtype != dtype or tensor.ndim != 1:
        expected = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {expected} with one axis, got {kind(tensor)}")


def _checked_groups(group_N: Tensor, responses: int) -> Tensor:
    if len(group_N) != responses:
        raise ValueError(f"group_N: expected {responses} entries, got {len(group_N)}")
    return checked(
        group_N,
        group_N != group_N.clamp(0, responses - 1),
        f"group_N: expected numbers from 0 below {responses} (one per response), got {{}} at {{}}",
    )


def _factor(
    loss: Loss, columns: LossColumns, state: LossState
) -> tuple[Tensor | None, Tensor | None]:
    """The product of factors, 0 where a token is dropped, and the mask without those that leave."""
    factor_T: Tensor | None = None
    for factor in (loss.behaviour, loss.weight):
        if factor is not None:
            value_T = _of_tokens(factor, factor(columns, state), columns.tokens, torch.float64)
            factor_T = value_T if factor_T is None else factor_T * value_T
    kept_T = columns.used_T
    for keep in loss.keep:
        stays_T = _of_tokens(keep, keep(columns, state), columns.tokens, torch.bool)
        if keep.shrink:
            kept_T = stays_T if kept_T is None else kept_T & stays_T
        elif factor_T is None:
            factor_T = stays_T.double()
        else:
            factor_T = torch.where(stays_T, factor_T, 0.0)
    return factor_T, kept_T


def _of_tokens(axis: object, returned: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """What an axis returned; ValueError unless it is one value of this type for each token."""
    fits = isinstance(returned, Tensor) and returned.dtype == dtype and returned.shape == (tokens,)
    if not fits:
        expected = str(dtype).removeprefix("torch.")
        got = kind(returned) if isinstance(returned, Tensor) else f"a {type(returned).__name__}"
        raise ValueError(
            f"{type(axis).__name__}: expected it to return {expected}[{tokens}], got {got}"
        )
    return returned


def _tokens(offset_N1: Tensor, mask_T: Tensor | None) -> Tensor:
    """Tokens of each response that take part, on the CPU."""
    if mask_T is None:
        return offset_N1.diff()
    return Parts(len(mask_T), offset_N1.to(mask_T.device), mask_T).count_P.long().cpu()


class _Responses(NamedTuple):
    """On the CPU."""

    offset_N1: Tensor
    tokens_N: Tensor
    """Tokens that take part."""
    weight_N: Tensor

    def ratio_T(self, aggregate: Aggregate, like_T: Tensor) -> Tensor:
        """The weights [T] of another aggregate as multiples of the loss's."""
        ratio_N = aggregate(self.tokens_N) / self.weight_N
        ratio_N = torch.where(self.weight_N != 0, ratio_N, 0.0).to(like_T.device)
        return Parts(len(like_T), self.offset_N1.to(like_T.device), None).spread(ratio_N)


def _penalty_terms(
    loss: Loss, columns: LossColumns, state: LossState, responses: _Responses
) -> dict[str, Tensor | None]:
    result: dict[str, Tensor | None] = {}
    for slot, penalty in enumerate(slots(loss), 1):
        scale_T = penalty.scale(columns, state)
        if scale_T is not None and isinstance(penalty, Penalty):
            scale_T = _of_tokens(penalty.select, scale_T, columns.tokens, torch.bool).double()
        if penalty.aggregate is not None:
            ratio_T = responses.ratio_T(penalty.aggregate, columns.given["advantage_T"])
            scale_T = ratio_T if scale_T is None else ratio_T * scale_T
        result[f"scale_{slot}_T"] = scale_T
    for other in loss.penalties:
        if isinstance(other, EntropySmoothing):
            before_T, addend_T = result.get("addend_T"), other(columns, state)
            result["addend_T"] = addend_T if before_T is None else before_T + addend_T
        elif isinstance(other, OfNucleus):
            result["nucleus_T"], result["nucleus_gap"] = other(columns, state)
    return result


def slots(loss: Loss) -> list[OfLogprob]:
    """The penalties on a log-probability, beside `loss.kl`."""
    found = [p for p in loss.penalties if isinstance(p, OfLogprob)]
    if len(found) >= SLOTS:
        raise ValueError(f"loss.penalties: expected at most {SLOTS - 1} of them, got {len(found)}")
    return found
