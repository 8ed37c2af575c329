"""The row kernels of the core, called with torch tensors: csrc/logits/stats/token_stats.h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrl import _core
from pyrl._core.logits import Dtype, LogitMatrix, TokenStatsOptions
from pyrl.checks import described

ELEMENTS = {
    torch.float32: Dtype.float32,
    torch.float64: Dtype.float64,
    torch.float16: Dtype.float16,
    torch.bfloat16: Dtype.bfloat16,
}
"""Element types that the kernels read."""


def check_tensors(**given: object) -> None:
    """TypeError names the first argument that is no tensor, and what came in its place."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {described(value)}")


def matrix_of(logits_TV: Tensor) -> LogitMatrix:
    """The logits, whose columns are adjacent, as the kernels take them."""
    rows, vocabulary = logits_TV.shape
    dtype = ELEMENTS[logits_TV.dtype]
    return LogitMatrix(logits_TV.data_ptr(), dtype, rows, vocabulary, logits_TV.stride(0))


def empty_stats(rows: Tensor, asked: Sequence[str]) -> Tensor:
    """A row for each of K statistics, [K, T], not initialised."""
    return rows.new_empty((len(asked), rows.shape[0]), dtype=torch.float64)


def apart(stats_KT: Tensor) -> tuple[Tensor, ...]:
    """The rows as separate tensors in the same memory: a write to one is none to the others."""
    memory, (rows, tokens) = stats_KT.untyped_storage(), stats_KT.shape
    return tuple(
        stats_KT.new_empty(0).set_(memory, k * tokens, (tokens,), (1,)) for k in range(rows)
    )


def adjacent(matrix_TV: Tensor) -> Tensor:
    """The matrix with adjacent columns: itself or a copy."""
    columns = matrix_TV.shape[1]
    return matrix_TV if columns == 1 or matrix_TV.stride(1) == 1 else matrix_TV.contiguous()


def device_of(tensor: Tensor) -> dict[str, Any]:
    """Where the kernels run: the CPU, or the caller's CUDA device and stream."""
    if tensor.device.type != "cuda":
        return {"device": -1, "stream": 0}
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return {"device": tensor.device.index, "stream": stream}


def column_addresses(columns: Sequence[Tensor | None]) -> list[tuple[int, int]]:
    """The address of each float32 or float64 column and the bytes of its numbers; (0, 0): none."""
    return [(0, 0) if c is None else (c.data_ptr(), c.element_size()) for c in columns]


def stat_addresses(stats_KT: Tensor, asked: Sequence[str]) -> dict[str, int]:
    """The address of the row of each statistic; the rows are adjacent."""
    begin, size = stats_KT.data_ptr(), stats_KT.shape[1] * stats_KT.element_size()
    return {name: begin + k * size for k, name in enumerate(asked)}


def stats_into(
    stats_KT: Tensor,
    logits_TV: Tensor,
    label_T: Tensor,
    options: TokenStatsOptions,
    asked: Sequence[str],
) -> None:
    """Compute the statistics; the logits' columns are adjacent, all else is contiguous."""
    _core.logits.token_stats(
        logits=matrix_of(logits_TV),
        label=label_T.data_ptr(),
        options=options,
        stats=stat_addresses(stats_KT, asked),
        threads=torch.get_num_threads(),
        **device_of(logits_TV),
    )


def grad_into(
    grad_TV: Tensor,
    logits_TV: Tensor,
    label_T: Tensor,
    options: TokenStatsOptions,
    stats: Mapping[str, Tensor | None],
    upstream: Mapping[str, Tensor | None],
) -> None:
    """Write the gradient with respect to the logits; `grad_TV` may be `logits_TV`.

    Statistics and their upstream gradients, None for 0, are float64 [T] and contiguous.
    """
    _core.logits.token_stats_grad(
        logits=matrix_of(logits_TV),
        label=label_T.data_ptr(),
        options=options,
        stats=_addresses(stats),
        upstream=_addresses(upstream),
        grad=grad_TV.data_ptr(),
        grad_row_stride=grad_TV.stride(0),
        threads=torch.get_num_threads(),
        **device_of(logits_TV),
    )


def _addresses(columns: Mapping[str, Tensor | None]) -> dict[str, int]:
    return {name: c.data_ptr() for name, c in columns.items() if c is not None}
