"""One-go: statistics, policy loss and gradient of a token in one visit to its logits.

For losses that are local to a token: then its gradient is known as soon as its log-prob and entropy
are, while the row is still in the cache; and from hidden states the logits are computed once, three
GEMMs in place of four. The results are those of `token_stats` and `policy_loss`, on the CPU bit for
bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from pyrl.logits.kernels import check_tensors
from pyrl.logits.linear_token_stats import checked_head
from pyrl.logits.token_stats import (
    IGNORED_LABEL,
    Request,
    TokenStats,
    check_rows,
    record,
    refuse_forward_mode,
)
from pyrl.loss.bounds import PositionClip
from pyrl.loss.columns import Columns
from pyrl.loss.fused_ops import (
    fused_loss,
    fused_loss_,
    linear_fused_loss,
    with_gradient,
)
from pyrl.loss.loss import Loss, check_loss
from pyrl.loss.policy_loss import check_terms, given_columns, policy_loss, token_columns
from pyrl.loss.result import PolicyLoss
from pyrl.loss.spec import TOKEN_COLUMNS, lower
from pyrl.loss.terms import Terms, reduced


def fused_policy_loss(
    logits_TV: Tensor,
    label_T: Tensor,
    temperature: float = 1.0,
    *,
    loss: Loss,
    mask_T: Tensor | None = None,
    offset_N1: Tensor | None = None,
    terms: Terms | None = None,
    softcap: float | None = None,
    inplace: bool = False,
    per_token: bool = False,
    **columns: Unpack[Columns],
) -> tuple[PolicyLoss, TokenStats]:
    """`policy_loss` of the `token_stats` of these logits, whose gradient is computed on the way.

    The loss is differentiable in the logits alone, once and in one backward pass, which multiplies
    the gradient by its upstream scalar; the statistics are detached. `inplace=True` writes the
    gradient over the logits at once: their values are gone when this function returns, and the
    graph behind them may not need them.

    Columns, `terms` and `per_token` as in `policy_loss`. Axes that read the log-probs or entropies
    of a whole mini-batch need `terms`, of the policy before the update. A token whose label is -100
    takes no part; with `terms`, which know no labels, their mask must leave it out.

    The gradient has the dtype of the logits before the upstream scalar multiplies it: under float16
    with loss scaling small elements are lost, where `token_stats` and `policy_loss` keep them.

    Raises ValueError as `token_stats` and `policy_loss` do, and for a loss that is not local to a
    token: a ratio over a response, bounds by position, or a nucleus entropy.
    """
    check_rows(logits_TV, label_T, inplace=inplace)
    refuse_forward_mode("fused_policy_loss", logits_TV)
    request = Request(temperature, softcap=softcap)
    plan = _plan_of_rows(loss, terms, columns, mask_T, offset_N1, logits_TV, label_T, per_token)
    row_arguments = (label_T, request.packed(), plan.columns, plan.spec)
    if not (logits_TV.requires_grad and torch.is_grad_enabled()):
        stats_KT = torch.ops.pyrl.token_stats(logits_TV, label_T, request.packed(), False)
        return plan.result(stats_KT, [], [])
    if inplace:
        stats_KT = fused_loss_(logits_TV.detach(), *row_arguments)
        return plan.result(stats_KT, [logits_TV], [logits_TV.detach()])
    stats_KT, grad_TV = fused_loss(logits_TV.detach(), *row_arguments)
    return plan.result(stats_KT, [logits_TV], [grad_TV])


def linear_policy_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    label_T: Tensor,
    temperature: float = 1.0,
    *,
    loss: Loss,
    bias: Tensor | None = None,
    chunk: int | None = None,
    mask_T: Tensor | None = None,
    offset_N1: Tensor | None = None,
    terms: Terms | None = None,
    softcap: float | None = None,
    per_token: bool = False,
    **columns: Unpack[Columns],
) -> tuple[PolicyLoss, TokenStats]:
    """`fused_policy_loss` of hidden @ weight.T + bias: three GEMMs, a chunk of tokens at a time.

    The gradients of hidden states, weight and bias are computed here, for those of them that need
    one, and wait for the backward pass. Chunks and sums are those of `linear_token_stats`.

    Raises ValueError as `linear_token_stats` and `fused_policy_loss` do.
    """
    head = checked_head(hidden_TH, weight_VH, bias, label_T, chunk)
    refuse_forward_mode("linear_policy_loss", hidden_TH, weight_VH, bias)
    request = Request(temperature, softcap=softcap)
    plan = _plan_of_rows(loss, terms, columns, mask_T, offset_N1, hidden_TH, label_T, per_token)
    inputs = (hidden_TH, weight_VH, bias)
    detached = [None if tensor is None else tensor.detach() for tensor in inputs]
    recording = torch.is_grad_enabled()
    needs = [t is not None and t.requires_grad and recording for t in inputs]
    if not any(needs):
        stats_KT = torch.ops.pyrl.linear_token_stats(
            *detached, label_T, request.packed(), head.chunk
        )
        return plan.result(stats_KT, [], [])
    stats_KT, *gradients = linear_fused_loss(
        *detached, label_T, request.packed(), plan.columns, plan.spec, head.chunk, needs
    )
    wanted = [
        (tensor, gradient)
        for tensor, gradient, need in zip(inputs, gradients, needs, strict=True)
        if tensor is not None and need
    ]
    return plan.result(stats_KT, [t for t, _ in wanted], [g for _, g in wanted])


@dataclass(frozen=True)
class Plan:
    """A loss that is local to a token, as the kernels read it."""

    loss: Loss
    terms: Terms
    given: dict[str, Any]
    columns: list[Tensor | None]
    """In the order of TOKEN_COLUMNS."""
    old: list[str]
    """The names of those that are the old policy's log-probs."""
    spec: list[float]
    """The numbers of a LossSpec."""
    per_token: bool

    def result(
        self, stats_KT: Tensor, inputs: list[Tensor], gradients: list[Tensor]
    ) -> tuple[PolicyLoss, TokenStats]:
        """The record of `policy_loss`, differentiable in `inputs`."""
        stats = record(stats_KT.unbind(0), Request().asked)
        out = policy_loss(
            stats.logprob,
            stats.entropy,
            loss=self.loss,
            terms=self.terms,
            per_token=self.per_token,
            **self.given,
        )
        return replace(out, loss=with_gradient(out.loss, inputs, gradients)), stats


