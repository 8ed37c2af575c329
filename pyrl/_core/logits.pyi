"""Types of what has a vocabulary axis: csrc/logits/."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# -- token_stats (pointers are addresses, 0 is null; device -1 is the CPU; `outputs` has a bit and
# `stat` an entry for each statistic in the order of csrc/logits/stats/token_stats.h) --

def token_stats(
    logits: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    row_stride: int,
    label: int,
    temperature: float,
    softcap: float,
    top_k: int,
    kept_share: float,
    second_temperature: float,
    nucleus: float,
    nucleus_crossing: bool,
    outputs: int,
    stats: int,
    threads: int,
    device: int,
    stream: int,
) -> None: ...
def token_stats_grad(
    logits: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    row_stride: int,
    label: int,
    temperature: float,
    softcap: float,
    top_k: int,
    kept_share: float,
    second_temperature: float,
    nucleus: float,
    nucleus_crossing: bool,
    stat: Sequence[int],
    grad_stat: Sequence[int],
    grad: int,
    grad_row_stride: int,
    threads: int,
    device: int,
    stream: int,
) -> None: ...

# -- sample_tokens --

def sample_tokens(
    data: int,
    dtype: int,
    vocabulary: int,
    row_stride: int,
    seed_B: NDArray[np.uint64],
    position_B: NDArray[np.int64],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    threads: int,
) -> tuple[
    NDArray[np.int32],
    NDArray[np.float32],
    NDArray[np.float32],
    NDArray[np.float32],
    NDArray[np.float32],
]: ...
def sample_rows(
    data: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    row_stride: int,
    uniform: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def uniforms(seed_B: NDArray[np.uint64], position_B: NDArray[np.int64]) -> NDArray[np.float64]: ...
