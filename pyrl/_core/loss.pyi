"""Types of the policy loss: csrc/loss/."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pyrl._core.logits import LogitMatrix, TokenStatsOptions

# -- fused_loss (addresses and statistics as in token_stats; columns and spec as below) --

def fused_loss(
    logits: LogitMatrix,
    label: int,
    options: TokenStatsOptions,
    columns: Sequence[tuple[int, int]],
    spec: Sequence[float],
    stats: Mapping[str, int],
    grad: int,
    grad_row_stride: int,
    threads: int,
    device: int,
    stream: int,
) -> None: ...

# -- policy_loss (csrc/loss/token.h: the order of columns and of the numbers of a spec) --

_Column = NDArray[np.float32] | NDArray[np.float64]

def policy_loss(
    columns: Sequence[_Column | None],
    mask_T: NDArray[np.bool_] | None,
    offset_N1: NDArray[np.int64],
    weight_N: NDArray[np.float64],
    spec: Sequence[float],
    scan: int,
    position: Sequence[float],
    loss_T: _Column | None,
    logprob_grad_T: _Column | None,
    entropy_grad_T: _Column | None,
) -> tuple[float, ...]: ...
def policy_loss_cuda(
    tokens: int,
    columns: Sequence[tuple[int, int]],
    mask: int,
    offset_N1: NDArray[np.int64],
    weight_N: NDArray[np.float64],
    spec: Sequence[float],
    scan: int,
    position: Sequence[float],
    loss: int,
    logprob_grad: int,
    entropy_grad: int,
    device: int,
    stream: int,
) -> tuple[float, ...]: ...

# -- policy_terms (csrc/loss/terms.h) --

class LossColumns:
    def __init__(
        self,
        tokens: int,
        columns: Mapping[str, _Column],
        mask_T: NDArray[np.bool_] | None = None,
        offset_N1: NDArray[np.int64] | None = None,
        group_N: NDArray[np.int64] | None = None,
    ) -> None: ...
    def entropy_advantage(self, k: float) -> NDArray[np.float64]: ...
    def blend_advantage(
        self, target: float, limit: float, measured: float
    ) -> NDArray[np.float64]: ...
    def token_group_advantage(self, limit: float) -> NDArray[np.float64]: ...
    def band_advantage(self, low: float, high: float) -> NDArray[np.float64]: ...
    def sign_advantage(self, positive: bool) -> NDArray[np.float64]: ...
    def expert_scale(self, passed: float) -> NDArray[np.float64]: ...
    def importance(
        self, level: int, cap: float, floor: float, normalize: bool
    ) -> NDArray[np.float64]: ...
    def importance_window(self, low: float, high: float) -> NDArray[np.float64]: ...
    def steer(self, exponential: bool, least: float, most: float) -> NDArray[np.float64]: ...
    def entropy_heat(self) -> NDArray[np.float64]: ...
    def entropy_band(
        self, level: int, low: float, high: float, height: float
    ) -> NDArray[np.float64]: ...
    def nucleus_peaks(self, quantile: float) -> tuple[float, NDArray[np.float64]]: ...
    def keep_outside_covariance(
        self,
        lower: float,
        upper: float,
        share: float,
        clip_low: float,
        clip_high: float,
        seed: int,
    ) -> NDArray[np.bool_]: ...
    def choose_covariance(self, share: float) -> NDArray[np.bool_]: ...
    def choose_improbable(self, share: float) -> NDArray[np.bool_]: ...
    def keep_by_score(self, rollout: bool, mu: float) -> NDArray[np.bool_]: ...
    def keep_by_centred_score(
        self, rollout: bool, mu: float, max_share: float
    ) -> NDArray[np.bool_]: ...
    def keep_top_entropy(self, share: float) -> NDArray[np.bool_]: ...
    def keep_matched(
        self, mismatch: int, level: int, low: float, high: float
    ) -> NDArray[np.bool_]: ...
    def keep_near_generator(self, gamma: float) -> NDArray[np.bool_]: ...

def count_tokens(
    tokens: int, mask_T: NDArray[np.bool_] | None, offset_N1: NDArray[np.int64]
) -> NDArray[np.int64]: ...