def is_local(loss: Loss) -> bool:
    """Whether a token's gradient is known as soon as its own log-prob and entropy are."""
    return _not_local(loss) is None


def plan_of(
    loss: Loss,
    terms: Terms,
    columns: Mapping[str, Any],
    like_T: Tensor,
    per_token: bool = False,
) -> Plan:
    """The loss of tokens on the device of `like_T`, and as many. ValueError: it is not local."""
    given = _given(loss, columns, like_T)
    check_terms(terms, len(like_T), {})
    lowered = lower(loss, "ref_logprob_T" in given)
    found = token_columns(loss, lowered, terms, given)
    found[TOKEN_COLUMNS.index("weight")] = terms.weight_T
    old = [name for name, source in lowered.sources.items() if source == "old_logprob_T"]
    return Plan(loss, terms, given, found, old, lowered.spec.numbers(), per_token)


def _plan_of_rows(
    loss: Loss,
    terms: Terms | None,
    columns: Mapping[str, Any],
    mask_T: Tensor | None,
    offset_N1: Tensor | None,
    rows: Tensor,
    label_T: Tensor,
    per_token: bool,
) -> Plan:
    if terms is None:
        given = _given(loss, columns, label_T)
        terms = _local_terms(loss, given, mask_T, offset_N1, label_T)
    else:
        check_terms(terms, rows.shape[0], {"mask_T": mask_T, "offset_N1": offset_N1})
    return plan_of(loss, terms, columns, label_T, per_token)


def _given(loss: Loss, columns: Mapping[str, Any], like_T: Tensor) -> dict[str, Tensor]:
    """The columns, checked, of a loss that is local."""
    check_loss(loss)
    unknown_T = like_T.new_empty(len(like_T), dtype=torch.float64)  # before the rows are visited
    given = given_columns(unknown_T, unknown_T, columns)
    del given["logprob_T"], given["entropy_T"]
    if (axis := _not_local(loss)) is not None:
        raise ValueError(
            f"loss: expected one that is local to a token, got {axis}; call token_stats or "
            "linear_token_stats and then policy_loss"
        )
    return given


def _not_local(loss: Loss) -> str | None:
    """The axis that reads more than a token; None: there is none."""
    if lower(loss, has_reference=False).spec.scan:
        return f"Ratio.of = {loss.ratio.of!r}"
    if isinstance(loss.bounds, PositionClip):
        return "PositionClip"
    return None if loss.nucleus is None else type(loss.nucleus).__name__


def _local_terms(
    loss: Loss,
    given: Mapping[str, Tensor],
    mask_T: Tensor | None,
    offset_N1: Tensor | None,
    label_T: Tensor,
) -> Terms:
    """The terms of a loss that reads no log-prob, entropy or group; ValueError for another one."""
    known_T = label_T != IGNORED_LABEL
    if mask_T is not None:
        check_tensors(mask_T=mask_T)
    if mask_T is not None and (mask_T.dtype != torch.bool or mask_T.shape != label_T.shape):
        raise ValueError(
            f"mask_T: expected torch.bool[{len(label_T)}], got {mask_T.dtype}{list(mask_T.shape)}"
        )
    mask_T = known_T if mask_T is None else mask_T & known_T
    if "advantage_T" not in given:
        raise ValueError("policy_loss: needs the column advantage_T, or terms")
    for need in loss.terms_needs:
        if need.name in _UNKNOWN:
            raise ValueError(
                f"{need}: it is not known before the rows are visited; expected terms="
                "pyrl.loss.terms.loss_terms(...), of the policy before the update"
            )
    return reduced(loss, given, mask_T, offset_N1, None, None)


_UNKNOWN = ("logprob_T", "entropy_T", "group_N", "state.entropy", "state.nucleus_entropy")
"""What a loss needs `terms` for."""
