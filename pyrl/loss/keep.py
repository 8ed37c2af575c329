"""Values of a loss's axes: what is reshaped, weighed, kept and selected once per update.

Each reads columns of the whole mini-batch, of the tokens that take part alone. Formulas of the
C++ side: csrc/policy_terms.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, inf, pi
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyrl._core import LossColumns
from pyrl.checks import at_least, ordered
from pyrl.loss.loss import LossState

LEVELS = {"token": 0, "seq_sum": 1, "seq_mean": 2, "seq_max": 3, "sequence": 1}
MISMATCHES = {"rho": 0, "k1": 1, "k2": 2, "k3": 3}

# -- reshape: advantages --


@dataclass(frozen=True)
class EntropyZ:
    """A (1 + scale z), z the entropy standardised over the batch (arXiv:2510.14545)."""

    scale: float = 0.2

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T, entropy_T."""
        return columns.entropy_advantage(self.scale)


@dataclass(frozen=True)
class Blend:
    """DCPO: mixes in reward times the ratio of a second temperature to the first.

    (1 - alpha) A + alpha R rho, alpha = a / (1 + a), a = min(|target - entropy|, limit) / share of
    responses with a reward; alpha = 0 without any. The second temperature is the caller's choice.
    """

    target: float = 0.5
    """Wanted entropy (nats)."""
    limit: float = 0.1

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T, reward_T, second_logprob_T, old_logprob_T; state.entropy."""
        if state.entropy is None:
            raise ValueError("Blend: needs state.entropy, the entropy of the last update")
        return columns.blend_advantage(self.target, self.limit, state.entropy)


@dataclass(frozen=True)
class TokenGroup:
    """HAPO: rewards normalised over all tokens of a question (arXiv:2509.16591).

    A question keeps its advantages if a normalised reward is `limit` or more.
    """

    limit: float = 5.0

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T, reward_T, group_N."""
        return columns.token_group_advantage(self.limit)


@dataclass(frozen=True)
class EntropyBand:
    """Entrocraft: only positive rewards above a band of the batch's entropy, only negative below.

    Rewards must be -1 or 1. The band moves from its first to its second pair over the run.
    """

    low: tuple[float, float] = (0.6, 0.4)
    high: tuple[float, float] = (0.7, 0.5)
    cosine: bool = False

    def band(self, progress: float) -> tuple[float, float]:
        """Of a share of the run (nats)."""
        share = 0.5 * (1 - cos(pi * progress)) if self.cosine else progress
        low, high = (start + (end - start) * share for start, end in (self.low, self.high))
        return low, high

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T, reward_T, entropy_T."""
        return columns.band_advantage(*self.band(state.progress))


@dataclass(frozen=True)
class SignFilter:
    """Keeps advantages of one sign; the others become 0."""

    keep: Literal["positive", "negative"] = "positive"

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: advantage_T."""
        return columns.sign_advantage(self.keep == "positive")


# -- behaviour: rho = exp(old - rollout), detached --


@dataclass(frozen=True)
class TIS:
    """Truncated importance weight max(floor, min(rho, cap)) of a token or a whole response."""

    cap: float = 2.0
    level: Literal["token", "sequence"] = "token"
    floor: float = 0.0
    normalize: bool = False
    """Divide by the mean over tokens, or responses."""

    def __post_init__(self) -> None:
        at_least(0, self, "floor")
        ordered(self, self.floor, self.cap)

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: old_logprob_T, rollout_logprob_T."""
        return columns.importance(LEVELS[self.level], self.cap, self.floor, self.normalize)


@dataclass(frozen=True)
class IcePop:
    """rho where it lies in [low, high], else 0: such a token has no policy term."""

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: old_logprob_T, rollout_logprob_T."""
        return columns.importance_window(self.low, self.high)


# -- weight --


@dataclass(frozen=True)
class Steer:
    """Smaller weights for tokens that change the entropy more (arXiv:2510.10150).

    linear: from `most` down to `least` over the batch's range of |Omega|; exp: from 1 to `least`.
    """

    shape: Literal["linear", "exp"] = "linear"
    least: float = 0.8
    most: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most < inf:
            raise ValueError(f"Steer: expected 0 < least <= most, got {self.least}, {self.most}")

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Columns: logprob_T, old_logprob_T, advantage_T, entropy_T."""
        return columns.steer(self.shape == "exp", self.least, self.most)


# -- keep --


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


# -- select, for penalties --


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
