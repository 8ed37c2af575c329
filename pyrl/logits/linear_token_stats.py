"""Statistics of tokens from hidden states and the head's weight, without the [T, V] logits.

Four GEMMs: logits forward, logits again backward, and the gradients of hidden states and weight.
`linear_policy_loss` needs three where the loss is local to a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pyrl.logits.kernels import check_tensors, empty_stats, grad_into, stats_into
from pyrl.logits.lm_head import Head, HeadGradient, chunk_rows
from pyrl.logits.token_stats import (
    Options,
    Request,
    TokenStats,
    check_labels,
    contiguous,
    kernel_request,
    record,
    refuse_forward_mode,
    refuse_second_derivatives,
    shows_options,
)


@shows_options
def linear_token_stats(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    label_T: Tensor,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    **options: Unpack[Options],
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, label)`, `chunk` tokens at a time.

    Peak memory is one [chunk, V] matrix beside the gradients; `chunk=None` chooses it by
    `pyrl.logits.lm_head.chunk_rows`. The gradient of the weight is summed in at least float32 and
    rounded once; a frozen weight, as under LoRA, costs no gradient. A weight tied to the embedding
    needs nothing: autograd adds both gradients. The backward pass cannot be differentiated again.

    Raises ValueError for wrong shapes, dtypes or devices or an option outside its range, TypeError
    for arguments that are no tensors.
    """
    head = checked_head(hidden_TH, weight_VH, bias, label_T, chunk)
    refuse_forward_mode("linear_token_stats", hidden_TH, weight_VH, bias)
    request = Request.of("linear_token_stats", temperature, options)
    stats_KT = _stats_op(hidden_TH, weight_VH, bias, label_T, request.packed(), head.chunk)
    return record(stats_KT.unbind(0), request.asked)


def checked_head(
    hidden_TH: Tensor, weight_VH: Tensor, bias: Tensor | None, label_T: Tensor, chunk: int | None
) -> Head:
    """The head with its chunk chosen; ValueError for arguments that do not belong together.

    TypeError for those that are no tensors.
    """
    check_tensors(hidden_TH=hidden_TH, weight_VH=weight_VH, label_T=label_T)
    if bias is not None:
        check_tensors(bias=bias)
    Head(hidden_TH, weight_VH, bias, 1 if chunk is None else chunk).check()
    check_labels(label_T, hidden_TH, "hidden_TH")
    if chunk is None:
        tokens, width = hidden_TH.shape
        vocabulary, itemsize = weight_VH.shape[0], hidden_TH.element_size()
        chunk = chunk_rows(tokens, vocabulary, width, itemsize, hidden_TH.device.type)
    return Head(hidden_TH, weight_VH, bias, chunk)


@torch.library.custom_op("pyrl::linear_token_stats", mutates_args=(), device_types=("cpu", "cuda"))
def _stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    request: Sequence[float],
    chunk: int,
) -> Tensor:
    options, asked = kernel_request(*request)
    stats, label = empty_stats(hidden, asked), label.contiguous()
    for part, logits in Head(hidden, weight, bias, chunk).logits():
        of_part = empty_stats(logits, asked)
        stats_into(of_part, logits, label[part], options, asked)
        stats[:, part] = of_part
    return stats


@_stats_op.register_fake
def _(
    hidden: Tensor, _weight: Tensor, _bias: Any, _label: Tensor, request: Sequence[float], *_: Any
) -> Tensor:
    return empty_stats(hidden, Request.unpacked(request).asked)


@torch.library.custom_op(
    "pyrl::linear_token_stats_grad", mutates_args=(), device_types=("cpu", "cuda")
)
def _grad_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    request: Sequence[float],
    chunk: int,
    stats: Tensor,
    upstream: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    options, asked = kernel_request(*request)
    head, label = Head(hidden, weight, bias, chunk), label.contiguous()
    gradient = HeadGradient(head, *needs)
    for part, logits in head.logits():
        of_part = dict(zip(asked, stats[:, part].unbind(0), strict=True))
        upstream_of_part = dict(zip(asked, contiguous(upstream[:, part].unbind(0)), strict=True))
        grad_into(logits, logits, label[part], options, of_part, upstream_of_part)
        gradient.add(part, logits)
    return gradient.tensors()


@_grad_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, bias, rest[-1])


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Like the tensors of a HeadGradient, not initialised."""
    of_hidden, of_weight, of_bias = (
        torch.empty_like(tensor) if tensor is not None and needed else hidden.new_empty(0)
        for tensor, needed in zip((hidden, weight, bias), needs, strict=True)
    )
    return of_hidden, of_weight, of_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, label, ctx.request, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, bias, label, output)


def _backward(ctx: Any, upstream_KT: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, label, stats = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    gradients = _grad_op(
        hidden, weight, bias, label, ctx.request, ctx.chunk, stats, upstream_KT, needs
    )
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None)


def _refuse(*_: Any) -> None:
    refuse_second_derivatives("linear_token_stats")


_stats_op.register_autograd(_backward, setup_context=_save)
_grad_op.register_autograd(_refuse)
