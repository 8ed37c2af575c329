"""Types of what has a vocabulary axis: csrc/logits/.

Integers named after a tensor are addresses; device -1 is the CPU.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

class Dtype:
    float32: ClassVar[Dtype]
    float64: ClassVar[Dtype]
    float16: ClassVar[Dtype]
    bfloat16: ClassVar[Dtype]
    __members__: ClassVar[dict[str, Dtype]]
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...

class LogitMatrix:
    """A [rows, vocabulary] matrix in memory, whose columns are adjacent; strides in elements."""

    def __init__(
        self, data: int, dtype: Dtype, rows: int, vocabulary: int, row_stride: int
    ) -> None: ...

# -- token_stats (a mapping has the address of a column of float64 for each of its statistics) --

class TokenStatsOptions:
    """The record of csrc/logits/stats/token_stats.h; a field that is not given has its default."""

    fields: ClassVar[tuple[str, ...]]
    def __init__(self, **options: float) -> None: ...

def token_stats(
    logits: LogitMatrix,
    label: int,
    options: TokenStatsOptions,
    stats: Mapping[str, int],
    threads: int,
    device: int,
    stream: int,
) -> None: ...
def token_stats_grad(
    logits: LogitMatrix,
    label: int,
    options: TokenStatsOptions,
    stats: Mapping[str, int],
    upstream: Mapping[str, int],
    grad: int,
    grad_row_stride: int,
    threads: int,
    device: int,
    stream: int,
) -> None: ...

# -- sample_tokens --

class Truncation:
    """The record of csrc/logits/sample/truncation.h; a field that is not given has its default."""

    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        top_h: float = ...,
    ) -> None: ...

def sample_tokens(
    logits: LogitMatrix,
    seed_B: NDArray[np.uint64],
    position_B: NDArray[np.int64],
    truncation: Truncation,
    exclude_E: NDArray[np.int32],
    exclude_offset_B1: NDArray[np.int64],
    threads: int,
) -> tuple[
    NDArray[np.int32],
    NDArray[np.float32],
    NDArray[np.float32],
    NDArray[np.float32],
    NDArray[np.float32],
    NDArray[np.float32],
]: ...
def sample_rows(
    logits: LogitMatrix,
    uniform: int,
    truncation: Truncation,
    exclude: int,
    exclude_offset: int,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def uniforms(seed_B: NDArray[np.uint64], position_B: NDArray[np.int64]) -> NDArray[np.float64]: ...
