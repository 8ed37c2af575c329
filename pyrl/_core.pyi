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
