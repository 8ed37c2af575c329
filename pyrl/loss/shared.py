"""One-go where rows share tokens: the policy loss from the hidden states of a tree's tokens.

A token that several rows go through is one hidden state with one log-prob and one entropy; each row
asks for a change of them, and its gradient is that of the sum. Chunk by chunk of these tokens the
logits are made once, and the gradient takes their place: three GEMMs, and no [U, V] matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Unpack

import torch
from torch import Tensor

from pyrl.logits.kernels import empty_stats, grad_into, stats_into
from pyrl.logits.linear_token_stats import checked_head
from pyrl.logits.lm_head import HeadGradient
from pyrl.logits.token_stats import Request, TokenStats, record
from pyrl.loss.columns import Columns
from pyrl.loss.fused import Plan, plan_of
from pyrl.loss.fused_ops import ready
from pyrl.loss.kernels import PolicyInputs, policy_sums
from pyrl.loss.loss import Loss
from pyrl.loss.result import PolicyLoss
from pyrl.loss.spec import TOKEN_COLUMNS, LossSpec
from pyrl.loss.terms import Terms


def shared_policy_loss(
    hidden_UH: Tensor,
    weight_VH: Tensor,
    label_U: Tensor,
    unique_T: Tensor,
    temperature: float = 1.0,
    *,
    loss: Loss,
    terms: Terms,
    bias: Tensor | None = None,
    chunk: int | None = None,
    **columns: Unpack[Columns],
) -> tuple[PolicyLoss, TokenStats]:
    """`policy_loss` of T tokens in rows, of which token t is number `unique_T[t]` of U tokens.

    That of the `linear_token_stats` of these hidden states, whose gradients (hidden states, weight
    and bias, where one is asked for) are computed here and wait for the one backward pass; the
    statistics [T] are detached. Without `old_logprob_T` the policy has not moved since: the old
    log-probs are its own. Labels are all known (none is -100).

    Raises ValueError as `linear_policy_loss` does.
    """
    inputs = (hidden_UH, weight_VH, bias)
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in inputs]
    detached_bias = None if bias is None else bias.detach()
    head = checked_head(hidden_UH.detach(), weight_VH.detach(), detached_bias, label_U, chunk)
    moved = columns.get("old_logprob_T") is not None
    if not moved:
        columns["old_logprob_T"] = terms.advantage_T
    plan = plan_of(loss, terms, columns, unique_T)
    request, spec = Request(temperature), LossSpec.of(plan.spec)
    of_T = dict(zip(TOKEN_COLUMNS, _ready(plan, unique_T), strict=True))
    gradient, label_U = HeadGradient(head, *needs), label_U.contiguous()
    stats_KU = empty_stats(hidden_UH, request.asked)
    rows = _by_chunk(unique_T, len(label_U), head.chunk)
    for (part, logits_CV), row_T in zip(head.logits(), rows, strict=True):
        stats_KC = empty_stats(logits_CV, request.asked)
        stats_into(stats_KC, logits_CV, label_U[part], request.options, request.asked)
        stats_KU[:, part] = stats_KC
        if not any(needs):
            continue
        stats = dict(zip(request.asked, stats_KC.unbind(0), strict=True))
        place_T = unique_T[row_T] - part.start
        columns_T = {n: None if c is None else c[row_T] for n, c in of_T.items()}
        columns_T |= {name: stats[name][place_T] for name in ("logprob", "entropy")}
        if not moved:
            columns_T |= dict.fromkeys(plan.old, columns_T["logprob"])
        upstream = _summed(columns_T, place_T, len(logits_CV), spec)
        grad_into(logits_CV, logits_CV, label_U[part], request.options, stats, upstream)
        gradient.add(part, logits_CV)
    stats_KT = stats_KU[:, unique_T]
    if not moved:
        plan.given["old_logprob_T"] = record(stats_KT.unbind(0), request.asked).logprob
    wanted = [
        (tensor, found)
        for tensor, found, need in zip(inputs, gradient.tensors(), needs, strict=True)
        if tensor is not None and need
    ]
    return plan.result(stats_KT, [t for t, _ in wanted], [g for _, g in wanted])


def _ready(plan: Plan, unique_T: Tensor) -> list[Tensor | None]:
    return ready(plan.columns, len(unique_T), unique_T.device)


def _by_chunk(unique_T: Tensor, tokens: int, chunk: int) -> Iterator[Tensor]:
    """The rows' tokens of each chunk of the U tokens, in their order."""
    order_T = unique_T.argsort(stable=True)
    ends = torch.arange(0, tokens, chunk, device=unique_T.device).add(chunk).clamp(max=tokens)
    end_C = torch.searchsorted(unique_T[order_T], ends)
    return iter(order_T.tensor_split(end_C[:-1].cpu()))


def _summed(
    columns_T: Mapping[str, Tensor | None], place_T: Tensor, tokens: int, spec: LossSpec
) -> dict[str, Tensor]:
    """The derivatives of the loss by log-prob and entropy of each token, over its rows."""
    logprob_T, weight_T = columns_T["logprob"], columns_T["weight"]
    assert logprob_T is not None
    assert weight_T is not None
    # Each token is a response here, which the kernel weighs as a whole.
    offset_N1 = torch.arange(len(logprob_T) + 1)
    given = {**columns_T, "weight": None}
    inputs = PolicyInputs(given, weight_T != 0, offset_N1, weight_T, spec)
    grad_T = {
        name: torch.empty(len(logprob_T), dtype=logprob_T.dtype, device=inputs.device)
        for name in ("logprob", "entropy")
        if name == "logprob" or spec.token.entropy_coef
    }
    policy_sums(inputs, None, grad_T["logprob"], grad_T.get("entropy"))
    return {
        name: logprob_T.new_zeros(tokens).index_add_(0, place_T, of_T.to(logprob_T.device))
        for name, of_T in grad_T.items()
    }
