"""Types of the policy loss: csrc/loss/."""

from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pyrl._core.logits import LogitMatrix, TokenStatsOptions

# -- what a loss is (csrc/loss/spec.h, scan.h, policy_loss.h) --

class TokenColumn(IntEnum):
    logprob = 0
    entropy = 1
    anchor = 2
    trust = 3
    log_ratio = 4
    advantage = 5
    weight = 6
    low = 7
    high = 8
    dual = 9
    factor = 10
    heat = 11
    addend = 12
    target_0 = 13
    target_1 = 14
    target_2 = 15
    scale_0 = 16
    scale_1 = 17
    scale_2 = 18

class RatioKind(IntEnum):
    one = 0
    token = 1
    given = 2

class BoundsKind(IntEnum):
    none = 0
    radius = 1
    range = 2
    total_variation = 3
    binary_kl = 4

class SurrogateKind(IntEnum):
    ppo = 0
    mask_logp = 1
    clamp_logp = 2
    gppo = 3
    sigmoid = 4

class PenaltyKind(IntEnum):
    none = 0
    k1 = 1
    abs = 2
    k2 = 3
    k3 = 4
    k1_plus = 5
    k3_plus = 6
    leaky = 7

class Scan(IntEnum):
    none = 0
    seq_geo = 1
    seq_prod = 2
    cum_prod = 3
    cum_geo = 4
    min_prefix = 5

class TokenSpec:
    ratio: RatioKind
    log_ratio_low: float
    log_ratio_high: float
    pre_clip: float
    bounds: BoundsKind
    low: float
    high: float
    widen: float
    trust: bool
    surrogate: SurrogateKind
    cap: float
    outer_low: float
    outer_high: float
    outer_value: bool
    tau_positive: float
    tau_other: float
    dual: float
    redistribute: float
    penalty: tuple[PenaltyKind, PenaltyKind, PenaltyKind]
    penalty_coef: tuple[float, float, float]
    leak: float
    entropy_coef: float
    def __init__(self) -> None: ...

class PositionBounds:
    power: float
    low: float
    high: float
    dual: float
    def __init__(self) -> None: ...

class PolicyLossTotals:
    @property
    def loss(self) -> float: ...
    @property
    def weight(self) -> float: ...
    @property
    def clipped_low(self) -> float: ...
    @property
    def clipped_high(self) -> float: ...
    @property
    def clipped_dual(self) -> float: ...
    @property
    def kl_old(self) -> float: ...
    @property
    def penalty(self) -> float: ...
    @property
    def ratio(self) -> float: ...
    @property
    def ratio_max(self) -> float: ...

# -- policy_loss (columns in the order of TokenColumn) --

_Column = NDArray[np.float32] | NDArray[np.float64]

def policy_loss(
    columns: Sequence[_Column | None],
    mask_T: NDArray[np.bool_] | None,
    offset_N1: NDArray[np.int64],
    weight_N: NDArray[np.float64],
    spec: TokenSpec,
    scan: Scan,
    position: PositionBounds,
    loss_T: _Column | None,
    logprob_grad_T: _Column | None,
    entropy_grad_T: _Column | None,
) -> PolicyLossTotals: ...
def policy_loss_cuda(
    tokens: int,
    columns: Sequence[tuple[int, int]],
    mask: int,
    offset_N1: NDArray[np.int64],
    weight_N: NDArray[np.float64],
    spec: TokenSpec,
    scan: Scan,
    position: PositionBounds,
    loss: int,
    logprob_grad: int,
    entropy_grad: int,
    device: int,
    stream: int,
) -> PolicyLossTotals: ...

# -- fused_loss (addresses and statistics as in token_stats, and the bytes of a column's number) --

def fused_loss(
    logits: LogitMatrix,
    label: int,
    options: TokenStatsOptions,
    columns: Sequence[tuple[int, int]],
    spec: TokenSpec,
    stats: Mapping[str, int],
    grad: int,
    grad_row_stride: int,
    threads: int,
    device: int,
    stream: int,
) -> None: ...
