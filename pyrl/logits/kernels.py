"""The row kernels of the core, called with torch tensors: csrc/logits/stats/token_stats.h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrl import _core

ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""Element types that the kernels read, by their number in csrc/logits/matrix.h."""

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
"""In the order of `Stat` in csrc/logits/stats/token_stats.h: the rows of the op's result."""

DIFFERENTIABLE = frozenset(STATS[:5])

READ_BACKWARD = frozenset({"entropy", "logsumexp", *STATS[4:7]})
"""What the gradient is computed from, beside the logits."""


def names(asked: int) -> list[str]:
    """The members of STATS that are asked for."""
    return [name for i, name in enumerate(STATS) if asked >> i & 1]


def empty_stats(rows: Tensor, asked: int) -> Tensor:
    """[K, T], not initialised."""
    return rows.new_empty((len(names(asked)), rows.shape[0]), dtype=torch.float64)


def apart(stats_KT: Tensor) -> tuple[Tensor, ...]:
    """The rows as tensors of their own in the same memory: a write to one is none to the others."""
    memory, (rows, tokens) = stats_KT.untyped_storage(), stats_KT.shape
    return tuple(
        stats_KT.new_empty(0).set_(memory, k * tokens, (tokens,), (1,)) for k in range(rows)
    )


def adjacent(matrix_TV: Tensor) -> Tensor:
    """The matrix with adjacent columns: itself or a copy."""
    columns = matrix_TV.shape[1]
    return matrix_TV if columns == 1 or matrix_TV.stride(1) == 1 else matrix_TV.contiguous()


def rows_of(logits_TV: Tensor, label_T: Tensor) -> dict[str, Any]:
    """The rows as the kernels take them, and the caller's threads."""
    return {
        "logits": logits_TV.data_ptr(),
        "dtype": ELEMENTS[logits_TV.dtype],
        "rows": logits_TV.shape[0],
        "vocabulary": logits_TV.shape[1],
        "row_stride": logits_TV.stride(0),
        "label": label_T.data_ptr(),
        "threads": torch.get_num_threads(),
    }


def device_of(tensor: Tensor) -> dict[str, Any]:
    """Where the kernels run: the CPU, or the caller's CUDA device and stream."""
    if tensor.device.type != "cuda":
        return {"device": -1, "stream": 0}
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return {"device": tensor.device.index, "stream": stream}


def column_addresses(columns: Sequence[Tensor | None]) -> list[tuple[int, int]]:
    """Of float32 or float64 columns: each one's address and the bytes of its numbers."""
    return [(0, 0) if c is None else (c.data_ptr(), c.element_size()) for c in columns]


def named(options: Sequence[float]) -> dict[str, Any]:
    """The options as the kernels take them."""
    return {name: kind(value) for (name, kind), value in zip(OPTIONS.items(), options, strict=True)}


def stats_into(
    stats_KT: Tensor, logits_TV: Tensor, label_T: Tensor, options: Sequence[float], asked: int
) -> None:
    """Compute the statistics; the logits' columns are adjacent, all else is contiguous."""
    _core.logits.token_stats(
        outputs=asked,
        stats=stats_KT.data_ptr(),
        **rows_of(logits_TV, label_T),
        **device_of(logits_TV),
        **named(options),
    )


def grad_into(
    grad_TV: Tensor,
    logits_TV: Tensor,
    label_T: Tensor,
    options: Sequence[float],
    asked: int,
    stats_K: Sequence[Tensor | None],
    upstream_K: Sequence[Tensor | None],
) -> None:
    """Write the gradient with respect to the logits; `grad_TV` may be `logits_TV`.

    Statistics, of which READ_BACKWARD are read, and their upstream gradients, None for 0, are
    float64 [T] and contiguous.
    """
    upstream = dict(zip(names(asked), upstream_K, strict=True))
    _core.logits.token_stats_grad(
        stat=_addresses(dict(zip(names(asked), stats_K, strict=True))),
        grad_stat=_addresses({name: upstream[name] for name in upstream if name in DIFFERENTIABLE}),
        grad=grad_TV.data_ptr(),
        grad_row_stride=grad_TV.stride(0),
        **rows_of(logits_TV, label_T),
        **device_of(logits_TV),
        **named(options),
    )


def _addresses(rows: Mapping[str, Tensor | None]) -> list[int]:
    """Of the row of each member of STATS; 0 for one that is not there."""
    found = (rows.get(name) for name in STATS)
    return [0 if row_T is None else row_T.data_ptr() for row_T in found]
