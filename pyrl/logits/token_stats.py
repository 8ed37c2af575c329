"""Statistics of the tokens behind a matrix of logits, and their gradient.

One sweep over each row computes whatever is asked for; the backward pass recomputes the
probabilities from the logits and 24 bytes per token, so nothing else of size [T, V] is kept.
Formulas: csrc/logits/stats/token_stats.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyrl.logits.graph import traced
from pyrl.logits.kernels import (
    DIFFERENTIABLE,
    ELEMENTS,
    READ_BACKWARD,
    adjacent,
    apart,
    empty_stats,
    grad_into,
    names,
    stats_into,
)

IGNORED_LABEL = -100
"""A row with this label has zero outputs and a zero gradient."""

LARGEST_TOP_K = 8


@dataclass(frozen=True)
class TokenStats:
    """One float64 per token; None was not asked for.

    Float64 because float32 holds a log-prob of -100 only to 4e-6. With p the softmax of the logits
    (after the soft cap) at the temperature. logprob, entropy, logsumexp, self_certainty and
    nucleus_entropy are differentiable.
    """

    logprob: Tensor
    """Of the label (nats)."""
    entropy: Tensor
    """Over the whole vocabulary (nats)."""
    logsumexp: Tensor
    """Of logits / temperature (nats)."""
    self_certainty: Tensor | None = None
    """KL(uniform || p) (nats); a masked token makes it infinite."""
    nucleus_entropy: Tensor | None = None
    """Of p restricted to the nucleus and renormalised (nats), as SIREN uses it; the gradient takes
    the nucleus as given."""
    nucleus_threshold: Tensor | None = None
    """Logit, after the soft cap, at and above which a token is in the nucleus."""
    nucleus_log_mass: Tensor | None = None
    """Log of the nucleus' mass (nats)."""
    confidence: Tensor | None = None
    """Mass of the top_k most probable tokens, in (0, 1]."""
    max_probability: Tensor | None = None
    sum_p2: Tensor | None = None
    """Sum of p^2."""
    sum_p2_logp: Tensor | None = None
    """Sum of p^2 log p."""
    kept_mass: Tensor | None = None
    """Mass of the tokens with p >= kept_share * max p."""
    second_logprob: Tensor | None = None
    """Log-prob of the label at second_temperature (nats)."""


def token_stats(
    logits_TV: Tensor,
    label_T: Tensor,
    temperature: float = 1.0,
    *,
    softcap: float | None = None,
    top_k: int = 0,
    self_certainty: bool = False,
    max_probability: bool = False,
    squares: bool = False,
    kept_share: float | None = None,
    second_temperature: float | None = None,
    nucleus: float | None = None,
    nucleus_keeps_crossing: bool = True,
    inplace: bool = False,
) -> TokenStats:
    """Statistics of each row of logits: log-prob, entropy, log-sum-exp and what is asked for.

    `softcap` s replaces z by s tanh(z / s). `top_k` in 1..8 asks for the confidence, `squares` for
    the sums of p^2 and p^2 log p. `nucleus` is the mass of the smallest set of most probable tokens
    that reaches it; the token that crosses it belongs to the set unless
    `nucleus_keeps_crossing=False` (SIREN's released code), and tokens as probable as the crossing
    one go with it.

    Logits are float32, float64, float16 or bfloat16 on the CPU or a CUDA device; -inf masks a
    token; rows may be strided, columns that are not adjacent are copied. Label -100
    (IGNORED_LABEL) ignores a row; another label outside the vocabulary gives NaN in its row, and so
    does a row with NaN or +inf. A row without an upstream gradient has a gradient of zero, whatever
    it holds. The backward pass cannot be differentiated again.

    `inplace=True`: the backward pass writes the gradient over the logits, which nothing else may
    need by then. A second backward pass, or one of another operation that saved these logits,
    raises RuntimeError.

    Raises ValueError for wrong shapes, dtypes or devices, an option outside its range, or logits
    that cannot be overwritten with `inplace=True`: columns not adjacent or rows that overlap.
    """
    check_rows(logits_TV, label_T, inplace=inplace)
    options, asked = request(
        temperature,
        softcap=softcap,
        top_k=top_k,
        self_certainty=self_certainty,
        max_probability=max_probability,
        squares=squares,
        kept_share=kept_share,
        second_temperature=second_temperature,
        nucleus=nucleus,
        nucleus_keeps_crossing=nucleus_keeps_crossing,
    )
    arguments = (logits_TV, label_T, options, asked, inplace)
    if traced(logits_TV):
        return record(_stats_op(*arguments).unbind(0), asked)
    return record(_eager(*arguments), asked)


