"""Statistics of the tokens behind a matrix of logits, and their gradient.

One sweep over each row computes whatever is asked for; the backward pass recomputes the
probabilities from the logits and 24 bytes per token, so nothing else of size [T, V] is kept.
Formulas: csrc/logits/stats/token_stats.h.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NoReturn, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyrl._core.logits import TokenStatsOptions
from pyrl.checks import described
from pyrl.logits.graph import traced
from pyrl.logits.kernels import (
    ELEMENTS,
    adjacent,
    apart,
    check_tensors,
    empty_stats,
    grad_into,
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
    """Log-prob of the label (nats)."""
    entropy: Tensor
    """Over the whole vocabulary (nats)."""
    logsumexp: Tensor
    """Log-sum-exp of logits / temperature (nats)."""
    self_certainty: Tensor | None = None
    """KL(uniform || p) (nats); a masked token makes it infinite."""
    nucleus_entropy: Tensor | None = None
    """Entropy of p restricted to the nucleus and renormalised (nats), as SIREN uses it; the
    gradient takes the nucleus as given."""
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


STATS = tuple(field.name for field in fields(TokenStats))
DIFFERENTIABLE = frozenset(STATS[:5])
READ_BACKWARD = frozenset({"entropy", "logsumexp", *STATS[4:7]})
"""What the gradient is computed from, beside the logits."""


class Options(TypedDict, total=False):
    """The keywords of `token_stats` that ask for something, as other functions take them."""

    softcap: float | None
    top_k: int
    self_certainty: bool
    max_probability: bool
    squares: bool
    kept_share: float | None
    second_temperature: float | None
    nucleus: float | None
    nucleus_keeps_crossing: bool


@dataclass(frozen=True)
class Request:
    """What `token_stats` is asked for; ValueError for an option outside its range."""

    temperature: float = 1.0
    softcap: float | None = None
    top_k: int = 0
    self_certainty: bool = False
    max_probability: bool = False
    squares: bool = False
    kept_share: float | None = None
    second_temperature: float | None = None
    nucleus: float | None = None
    nucleus_keeps_crossing: bool = True

    def __post_init__(self) -> None:
        for name in ("temperature", "softcap", "second_temperature"):
            value = getattr(self, name)
            if isinstance(value, str) or (value is None and name == "temperature"):
                raise TypeError(f"{name}: expected a number, got {described(value)}")
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a finite number > 0, got {value}")
        for name in ("kept_share", "nucleus"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
        if self.top_k not in range(LARGEST_TOP_K + 1):
            raise ValueError(
                f"top_k: expected a whole number, 0 to {LARGEST_TOP_K}, got {self.top_k}"
            )

    @classmethod
    def of(cls, function: str, temperature: float, options: Options) -> Request:
        """The request of a function with keywords `options`; TypeError for one that is unknown."""
        for name in options.keys() - _KINDS.keys():
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        return cls(temperature, **options)

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the statistics to compute, in the order of STATS."""
        wanted = {
            "self_certainty": self.self_certainty,
            "nucleus_entropy": self.nucleus is not None,
            "nucleus_threshold": self.nucleus is not None,
            "nucleus_log_mass": self.nucleus is not None,
            "confidence": self.top_k > 0,
            "max_probability": self.max_probability,
            "sum_p2": self.squares,
            "sum_p2_logp": self.squares,
            "kept_mass": self.kept_share is not None,
            "second_logprob": self.second_temperature is not None,
        }
        return (*STATS[:3], *(name for name, is_wanted in wanted.items() if is_wanted))

    @property
    def options(self) -> TokenStatsOptions:
        """The options as the kernels read them."""
        values = {name: getattr(self, name) for name in TokenStatsOptions.fields}
        return TokenStatsOptions(**{n: value for n, value in values.items() if value is not None})

    def packed(self) -> list[float]:
        """A number for each field, as the ops take the request; 0 for None."""
        return [float(getattr(self, name) or 0) for name in _KINDS]

    @classmethod
    def unpacked(cls, numbers: Sequence[float]) -> Request:
        """The request of these numbers: None where 0 is no value of the option."""
        values: dict[str, Any] = {}
        for (name, kind), number in zip(_KINDS.items(), numbers, strict=True):
            values[name] = kind(number) if kind else number or None
        return cls(**values)


_KINDS: dict[str, type | None] = {
    field.name: None if field.default is None else type(field.default) for field in fields(Request)
}
"""The type of each field of a Request; None for a number > 0, or None."""


@lru_cache
def kernel_request(*numbers: float) -> tuple[TokenStatsOptions, tuple[str, ...]]:
    """Options and statistics of a packed request; kept, since an op repeats its request."""
    request = Request.unpacked(numbers)
    return request.options, request.asked


