"""Statistics of the tokens behind a matrix of logits, and their gradient.

One sweep over each row computes whatever is asked for; the backward pass recomputes the
probabilities from the logits and 24 bytes per token, so nothing else of size [T, V] is kept.
Formulas: csrc/token_stats.h.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyrl import _core

IGNORED_LABEL = -100
"""A row with this label has zero outputs and a zero gradient."""

ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""Element types that the kernels read, by their number in csrc/logit_matrix.h."""

LARGEST_TOP_K = 8

OPTIONS: dict[str, type] = {
    "temperature": float,
    "softcap": float,
    "top_k": int,
    "kept_share": float,
    "second_temperature": float,
    "nucleus": float,
    "nucleus_crossing": bool,
}
"""As the kernels take them."""

STATS = (
    "logprob",
    "entropy",
    "logsumexp",
    "self_certainty",
    "nucleus_entropy",
    "nucleus_threshold",
    "nucleus_log_mass",
    "confidence",
    "max_probability",
    "sum_p2",
    "sum_p2_logp",
    "kept_mass",
    "second_logprob",
)
"""In the order of `Stat` in csrc/token_stats.h: the rows of the op's result."""

DIFFERENTIABLE = frozenset(STATS[:5])


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
    does a row with NaN or +inf. The backward pass cannot be differentiated again.

    `inplace=True`: the backward pass writes the gradient over the logits, which nothing else may
    need by then. A second backward pass, or one of another operation that saved these logits,
    raises RuntimeError.

    Raises ValueError for wrong shapes, dtypes or devices, an option outside its range, or logits
    that cannot be overwritten with `inplace=True`: columns not adjacent or rows that overlap.
    """
    check_rows(logits_TV, label_T, inplace=inplace)
    options = options_list(
        temperature,
        softcap=softcap,
        top_k=top_k,
        kept_share=kept_share,
        second_temperature=second_temperature,
        nucleus=nucleus,
        nucleus_keeps_crossing=nucleus_keeps_crossing,
    )
    asked = asked_for(options, self_certainty, max_probability, squares)
    return record(_stats_op(logits_TV, label_T, options, asked, inplace), asked)


def options_list(
    temperature: float,
    *,
    softcap: float | None = None,
    top_k: int = 0,
    kept_share: float | None = None,
    second_temperature: float | None = None,
    nucleus: float | None = None,
    nucleus_keeps_crossing: bool = True,
) -> list[float]:
    """As the ops take them: in the order of OPTIONS, 0 for what is off.

    Raises ValueError for one outside its range.
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
    if not 0 <= top_k <= LARGEST_TOP_K:
        raise ValueError(f"top_k: expected 0 to {LARGEST_TOP_K}, got {top_k}")
    optional = (softcap, top_k, kept_share, second_temperature, nucleus)
    return [temperature, *(float(value or 0) for value in optional), float(nucleus_keeps_crossing)]


def asked_for(
    options: Sequence[float],
    self_certainty: bool = False,
    max_probability: bool = False,
    squares: bool = False,
) -> int:
    """One bit for each member of STATS; the first three are always computed."""
    _, _, top_k, kept_share, second_temperature, nucleus, _ = (value > 0 for value in options)
    asked = (
        *[True] * 3,
        self_certainty,
        *[nucleus] * 3,
        top_k,
        max_probability,
        *[squares] * 2,
        kept_share,
        second_temperature,
    )
    return sum(int(bit) << i for i, bit in enumerate(asked))


def record(stats_KT: Tensor, asked: int) -> TokenStats:
    """The op's rows by name, those without a gradient detached."""
    # unbind and not an index each: its backward pass makes one [K, T] tensor instead of K.
    return TokenStats(
        **{
            name: row_T if name in DIFFERENTIABLE else row_T.detach()
            for name, row_T in zip(names(asked), stats_KT.unbind(0), strict=True)
        }
    )


def names(asked: int) -> list[str]:
    """The members of STATS that are asked for."""
    return [name for i, name in enumerate(STATS) if asked >> i & 1]


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


# -- kernels --


def adjacent(matrix_TV: Tensor) -> Tensor:
    """The matrix with adjacent columns: itself or a copy."""
    columns = matrix_TV.shape[1]
    return matrix_TV if columns == 1 or matrix_TV.stride(1) == 1 else matrix_TV.contiguous()


