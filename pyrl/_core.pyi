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
    threads: int,
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
    entropy: int,
    logsumexp: int,
    grad_logprob: int,
    grad_entropy: int,
    grad_logsumexp: int,
    grad: int,
    grad_row_stride: int,
    threads: int,
    device: int,
    stream: int,
) -> None: ...

# -- policy_loss (an empty ref_logprob_T: no reference) --

def policy_loss_float32(
    logprob_T: NDArray[np.float32],
    entropy_T: NDArray[np.float32],
    old_logprob_T: NDArray[np.float32],
    advantage_T: NDArray[np.float32],
    weight_T: NDArray[np.float32],
    clip_low_T: NDArray[np.float32],
    clip_high_T: NDArray[np.float32],
    ref_logprob_T: NDArray[np.float32],
    dual_clip: float,
    kl: int,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], tuple[float, ...]]: ...
def policy_loss_float64(
    logprob_T: NDArray[np.float64],
    entropy_T: NDArray[np.float64],
    old_logprob_T: NDArray[np.float64],
    advantage_T: NDArray[np.float64],
    weight_T: NDArray[np.float64],
    clip_low_T: NDArray[np.float64],
    clip_high_T: NDArray[np.float64],
    ref_logprob_T: NDArray[np.float64],
    dual_clip: float,
    kl: int,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], tuple[float, ...]]: ...