_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows_options(function: _Function) -> _Function:
    """A decorator for a function with keywords `**options: Unpack[Options]`: help() lists them."""
    own = inspect.signature(function)
    options = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(Request).parameters.items()
        if name not in own.parameters
    ]
    kept = [p for p in own.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    vars(function)["__signature__"] = own.replace(parameters=[*kept, *options])
    return function


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
    Raises TypeError for arguments that are no tensors.
    """
    check_rows(logits_TV, label_T, inplace=inplace)
    request = Request(
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
    if traced(logits_TV):
        stats_K = _stats_op(logits_TV, label_T, request.packed(), inplace).unbind(0)
    else:
        stats_K = _eager(logits_TV, label_T, request, inplace)
    return record(stats_K, request.asked)


def record(stats_K: Sequence[Tensor], asked: Sequence[str]) -> TokenStats:
    """The statistics by name, those without a gradient detached.

    Rows of `unbind` and not of an index each, whose backward pass makes K tensors [K, T].
    """
    return TokenStats(
        **{
            name: row_T if name in DIFFERENTIABLE else row_T.detach()
            for name, row_T in zip(asked, stats_K, strict=True)
        }
    )


def check_rows(logits_TV: Tensor, label_T: Tensor, *, inplace: bool) -> None:
    """ValueError unless the kernels can read the logits, and with `inplace` overwrite them.

    TypeError for arguments that are no tensors.
    """
    check_tensors(logits_TV=logits_TV, label_T=label_T)
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


# -- the ops; they carry a request as the numbers of `Request.packed` --


def _stats(
    logits: Tensor, label: Tensor, options: TokenStatsOptions, asked: Sequence[str]
) -> Tensor:
    stats = empty_stats(logits, asked)
    stats_into(stats, adjacent(logits), label.contiguous(), options, asked)
    return stats


@torch.library.custom_op("pyrl::token_stats", mutates_args=(), device_types=("cpu", "cuda"))
def _stats_op(logits: Tensor, label: Tensor, request: Sequence[float], inplace: bool) -> Tensor:
    return _stats(logits, label, *kernel_request(*request))


@_stats_op.register_fake
def _(logits: Tensor, _label: Tensor, request: Sequence[float], *_: Any) -> Tensor:
    return empty_stats(logits, Request.unpacked(request).asked)


def _grad(
    grad: Tensor,
    logits: Tensor,
    label: Tensor,
    request: Sequence[float],
    stats: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> None:
    options, asked = kernel_request(*request)
    named_stats = dict(zip(asked, stats, strict=True))
    named_upstream = dict(zip(asked, contiguous(upstream), strict=True))
    grad_into(grad, logits, label.contiguous(), options, named_stats, named_upstream)


@torch.library.custom_op("pyrl::token_stats_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _grad_op(
    logits: Tensor,
    label: Tensor,
    request: Sequence[float],
    stats: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> Tensor:
    logits = adjacent(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _grad(grad, logits, label, request, stats, upstream)
    return grad


@_grad_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# Declares what it overwrites, so that torch counts a new version of the logits.
@torch.library.custom_op(
    "pyrl::token_stats_grad_", mutates_args=("logits",), device_types=("cpu", "cuda")
)
def _inplace_grad_op(
    logits: Tensor,
    label: Tensor,
    request: Sequence[float],
    stats: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> None:
    _grad(logits, logits, label, request, stats, upstream)


def contiguous(upstream_K: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients as `grad_into` reads them, since autograd may have expanded them."""
    return [None if row_T is None else row_T.contiguous() for row_T in upstream_K]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    logits, label, request, ctx.inplace = inputs
    ctx.overwritten = False
    ctx.by_row = isinstance(output, tuple)
    kept: list[Tensor | None]
    if isinstance(output, Tensor):
        kept, ctx.request = [output], request
    else:
        named = zip(request.asked, output, strict=True)
        kept = [row_T if name in READ_BACKWARD else None for name, row_T in named]
        ctx.request = request.packed()
    ctx.save_for_backward(logits, label, *kept)


def _backward(ctx: Any, upstream_K: Sequence[Tensor | None]) -> tuple[Tensor, None, None, None]:
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
    arguments = (logits, label, ctx.request, stats_K, upstream_K)
    if not ctx.inplace:
        return _grad_op(*arguments), None, None, None
    ctx.overwritten = True
    _inplace_grad_op(*arguments)
    return logits.detach(), None, None, None


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
        logits: Tensor, label: Tensor, request: Request, inplace: bool
    ) -> tuple[Tensor, ...]:
        return apart(_stats(logits, label, request.options, request.asked))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        _, _, request, _ = inputs
        asked = zip(request.asked, output, strict=True)
        ctx.mark_non_differentiable(*(row for name, row in asked if name not in DIFFERENTIABLE))

    @staticmethod
    def backward(ctx: Any, *upstream_K: Tensor | None) -> tuple[Tensor, None, None, None]:
        return _backward(ctx, upstream_K)


_eager: Callable[..., tuple[Tensor, ...]] = _Eager.apply