def request(
    temperature: float,
    *,
    softcap: float | None = None,
    top_k: int = 0,
    self_certainty: bool = False,
    max_probability: bool = False,
    squares: bool = False,
    kept_share: float | None = None,
    second_temperature: float | None = None,
    nucleus: float | None = None,
    nucleus_keeps_crossing: bool = True,
) -> tuple[list[float], int]:
    """As the ops take them: the numbers of OPTIONS, and one bit for each member of STATS asked for.

    Raises ValueError for an option outside its range.
    """
    positive = {
        "temperature": temperature,
        "softcap": softcap,
        "second_temperature": second_temperature,
    }
    for name, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    for name, value in {"kept_share": kept_share, "nucleus": nucleus}.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
    if top_k not in range(LARGEST_TOP_K + 1):
        raise ValueError(f"top_k: expected a whole number, 0 to {LARGEST_TOP_K}, got {top_k}")
    asked = (
        *[True] * 3,
        self_certainty,
        *[nucleus is not None] * 3,
        top_k > 0,
        max_probability,
        *[squares] * 2,
        kept_share is not None,
        second_temperature is not None,
    )
    numbers = [
        temperature,
        softcap or 0.0,
        float(top_k or 1),
        kept_share or 1.0,
        second_temperature or 1.0,
        nucleus or 1.0,
        float(nucleus_keeps_crossing),
    ]
    return numbers, sum(int(bit) << i for i, bit in enumerate(asked))


def record(stats_K: Sequence[Tensor], asked: int) -> TokenStats:
    """The op's rows by name, those without a gradient detached.

    Rows of `unbind` and not of an index each, whose backward pass makes K tensors [K, T].
    """
    return TokenStats(
        **{
            name: row_T if name in DIFFERENTIABLE else row_T.detach()
            for name, row_T in zip(names(asked), stats_K, strict=True)
        }
    )


def check_rows(logits_TV: Tensor, label_T: Tensor, *, inplace: bool) -> None:
    """ValueError unless the kernels can read the logits, and with `inplace` overwrite them."""
    if logits_TV.ndim != 2 or logits_TV.shape[1] == 0:
        raise ValueError(f"logits_TV: expected shape [T, V >= 1], got {tuple(logits_TV.shape)}")
    if logits_TV.dtype not in ELEMENTS:
        raise ValueError(f"logits_TV: expected one of {list(ELEMENTS)}, got {logits_TV.dtype}")
    if logits_TV.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits_TV: expected a CPU or CUDA tensor, got {logits_TV.device}")
    check_labels(label_T, logits_TV, "logits_TV")
    rows, columns = logits_TV.shape
    row_stride, column_stride = logits_TV.stride()
    if inplace and ((columns > 1 and column_stride != 1) or (rows > 1 and row_stride < columns)):
        raise ValueError(
            "logits_TV: with inplace=True expected adjacent columns and rows that do not overlap, "
            f"got strides {logits_TV.stride()} for shape {tuple(logits_TV.shape)}"
        )


def check_labels(label_T: Tensor, rows: Tensor, name: str) -> None:
    """ValueError unless there is an int64 label for each row, on its device."""
    if label_T.dtype != torch.int64 or label_T.shape != rows.shape[:1]:
        raise ValueError(
            f"label_T: expected int64[{rows.shape[0]}] like the rows of {name}, "
            f"got {label_T.dtype}{list(label_T.shape)}"
        )
    if label_T.device != rows.device:
        raise ValueError(f"label_T: expected a tensor on {rows.device}, got {label_T.device}")


# -- the ops --


@torch.library.custom_op("pyrl::token_stats", mutates_args=(), device_types=("cpu", "cuda"))
def _stats_op(
    logits: Tensor, label: Tensor, options: Sequence[float], outputs: int, inplace: bool
) -> Tensor:
    stats = empty_stats(logits, outputs)
    stats_into(stats, adjacent(logits), label.contiguous(), options, outputs)
    return stats


