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
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# -- advantage --

def group_advantage(
    group_N: NDArray[np.int64],
    reward_N: NDArray[np.float64],
    *,
    scale: Literal["none", "std"],
    ddof: int,
    eps: float,
    leave_one_out: bool,
    single: Literal["zero", "reward"],
) -> NDArray[np.float64]: ...
def group_mean(
    group_N: NDArray[np.int64], value_N: NDArray[np.float64]
) -> NDArray[np.float64]: ...
def whiten(value_T: NDArray[np.float64], eps: float) -> NDArray[np.float64]: ...
def ancestor_advantage(
    parent_S: NDArray[np.int64],
    leaf_segment_N: NDArray[np.int64],
    group_N: NDArray[np.int64],
    reward_N: NDArray[np.float64],
    *,
    ancestors: Literal["root", "root+parent", "root+trunk", "all"],
    weight: Literal["one", "mean", "leaves", "std"],
    per: Literal["leaf", "segment"],
    leave_one_out: bool,
    sqrt_leaves: bool,
    ddof: int,
    eps: float,
    single: Literal["zero", "reward"],
) -> NDArray[np.float64]: ...
def treerl_released_advantage(
    parent_S: NDArray[np.int64],
    length_S: NDArray[np.int64],
    leaf_segment_N: NDArray[np.int64],
    group_N: NDArray[np.int64],
    reward_N: NDArray[np.float64],
    *,
    by_token: bool,
) -> NDArray[np.float64]: ...
