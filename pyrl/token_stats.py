"""Log-probability, entropy, log-sum-exp and confidence of tokens; nothing of size [T, V] is kept.

Formulas of the gradient: csrc/token_stats.h. The ops keep the logits and 16 bytes per token for
the backward pass, which recomputes the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrl import _core

IGNORED_LABEL = -100
"""A row with this label has zero outputs and a zero gradient."""

ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""Element types that the kernels read, by their number in csrc/logit_matrix.h."""


@dataclass(frozen=True)
class TokenStats:
    """One value per token, of the distribution at the temperature; float32, float64 for float64."""

    logprob: Tensor
    """Of the label (nats)."""
    entropy: Tensor
    """Over the whole vocabulary (nats)."""
    logsumexp: Tensor
    """Of logits / temperature (nats)."""
    confidence: Tensor
    """Mass of the five most probable tokens, in (0, 1]. Not differentiable."""


def token_stats(logits_TV: Tensor, label_T: Tensor, temperature: float = 1.0) -> TokenStats:
    """Statistics of each row of logits, differentiable through logprob, entropy and logsumexp.

    Logits are float32, float64, float16 or bfloat16 on the CPU or a CUDA device; -inf masks a
    token; rows may be strided, columns that are not adjacent are copied. The backward pass cannot
    be differentiated again. Label -100 (IGNORED_LABEL) ignores a row; another label outside the
    vocabulary raises ValueError on the CPU and gives NaN in its row on a CUDA device. A row with
    NaN or +inf has NaN statistics and a NaN gradient.

    Raises ValueError for wrong shapes, dtypes or devices or a temperature that is not positive.
    """
    _check(logits_TV, label_T, temperature)
    logprob, entropy, logsumexp, confidence = _stats_op(logits_TV, label_T, temperature)
    dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    return TokenStats(
        logprob.to(dtype), entropy.to(dtype), logsumexp.to(dtype), confidence.to(dtype)
    )


def _check(logits_TV: Tensor, label_T: Tensor, temperature: float) -> None:
    if logits_TV.ndim != 2 or logits_TV.shape[1] == 0:
        raise ValueError(f"logits_TV: expected shape [T, V >= 1], got {tuple(logits_TV.shape)}")
    if logits_TV.dtype not in ELEMENTS:
        raise ValueError(f"logits_TV: expected one of {list(ELEMENTS)}, got {logits_TV.dtype}")
    if logits_TV.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits_TV: expected a CPU or CUDA tensor, got {logits_TV.device}")
    _check_labels(label_T, logits_TV, "logits_TV")
    _check_temperature(temperature)


def _check_labels(label_T: Tensor, rows: Tensor, name: str) -> None:
    if label_T.dtype != torch.int64 or label_T.shape != rows.shape[:1]:
        raise ValueError(
            f"label_T: expected int64[{rows.shape[0]}] like the rows of {name}, "
            f"got {label_T.dtype}{list(label_T.shape)}"
        )
    if label_T.device != rows.device:
        raise ValueError(f"label_T: expected a tensor on {rows.device}, got {label_T.device}")


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")


# -- the ops --