@_stats_op.register_fake
def _(
    logits: Tensor, label: Tensor, options: Sequence[float], outputs: int, inplace: bool
) -> Tensor:
    return empty_stats(logits, outputs)


@torch.library.custom_op("pyrl::token_stats_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _grad_op(
    logits: Tensor,
    label: Tensor,
    options: Sequence[float],
    outputs: int,
    stats: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> Tensor:
    logits = adjacent(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_into(grad, logits, label.contiguous(), options, outputs, stats, contiguous(upstream))
    return grad


@_grad_op.register_fake
def _(
    logits: Tensor,
    label: Tensor,
    options: Sequence[float],
    outputs: int,
    stats: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# Declares what it overwrites, so that torch counts a new version of the logits.
@torch.library.custom_op(
    "pyrl::token_stats_grad_", mutates_args=("logits",), device_types=("cpu", "cuda")
)
def _inplace_grad_op(
    logits: Tensor,
    label: Tensor,
    options: Sequence[float],
    outputs: int,
    stats: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> None:
    label, upstream = label.contiguous(), contiguous(upstream)
    grad_into(logits, logits, label, options, outputs, stats, upstream)


def contiguous(upstream_K: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As `grad_into` reads them: autograd's may be expanded."""
    return [None if row_T is None else row_T.contiguous() for row_T in upstream_K]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    logits, label, ctx.options, ctx.outputs, ctx.inplace = inputs
    ctx.overwritten = False
    ctx.by_row = isinstance(output, tuple)
    kept: list[Tensor | None] = (
        [output]
        if isinstance(output, Tensor)
        else [
            row_T if name in READ_BACKWARD else None
            for name, row_T in zip(names(ctx.outputs), output, strict=True)
        ]
    )
    ctx.save_for_backward(logits, label, *kept)


def _backward(
    ctx: Any, upstream_K: Sequence[Tensor | None]
) -> tuple[Tensor, None, None, None, None]:
    if ctx.overwritten:
        raise RuntimeError(
            "token_stats: expected one backward pass with inplace=True, got a second one after "
            "the first wrote the gradient over the logits"
        )
    if ctx.inplace and torch.is_grad_enabled():  # create_graph=True
        refuse_second_derivatives("token_stats")
    logits, label, *stats_K = ctx.saved_tensors
    if not ctx.by_row:
        stats_K = stats_K[0].unbind(0)
    arguments = (logits, label, ctx.options, ctx.outputs, stats_K, upstream_K)
    if not ctx.inplace:
        return _grad_op(*arguments), None, None, None, None
    ctx.overwritten = True
    _inplace_grad_op(*arguments)
    return logits.detach(), None, None, None, None


def refuse_second_derivatives(name: str) -> NoReturn:
    """Raise NotImplementedError."""
    raise NotImplementedError(
        f"{name}: expected to be differentiated once, got a request for second derivatives"
    )


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """NotImplementedError for a dual tensor, whose tangent an op of torch.library would drop."""
    if torch.compiler.is_compiling():
        return
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    if any(t is not None and unpack(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{name}: expected to be differentiated backwards, got a tangent of forward mode"
        )


def _refuse(*_: Any) -> None:
    refuse_second_derivatives("token_stats")


_stats_op.register_autograd(
    lambda ctx, upstream_KT: _backward(ctx, upstream_KT.unbind(0)), setup_context=_save
)
_grad_op.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The op with a result for each row: no [K, T] upstream gradient is put together."""

    @staticmethod
    def forward(
        logits: Tensor, label: Tensor, options: Sequence[float], outputs: int, inplace: bool
    ) -> tuple[Tensor, ...]:
        stats = empty_stats(logits, outputs)
        stats_into(stats, adjacent(logits), label.contiguous(), options, outputs)
        return apart(stats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        asked = zip(names(inputs[3]), output, strict=True)
        ctx.mark_non_differentiable(*(row for name, row in asked if name not in DIFFERENTIABLE))

    @staticmethod
    def backward(ctx: Any, *upstream_K: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        return _backward(ctx, upstream_K)


_eager: Callable[..., tuple[Tensor, ...]] = _Eager.apply
