import numpy as np
from numpy.typing import NDArray

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
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]: ...
def uniforms(seed_B: NDArray[np.uint64], position_B: NDArray[np.int64]) -> NDArray[np.float64]: ...

# -- token_stats (pointers are addresses; device -1 is the CPU) --

def token_stats(
    logits: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    row_stride: int,
    label: int,
    temperature: float,
    logprob: int,
    entropy: int,
    logsumexp: int,
    confidence: int,
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
    entropy: int,
    logsumexp: int,
    grad_logprob: int,
    grad_entropy: int,
    grad_logsumexp: int,
    grad: int,
    grad_row_stride: int,
    device: int,
    stream: int,
) -> None: ...