def _adjacent(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _where(matrix_TV: Tensor) -> dict[str, int]:
    """The matrix, and the threads or the CUDA stream of the caller, as the kernels take them."""
    cuda = matrix_TV.device.type == "cuda"
    return {
        "logits": matrix_TV.data_ptr(),
        "dtype": ELEMENTS[matrix_TV.dtype],
        "rows": matrix_TV.shape[0],
        "vocabulary": matrix_TV.shape[1],
        "row_stride": matrix_TV.stride(0),
        "threads": torch.get_num_threads(),
        "device": matrix_TV.device.index if cuda else -1,
        "stream": torch.cuda.current_stream(matrix_TV.device).cuda_stream if cuda else 0,
    }


@torch.library.custom_op("pyrl::token_stats", mutates_args=(), device_types=("cpu", "cuda"))
def _stats_op(
    logits: Tensor, label: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, label = _adjacent(logits), label.contiguous()
    logprob, entropy, logsumexp, confidence = _empty_stats(logits)
    _core.token_stats(
        label=label.data_ptr(),
        temperature=temperature,
        logprob=logprob.data_ptr(),
        entropy=entropy.data_ptr(),
        logsumexp=logsumexp.data_ptr(),
        confidence=confidence.data_ptr(),
        **_where(logits),
    )
    return logprob, entropy, logsumexp, confidence


def _empty_stats(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprob, entropy, logsumexp, confidence = (
        logits.new_empty(logits.shape[:1], dtype=torch.float64) for _ in range(4)
    )
    return logprob, entropy, logsumexp, confidence


@_stats_op.register_fake
def _(logits: Tensor, label: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_stats(logits)


@torch.library.custom_op("pyrl::token_stats_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _grad_op(
    logits: Tensor,
    label: Tensor,
    temperature: float,
    entropy: Tensor,
    logsumexp: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
) -> Tensor:
    logits = _adjacent(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    upstream = (grad_logprob, grad_entropy, grad_logsumexp)
    _grad_into(grad, logits, label, temperature, entropy, logsumexp, upstream)
    return grad


def _grad_into(
    grad: Tensor,
    logits: Tensor,
    label: Tensor,
    temperature: float,
    entropy: Tensor,
    logsumexp: Tensor,
    upstream: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradient with respect to the logits; `grad` may be `logits`."""
    label, entropy, logsumexp = label.contiguous(), entropy.contiguous(), logsumexp.contiguous()
    grad_logprob, grad_entropy, grad_logsumexp = (g.contiguous() for g in upstream)
    _core.token_stats_grad(
        label=label.data_ptr(),
        temperature=temperature,
        entropy=entropy.data_ptr(),
        logsumexp=logsumexp.data_ptr(),
        grad_logprob=grad_logprob.data_ptr(),
        grad_entropy=grad_entropy.data_ptr(),
        grad_logsumexp=grad_logsumexp.data_ptr(),
        grad=grad.data_ptr(),
        grad_row_stride=grad.stride(0),
        **_where(logits),
    )


@_grad_op.register_fake
def _(
    logits: Tensor,
    label: Tensor,
    temperature: float,
    entropy: Tensor,
    logsumexp: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, label, ctx.temperature = inputs
    _, entropy, logsumexp, confidence = output
    ctx.save_for_backward(logits, label, entropy, logsumexp)
    ctx.mark_non_differentiable(confidence)


def _backward(
    ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, grad_logsumexp: Tensor, _: Tensor
) -> tuple[Tensor, None, None]:
    logits, label, entropy, logsumexp = ctx.saved_tensors
    upstream = (grad_logprob, grad_entropy, grad_logsumexp)
    return _grad_op(logits, label, ctx.temperature, entropy, logsumexp, *upstream), None, None


def _refuse(*_: Any) -> None:
    raise NotImplementedError(
        "token_stats: expected to be differentiated once, got a request for second derivatives"
    )


_stats_op.register_autograd(_backward, setup_context=_save)
_grad_op.register_autograd(_refuse)


# -- from hidden states --


def linear_token_stats(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    label_T: Tensor,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    chunk: int = 256,
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, label)` without the [T, V] matrix of logits.

    Works on `chunk` tokens at a time, forward and, by recomputation, backward: peak memory is one
    [chunk, V] matrix beside the gradients. The gradient of the weight is accumulated in at least
    float32, and not computed at all unless it is asked for. A small chunk makes its additions
    dominate: keep chunk >= H / 4. The backward pass cannot be differentiated again.

    Raises ValueError for wrong shapes, dtypes or devices.
    """
    _check_linear(hidden_TH, weight_VH, bias, chunk)
    _check_labels(label_T, hidden_TH, "hidden_TH")
    _check_temperature(temperature)
    logprob, entropy, logsumexp, confidence = _linear_stats(
        hidden_TH, weight_VH, bias, label_T, temperature, chunk
    )
    dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    return TokenStats(
        logprob.to(dtype), entropy.to(dtype), logsumexp.to(dtype), confidence.to(dtype)
    )


def _check_linear(hidden_TH: Tensor, weight_VH: Tensor, bias: Tensor | None, chunk: int) -> None:
    if hidden_TH.ndim != 2 or weight_VH.ndim != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            "hidden_TH, weight_VH: expected [T, H] and [V, H], "
            f"got {tuple(hidden_TH.shape)} and {tuple(weight_VH.shape)}"
        )
    if weight_VH.shape[0] == 0:
        raise ValueError("weight_VH: expected at least one row, got 0")
    if hidden_TH.dtype not in ELEMENTS:
        raise ValueError(f"hidden_TH: expected one of {list(ELEMENTS)}, got {hidden_TH.dtype}")
    if bias is not None and bias.shape != weight_VH.shape[:1]:
        raise ValueError(f"bias: expected [{weight_VH.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight_VH", weight_VH), ("bias", bias)):
        if tensor is None or (tensor.dtype, tensor.device) == (hidden_TH.dtype, hidden_TH.device):
            continue
        raise ValueError(
            f"{name}: expected {hidden_TH.dtype} on {hidden_TH.device} like hidden_TH, "
            f"got {tensor.dtype} on {tensor.device}"
        )
    if chunk < 1:
        raise ValueError(f"chunk: expected >= 1, got {chunk}")


def _logits(hidden_TH: Tensor, weight_VH: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of its arguments, so that the backward pass recomputes the forward's logits."""
    with torch.autocast(hidden_TH.device.type, enabled=False):
        return torch.nn.functional.linear(hidden_TH, weight_VH, bias)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        label: Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        stats = _empty_stats(hidden)
        for begin in range(0, hidden.shape[0], chunk):
            part = slice(begin, begin + chunk)
            logits = _logits(hidden[part], weight, bias)
            for whole, of_part in zip(
                stats, _stats_op(logits, label[part], temperature), strict=True
            ):
                whole[part] = of_part
        ctx.save_for_backward(hidden, weight, bias, label, stats[1], stats[2])
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(stats[3])
        return stats

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            _refuse()
        hidden, weight, bias, label, entropy, logsumexp = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        for begin in range(0, hidden.shape[0], ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            dz = _logits(hidden[part], weight, bias)
            grads = (upstream[0][part], upstream[1][part], upstream[2][part])
            _grad_into(dz, dz, label[part], ctx.temperature, entropy[part], logsumexp[part], grads)
            if grad_hidden is not None:
                torch.mm(dz, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, dz, hidden[part])
            if grad_bias is not None:
                grad_bias += dz.sum(dim=0, dtype=wide)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


_linear_stats: Callable[..., tuple[Tensor, ...]] = _LinearTokenStats.apply


def _add_product(sum_VH: Tensor, dz_TV: Tensor, hidden_TH: Tensor) -> None:
    if sum_VH.dtype == dz_TV.dtype:
        sum_VH.addmm_(dz_TV.T, hidden_TH)
    else:
        sum_VH += dz_TV.T @ hidden_TH
