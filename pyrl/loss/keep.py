"""Keep and select: the tokens whose policy term counts, and those that a penalty is put on."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import Literal

import torch
from torch import Tensor

from pyrl.checks import ordered
from pyrl.logits.token_stats import Options
from pyrl.loss.axis import LossState
from pyrl.loss.columns import LossColumns, numbers
from pyrl.loss.philox import uniforms
from pyrl.loss.reshape import Band


@dataclass(frozen=True)
class Matched:
    """Keeps tokens, or responses, whose mismatch statistic lies in [low, high].

    Of x = old - rollout: rho = exp(x), k1 = x, k2 = x^2 / 2, k3 = exp(x) - 1 - x. seq_sum and
    seq_mean of rho are exp of those of x: the product and the geometric mean.
    """

    low: float
    """Smallest statistic that stays."""
    high: float
    """Largest statistic that stays."""
    statistic: Literal["rho", "k1", "k2", "k3"] = "rho"
    """Of the difference of old and rollout log-prob."""
    level: Literal["token", "seq_sum", "seq_mean", "seq_max"] = "token"
    """Whether tokens are tested, or responses by their sum, mean or largest value."""
    shrink: bool = True
    """A dropped token leaves the response and its denominators too."""
    needs = ("old_logprob_T", "rollout_logprob_T", "offset_N1")

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        value_T = self._statistic(columns["old_logprob_T"] - columns["rollout_logprob_T"])
        responses = columns.responses
        match self.level:
            case "token":
                return columns.used(self._within(value_T))
            case "seq_sum":
                value_N = responses.sum(value_T)
            case "seq_mean":
                value_N = responses.mean(value_T)
            case "seq_max":
                value_N = responses.largest(value_T)
        return columns.used(responses.spread(self._within(value_N)))

    def _statistic(self, x_T: Tensor) -> Tensor:
        """The statistic of each token; rho as its logarithm."""
        if self.statistic == "k2":
            return 0.5 * x_T * x_T
        if self.statistic == "k3":
            near_T = x_T.clamp(-20, 20)
            return near_T.expm1() - near_T
        return x_T

    def _within(self, value: Tensor) -> Tensor:
        low, high = self.low, self.high
        if self.statistic == "rho":
            low, high = (log(bound) if bound > 0 else -inf for bound in (low, high))
        return (low <= value) & (value <= high)


@dataclass(frozen=True)
class NearGenerator:
    """F-TIS: keeps A > 0, and responses whose sum of rollout - old is below gamma."""

    gamma: float = 50.0
    """Nats; a response as far away as this is dropped where A <= 0."""
    shrink: bool = False
    """A dropped token leaves the response and its denominators too."""
    needs = ("advantage_T", "old_logprob_T", "rollout_logprob_T", "offset_N1")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        responses = columns.responses
        far_N = responses.sum(columns["rollout_logprob_T"] - columns["old_logprob_T"])
        near_T = responses.spread(far_N < self.gamma)
        return columns.used((columns["advantage_T"] > 0) | near_T)


@dataclass(frozen=True)
class ClipCov:
    """Drops a random share of the tokens whose covariance lies in (low, high).

    Covariance: (A - mean A)(logprob - mean logprob); max(1, int(share n)) tokens that are not
    clipped already (arXiv:2505.22617).
    """

    low: float = 1.0
    """Covariance from which on a token may be dropped."""
    high: float = 5.0
    """Covariance up to which a token may be dropped."""
    share: float = 2e-4
    """Share of the tokens that is dropped."""
    shrink: bool = False
    """A dropped token leaves the response and its denominators too."""
    needs = ("advantage_T", "logprob_T", "old_logprob_T")

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        advantage_T, logprob_T = columns["advantage_T"], columns["logprob_T"]
        ratio_T = (logprob_T - columns["old_logprob_T"]).clamp(-20, 20).exp()
        low, high = state.radii
        above_T = (advantage_T > 0) & (ratio_T > 1 + high)
        below_T = (advantage_T < 0) & (ratio_T < 1 - low)
        covariance_T = covariance(columns)
        inside_T = (self.low < covariance_T) & (covariance_T < self.high)
        among_T = columns.used(inside_T & ~(above_T | below_T))
        random_T = uniforms(state.seed, torch.arange(len(among_T), device=among_T.device))
        dropped_T = columns.least(random_T, among_T, self.share, columns.whole.count_P)
        return columns.used(~dropped_T)


@dataclass(frozen=True)
class ClipB:
    """Drops A < 0 where p (H + log p) is mu deviations below its mean (arXiv:2602.03392)."""

    mu: float = 2.5
    """Deviations below the mean at which a token is dropped."""
    policy: Literal["old", "rollout"] = "old"
    """Whose log-probability."""
    shrink: bool = True
    """A dropped token leaves the response and its denominators too."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("advantage_T", "entropy_T", f"{self.policy}_logprob_T")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        score_T, whole = _score(columns, self.policy), columns.whole
        deviation = whole.deviation(score_T)
        least = whole.mean(score_T) - self.mu * torch.where(deviation < 1e-12, inf, deviation)
        return columns.used(~((columns["advantage_T"] < 0) & (score_T < least)))


