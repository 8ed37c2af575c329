"""The ops of the one-go path; `fused_loss` is their face.

They return statistics and gradient at once, without autograd: `with_gradient` adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrl import _core
from pyrl.logits.kernels import (
    adjacent,
    column_addresses,
    device_of,
    empty_stats,
    matrix_of,
    stat_addresses,
)
from pyrl.logits.linear_token_stats import empty_gradients
from pyrl.logits.lm_head import Head, HeadGradient
from pyrl.logits.token_stats import Request, kernel_request, refuse_second_derivatives
from pyrl.loss.spec import TOKEN_COLUMNS, LossSpec


def ready(
    columns: Sequence[Tensor | None], tokens: int, device: torch.device
) -> list[Tensor | None]:
    """The columns as the kernels read them: contiguous and on the device.

    ValueError: a column has another shape or dtype, or of a token that takes part the advantage is
    not finite or a radius below 0. Before a row is visited, since in place nothing of the logits
    would be left behind the error.
    """
    column = dict(zip(TOKEN_COLUMNS, columns, strict=True))
    for name, values_T in column.items():
        if values_T is None:
            continue
        if values_T.shape != (tokens,) or values_T.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}_T: expected float32[{tokens}] or float64[{tokens}], got "
                f"{values_T.dtype}{list(values_T.shape)}"
            )
    advantage_T, weight_T = column["advantage"], column["weight"]
    assert advantage_T is not None
    assert weight_T is not None
    wrong_T = ~advantage_T.isfinite() & (weight_T != 0)
    if wrong_T.any():
        t = int(wrong_T.nonzero()[0])
        raise ValueError(f"advantage_T: expected finite numbers, got {advantage_T[t]} at {t}")
    low_T, high_T = column["low"], column["high"]
    if low_T is not None and high_T is not None:
        wrong_T = ~(torch.minimum(low_T, high_T) >= 0) & (weight_T != 0)
        if wrong_T.any():
            t = int(wrong_T.nonzero()[0])
            raise ValueError(
                f"clip_low_T, clip_high_T: expected radii >= 0, got {low_T[t]} and {high_T[t]} "
                f"at {t}"
            )
    return [None if c is None else c.to(device).contiguous() for c in columns]


def fused_into(
    stats_KT: Tensor,
    grad_TV: Tensor,
    logits_TV: Tensor,
    label_T: Tensor,
    request: Sequence[float],
    columns: Sequence[Tensor | None],
    spec: LossSpec,
) -> None:
    """Statistics and gradient; `grad_TV` may be `logits_TV`, whose columns are adjacent.

    The columns are `ready`.
    """
    options, asked = kernel_request(*request)
    _core.loss.fused_loss(
        logits=matrix_of(logits_TV),
        label=label_T.data_ptr(),
        options=options,
        columns=column_addresses(columns),
        spec=spec.kernel_arguments()["spec"],
        stats=stat_addresses(stats_KT, asked),
        grad=grad_TV.data_ptr(),
        grad_row_stride=grad_TV.stride(0),
        threads=torch.get_num_threads(),
        **device_of(logits_TV),
    )


# -- the ops --


@torch.library.custom_op("pyrl::fused_loss", mutates_args=(), device_types=("cpu", "cuda"))
def fused_loss(
    logits: Tensor,
    label: Tensor,
    request: Sequence[float],
    columns: Sequence[Tensor | None],
    spec: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Statistics [3, T] and gradient of each row."""
    columns = ready(columns, len(logits), logits.device)
    stats, logits = empty_stats(logits, Request().asked), adjacent(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    fused_into(stats, grad, logits, label.contiguous(), request, columns, LossSpec.of(spec))
    return stats, grad


@fused_loss.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return empty_stats(logits, Request().asked), grad


@torch.library.custom_op(
    "pyrl::fused_loss_", mutates_args=("logits",), device_types=("cpu", "cuda")
)
def fused_loss_(
    logits: Tensor,
    label: Tensor,
    request: Sequence[float],
    columns: Sequence[Tensor | None],
    spec: Sequence[float],
) -> Tensor:
    """Statistics [3, T]; the gradient takes the place of the logits."""
    columns = ready(columns, len(logits), logits.device)
    stats = empty_stats(logits, Request().asked)
    fused_into(stats, logits, logits, label.contiguous(), request, columns, LossSpec.of(spec))
    return stats


@fused_loss_.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return empty_stats(logits, Request().asked)


@torch.library.custom_op("pyrl::linear_fused_loss", mutates_args=(), device_types=("cpu", "cuda"))
def linear_fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    request: Sequence[float],
    columns: Sequence[Tensor | None],
    spec: Sequence[float],
    chunk: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics [3, T], and the gradients of hidden, weight and bias; empty if not needed."""
    columns = ready(columns, len(hidden), hidden.device)
    stats, label = empty_stats(hidden, Request().asked), label.contiguous()
    head = Head(hidden, weight, bias, chunk)
    gradient, of_loss = HeadGradient(head, *needs), LossSpec.of(spec)
    for part, logits in head.logits():
        of_part = empty_stats(logits, Request().asked)
        columns_of_part = [None if column is None else column[part] for column in columns]
        fused_into(of_part, logits, logits, label[part], request, columns_of_part, of_loss)
        stats[:, part] = of_part
        gradient.add(part, logits)
    return stats, *gradient.tensors()


@linear_fused_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, needs = rest
    return empty_stats(hidden, Request().asked), *empty_gradients(hidden, weight, bias, needs)


# -- a value with a gradient that is already there --


@torch.library.custom_op("pyrl::with_gradient", mutates_args=())
def with_gradient(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The value, whose derivatives are the gradients; they are handed over once."""
    return value.clone()


@with_gradient.register_fake
def _(value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value)


@torch.library.custom_op("pyrl::scale_", mutates_args=("tensor",))
def _scale_op(tensor: Tensor, factor: Tensor) -> None:
    # A pass over a large gradient, for nothing if the loss is what is differentiated: to wait for
    # the factor takes a GPU less time.
    if factor.item() != 1.0:
        tensor.mul_(factor)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, gradients = inputs
    ctx.save_for_backward(*gradients)
    ctx.handed_over = False


def _backward(ctx: Any, upstream: Tensor) -> tuple[None, list[Tensor], list[None]]:
    if torch.is_grad_enabled():  # create_graph=True
        refuse_second_derivatives("fused_policy_loss")
    if ctx.handed_over:
        raise RuntimeError(
            "fused_policy_loss: expected one backward pass, got a second one after the first took "
            "the gradient away"
        )
    ctx.handed_over = True
    gradients = ctx.saved_tensors
    for gradient in gradients:
        _scale_op(gradient, upstream)
    handed = [gradient.detach() for gradient in gradients]
    return None, handed, [None] * len(handed)


with_gradient.register_autograd(_backward, setup_context=_save)
