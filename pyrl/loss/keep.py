"""Keep and select: the tokens whose policy term counts, and those that a penalty is put on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyrl._core.loss import LossColumns
from pyrl.checks import ordered
from pyrl.loss.axis import LossState

LEVELS = {"token": 0, "seq_sum": 1, "seq_mean": 2, "seq_max": 3}
MISMATCHES = {"rho": 0, "k1": 1, "k2": 2, "k3": 3}


@dataclass(frozen=True)
class Matched:
    """Keeps tokens, or responses, whose mismatch statistic lies in [low, high].

    Of x = old - rollout: rho = exp(x), k1 = x, k2 = x^2 / 2, k3 = exp(x) - 1 - x. seq_sum and
    seq_mean of rho are exp of those of x: the product and the geometric mean.
    """

    low: float
    high: float
    statistic: Literal["rho", "k1", "k2", "k3"] = "rho"
    level: Literal["token", "seq_sum", "seq_mean", "seq_max"] = "token"
    shrink: bool = True

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """Columns: old_logprob_T, rollout_logprob_T."""
        level, mismatch = LEVELS[self.level], MISMATCHES[self.statistic]
        return columns.keep_matched(mismatch, level, self.low, self.high)


@dataclass(frozen=True)
class NearGenerator:
    """F-TIS: keeps A > 0, and responses whose sum of rollout - old is below gamma."""

    gamma: float = 50.0
    shrink: bool = False

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """Columns: advantage_T, old_logprob_T, rollout_logprob_T."""
        return columns.keep_near_generator(self.gamma)


@dataclass(frozen=True)
class ClipCov:
    """Drops a random share of the tokens whose covariance lies in (low, high).

    Covariance: (A - mean A)(logprob - mean logprob); max(1, int(share n)) tokens that are not
    clipped already (arXiv:2505.22617).
    """

    low: float = 1.0
    high: float = 5.0
    share: float = 2e-4
    shrink: bool = False

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """Columns: advantage_T, logprob_T, old_logprob_T."""
        return columns.keep_outside_covariance(
            self.low, self.high, self.share, *state.radii, state.seed
        )


@dataclass(frozen=True)
class ClipB:
    """Drops A < 0 where p (H + log p) is mu deviations below its mean (arXiv:2602.03392)."""

    mu: float = 2.5
    policy: Literal["old", "rollout"] = "old"
    """Whose log-probability."""
    shrink: bool = True

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """Columns: advantage_T, entropy_T, old_logprob_T or rollout_logprob_T."""
        return columns.keep_by_score(self.policy == "rollout", self.mu)


@dataclass(frozen=True)
class ClipV:
    """Drops A <= 0 whose centred score exceeds mu deviations (arXiv:2602.03392).

    Score: H sum p^2 + sum p^2 log p - p (H + log p); at most max(1, int(max_share n)) tokens.
    """

    mu: float = 8.5
    max_share: float = 1e-4
    policy: Literal["old", "rollout"] = "old"
    shrink: bool = True

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """Columns: advantage_T, entropy_T, sum_p2_T, sum_p2_logp_T and a policy's logprob."""
        return columns.keep_by_centred_score(self.policy == "rollout", self.mu, self.max_share)


@dataclass(frozen=True)
class TopEntropy:
    """Keeps tokens at or above the quantile 1 - share of entropy (arXiv:2506.01939)."""

    share: float = 0.2
    shrink: bool = True

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """Columns: entropy_T."""
        return columns.keep_top_entropy(self.share)


@dataclass(frozen=True)
class TopCovariance:
    """KL-Cov: the max(1, int(share n)) tokens of largest covariance (arXiv:2505.22617)."""

    share: float = 2e-3

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """Columns: advantage_T, logprob_T."""
        return columns.choose_covariance(self.share)


@dataclass(frozen=True)
class Improbable:
    """Lp-Reg: of A < 0, the least probable share where that is below the proxy (arXiv:2510.03222).

    None if that share is one token.
    """

    share: float = 0.01

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """Columns: advantage_T, logprob_T, proxy_logprob_T."""
        return columns.choose_improbable(self.share)