def arguments(logits_TV: Tensor, label_T: Tensor, options: Sequence[float]) -> dict[str, Any]:
    """What the kernels take: the matrix, the options and the caller's threads or CUDA stream."""
    cuda = logits_TV.device.type == "cuda"
    return {
        "logits": logits_TV.data_ptr(),
        "dtype": ELEMENTS[logits_TV.dtype],
        "rows": logits_TV.shape[0],
        "vocabulary": logits_TV.shape[1],
        "row_stride": logits_TV.stride(0),
        "label": label_T.data_ptr(),
        "threads": torch.get_num_threads(),
        "device": logits_TV.device.index if cuda else -1,
        "stream": torch.cuda.current_stream(logits_TV.device).cuda_stream if cuda else 0,
        **{name: kind(value) for (name, kind), value in zip(OPTIONS.items(), options, strict=True)},
    }


def stats_into(
    stats_KT: Tensor, logits_TV: Tensor, label_T: Tensor, options: Sequence[float], asked: int
) -> None:
    """Compute the statistics; the logits' columns are adjacent, all else is contiguous."""
    _core.token_stats(
        outputs=asked, stats=stats_KT.data_ptr(), **arguments(logits_TV, label_T, options)
    )


def grad_into(
    grad_TV: Tensor,
    logits_TV: Tensor,
    label_T: Tensor,
    options: Sequence[float],
    asked: int,
    stats_KT: Tensor,
    upstream_KT: Tensor,
) -> None:
    """Write the gradient with respect to the logits; `grad_TV` may be `logits_TV`."""
    _core.token_stats_grad(
        stat=_addresses(stats_KT, asked, STATS),
        grad_stat=_addresses(upstream_KT, asked, DIFFERENTIABLE),
        grad=grad_TV.data_ptr(),
        grad_row_stride=grad_TV.stride(0),
        **arguments(logits_TV, label_T, options),
    )


def _addresses(rows_KT: Tensor, asked: int, wanted: Collection[str]) -> list[int]:
    """Of the row of each member of STATS; 0 for one that is not there or not wanted."""
    step = rows_KT.shape[1] * rows_KT.element_size()
    at = {name: rows_KT.data_ptr() + k * step for k, name in enumerate(names(asked))}
    return [at[name] if name in at and name in wanted else 0 for name in STATS]


# -- the ops --


@torch.library.custom_op("pyrl::token_stats", mutates_args=(), device_types=("cpu", "cuda"))
def _stats_op(
    logits: Tensor, label: Tensor, options: Sequence[float], outputs: int, inplace: bool
) -> Tensor:
    stats = empty_stats(logits, outputs)
    stats_into(stats, adjacent(logits), label.contiguous(), options, outputs)
    return stats


def empty_stats(rows: Tensor, asked: int) -> Tensor:
    """[K, T], not initialised."""
    return rows.new_empty((len(names(asked)), rows.shape[0]), dtype=torch.float64)


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
    stats: Tensor,
    upstream: Tensor,
) -> Tensor:
    logits = adjacent(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    label, stats, upstream = label.contiguous(), stats.contiguous(), upstream.contiguous()
    grad_into(grad, logits, label, options, outputs, stats, upstream)
    return grad


@_grad_op.register_fake
def _(
    logits: Tensor,
    label: Tensor,
    options: Sequence[float],
    outputs: int,
    stats: Tensor,
    upstream: Tensor,
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
    stats: Tensor,
    upstream: Tensor,
) -> None:
    label, stats, upstream = label.contiguous(), stats.contiguous(), upstream.contiguous()
    grad_into(logits, logits, label, options, outputs, stats, upstream)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, label, ctx.options, ctx.outputs, ctx.inplace = inputs
    ctx.overwritten = False
    ctx.save_for_backward(logits, label, output)


def _backward(ctx: Any, upstream_KT: Tensor) -> tuple[Tensor, None, None, None, None]:
    if ctx.overwritten:
        raise RuntimeError(
            "token_stats: expected one backward pass with inplace=True, got a second one after "
            "the first wrote the gradient over the logits"
        )
    if ctx.inplace and torch.is_grad_enabled():  # create_graph=True
        refuse_second_derivatives("token_stats")
    logits, label, stats = ctx.saved_tensors
    arguments = (logits, label, ctx.options, ctx.outputs, stats, upstream_KT)
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


def _refuse(*_: Any) -> None:
    refuse_second_derivatives("token_stats")


_stats_op.register_autograd(_backward, setup_context=_save)
_grad_op.register_autograd(_refuse)