@dataclass(frozen=True)
class ClipV:
    """Drops A <= 0 whose centred score exceeds mu deviations (arXiv:2602.03392).

    Score: H sum p^2 + sum p^2 log p - p (H + log p); at most max(1, int(max_share n)) tokens.
    """

    mu: float = 8.5
    """Deviations above which a token is dropped."""
    max_share: float = 1e-4
    """Share of the tokens that is dropped at most."""
    policy: Literal["old", "rollout"] = "old"
    """Whose log-probability."""
    shrink: bool = True
    """A dropped token leaves the response and its denominators too."""

    @property
    def needs(self) -> tuple[str, ...]:
        moments = ("sum_p2_T", "sum_p2_logp_T")
        return ("advantage_T", "entropy_T", *moments, f"{self.policy}_logprob_T")

    def asks(self, temperature: float, state: LossState) -> Options:
        return Options(squares=True)

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        expected_T = columns["entropy_T"] * columns["sum_p2_T"] + columns["sum_p2_logp_T"]
        score_T, whole = expected_T - _score(columns, self.policy), columns.whole
        deviation = whole.deviation(score_T)
        far_T = (deviation >= 1e-12) & (score_T > self.mu * deviation)
        among_T = columns.used(far_T & ~(columns["advantage_T"] > 0))
        dropped_T = columns.least(-score_T, among_T, self.max_share, whole.count_P)
        return columns.used(~dropped_T)


@dataclass(frozen=True)
class EntropyFilter(Band):
    """Entrocraft as printed: A >= 0 above a band of the batch's entropy, A <= 0 below it, else all.

    Pushing sampled tokens up lowers the entropy (arXiv:2604.26326).
    """

    low: tuple[float, float] = (0.6, 0.1)
    """Lower end of the band (nats), at the beginning and at the end of the run."""
    high: tuple[float, float] = (0.7, 0.2)
    """Upper end of the band (nats), at the beginning and at the end of the run."""
    shrink: bool = True
    """A dropped token leaves the response and its denominators too."""
    needs = ("advantage_T", "entropy_T")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        below, above = self.outside(columns, state)
        advantage_T = columns["advantage_T"]
        return columns.used(~(below & (advantage_T > 0)) & ~(above & (advantage_T < 0)))


@dataclass(frozen=True)
class TopEntropy:
    """Keeps tokens at or above the quantile 1 - share of entropy (arXiv:2506.01939).

    The others still count in the mean over tokens, as in the paper: with `shrink` the loss and its
    gradient are 1 / share times as large.
    """

    share: float = 0.2
    """Share of the tokens that stays."""
    shrink: bool = False
    """A dropped token leaves the response and its denominators too."""
    needs = ("entropy_T",)

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        entropy_T = columns["entropy_T"]
        threshold = columns.whole.quantile("entropy_T", entropy_T, 1 - self.share)
        return columns.used(entropy_T >= threshold)


@dataclass(frozen=True)
class TopCovariance:
    """KL-Cov: the max(1, int(share n)) tokens of largest covariance (arXiv:2505.22617)."""

    share: float = 2e-3
    """Share of the tokens that is chosen."""
    needs = ("advantage_T", "logprob_T")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        covariance_T = covariance(columns)
        used_T = columns.used(torch.ones_like(covariance_T, dtype=torch.bool))
        covariance_T = numbers("advantage_T, logprob_T", torch.where(used_T, covariance_T, 0.0))
        return columns.least(-covariance_T, used_T, self.share, columns.whole.count_P)


@dataclass(frozen=True)
class Improbable:
    """Lp-Reg: of A < 0, the least probable share where that is below the proxy (arXiv:2510.03222).

    None if that share is one token.
    """

    share: float = 0.01
    """Share of the tokens with A < 0 that is chosen from."""
    needs = ("advantage_T", "logprob_T", "proxy_logprob_T")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        negative_T = columns.used(columns["advantage_T"] < 0)
        logprob_T = numbers("logprob_T", torch.where(negative_T, columns["logprob_T"], 0.0))
        least_T = columns.least(logprob_T, negative_T, self.share, negative_T.sum())
        below_T = least_T & (logprob_T < columns["proxy_logprob_T"])
        return below_T & (least_T.sum() > 1)


def covariance(columns: LossColumns) -> Tensor:
    """(A - mean A)(logprob - mean logprob) of each token [T]."""
    advantage_T, logprob_T, whole = columns["advantage_T"], columns["logprob_T"], columns.whole
    return (advantage_T - whole.mean(advantage_T)) * (logprob_T - whole.mean(logprob_T))


def _score(columns: LossColumns, policy: str) -> Tensor:
    """p (H + log p)."""
    logprob_T = columns[f"{policy}_logprob_T"]
    return logprob_T.exp() * (columns["entropy_T"] + logprob_T)
