"""Penalties: what is added to a policy loss, from the distance to another policy or an entropy."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf
from typing import Literal

import torch
from torch import Tensor

from pyrl.checks import finite, ordered, shares
from pyrl.logits.token_stats import Options
from pyrl.loss.aggregate import Aggregate
from pyrl.loss.axis import LossState, Select
from pyrl.loss.columns import LossColumns, one_part
from pyrl.loss.keep import covariance


@dataclass(frozen=True)
class KL:
    """A penalty towards the frozen initial model; coefficient 0 needs no such model."""

    coef: float = 0.001
    """Weight of the penalty; 0 loads no initial model."""
    estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k2+", "k3+"] = "k3"
    """From D = logprob - ref_logprob: D, |D|, D^2 / 2, exp(-D) + D - 1 (arXiv:2402.03300 uses k3);
    with "+" the gradient is k2's, which is that of the reverse KL on policy."""

    def __post_init__(self) -> None:
        finite(self, "coef")


@dataclass(frozen=True)
class Penalty:
    """coef times an estimate of the distance to a target policy, on the selected tokens."""

    coef: float = 1.0
    """Weight of the penalty."""
    estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k2+", "k3+"] = "k3"
    """The estimates of `KL`."""
    target: Literal["ref", "old", "proxy"] = "ref"
    """The frozen initial model, the policy before the update, or that one without its least
    probable tokens."""
    select: Select | None = None
    """The tokens that it is put on; None: all."""
    aggregate: Aggregate | None = None
    """None: the loss's."""
    kept_share: float = 0.02
    """The proxy keeps tokens of at least this share of the largest probability."""

    def __post_init__(self) -> None:
        finite(self, "coef")
        shares(self, "kept_share")

    @property
    def column(self) -> str:
        """The log-probability that the distance is measured from."""
        return f"{self.target}_logprob_T"

    def asks(self, temperature: float, state: LossState) -> Options:
        """What the proxy is computed from."""
        proxy = Options(kept_share=self.kept_share, max_probability=True)
        return proxy if self.target == "proxy" else Options()

    def scale(self, columns: LossColumns, state: LossState) -> Tensor | None:
        """1 for the selected tokens, bool [T]; None: all."""
        return None if self.select is None else self.select(columns, state)


@dataclass(frozen=True)
class ExpertLeak:
    """CalibRL: coef |A| LeakyReLU(s (logprob - expert_logprob)) (arXiv:2602.20197).

    s = -1 where the reward exceeds `passed`, else 1: pushes passing responses up to an expert's
    log-probability at the same position, and failing ones down to it; beyond, `slope` of that.
    """

    coef: float = 0.1
    """Weight of the penalty."""
    slope: float = 0.5
    """Share of the penalty that is left beyond the expert."""
    passed: float = 0.1
    """Reward above which a response has passed."""
    expert: str = "expert"
    """The column of the data that has an expert's response to each question."""
    aggregate: Aggregate | None = None
    """None: the loss's."""
    column = "expert_logprob_T"
    needs = ("advantage_T", "reward_T", column)

    def scale(self, columns: LossColumns, state: LossState) -> Tensor:
        """s |A|, which the kernels multiply the distance by; 0 after the expert's response."""
        size_T = torch.where(columns[self.column].isnan(), 0.0, columns["advantage_T"].abs())
        return torch.where(columns["reward_T"] > self.passed, -size_T, size_T)


@dataclass(frozen=True)
class EntropySmoothing:
    """EPO: adds coef times height where the entropy leaves a band about its history.

    Without a gradient, as released: it moves the reported loss only (arXiv:2509.22576). Without a
    history every token counts as outside, with height 1.
    """

    coef: float = 0.001
    """Weight of the penalty."""
    height: float = 0.1
    """What a token outside the band counts."""
    low: float = 0.8
    """Lower end of the band, as a multiple of the history."""
    high: float = 1.2
    """Upper end of the band, as a multiple of the history."""
    level: Literal["token", "sequence"] = "token"
    """Whether the entropy of a token or of its response is compared."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("entropy_T",) if self.level == "token" else ("entropy_T", "offset_N1")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        """Addends [T] to the loss."""
        weight, entropy_T = self.coef * self.epoch_weight(state.epoch), columns["entropy_T"]
        if state.mean_entropy is None:  # no history: outside
            low, high = inf, -inf
        else:
            low, high = self.low * state.mean_entropy, self.high * state.mean_entropy
            weight *= self.height

        def outside(entropy: Tensor) -> Tensor:
            return torch.where((low < entropy) & (entropy < high), 0.0, weight).double()

        if self.level == "token":
            return outside(entropy_T)
        return columns.responses.spread(outside(columns.responses.mean(entropy_T)))

    def epoch_weight(self, epoch: float | None) -> float:
        """The weight in the released schedule over 150 epochs; 1 without an epoch."""
        if epoch is None:
            return 1.0
        if epoch <= 75:
            return 1 - 0.2 * (1 - exp(-2 * epoch / 75))
        return 0.8 * exp(-3 * (epoch - 75) / 75)


@dataclass(frozen=True)
class NucleusAnchor:
    """SIREN: coef (mean nucleus entropy of each response's peaks - its first value)^2.

    Peaks: tokens above the response's quantile (arXiv:2509.25133). The nucleus keeps the token
    that crosses its mass.
    """

    coef: float = 0.005
    """Weight of the penalty."""
    quantile: float = 0.8
    """Quantile of a response's nucleus entropy above which tokens are peaks."""
    mass: float = 0.8
    """Of the nucleus."""
    column = "nucleus_entropy_T"
    metric = "loss/nucleus_gap"
    needs = ("state.nucleus_entropy", column, "offset_N1")

    def __post_init__(self) -> None:
        shares(self, "mass")

    def asks(self, temperature: float, state: LossState) -> Options:
        return Options(nucleus=self.mass)

    def __call__(self, columns: LossColumns, state: LossState) -> tuple[Tensor, Tensor]:
        """d loss / d nucleus entropy [T], and how far the peaks are from the first value (nats)."""
        assert state.nucleus_entropy is not None
        level, share_T = self._peaks(columns)
        gap = level - state.nucleus_entropy
        return 2 * self.coef * gap * share_T, gap

    def level(self, columns: LossColumns) -> float:
        """The mean nucleus entropy of the peaks (nats), which the first step sets."""
        return float(self._peaks(columns)[0])

    def _peaks(self, columns: LossColumns) -> tuple[Tensor, Tensor]:
        """Their mean nucleus entropy, and each token's share in it [T]."""
        nucleus_T, responses = columns[self.column], columns.responses
        threshold_N = responses.quantile(self.column, nucleus_T, self.quantile)
        peak_T = columns.used(nucleus_T > responses.spread(threshold_N)).double()
        peaks_N = responses.sum(peak_T)
        mean_N = responses.sum(torch.where(peak_T > 0, nucleus_T, 0.0)) / peaks_N
        of_responses = one_part(mean_N, peaks_N > 0)
        share_N = torch.where(peaks_N > 0, 1 / peaks_N, 0.0) / of_responses.count_P.clamp(min=1)
        return of_responses.mean(mean_N)[0], peak_T * responses.spread(share_N)


@dataclass(frozen=True)
class SurprisalBand:
    """OpenVLThinkerV2: coef (relu(S - high) + relu(low - S)), S the mean of -logprob.

    S estimates the entropy (nats) with the tokens that were sampled (arXiv:2604.08539); whether it
    is outside is decided before the update. The source has a band for each kind of task.
    """

    coef: float = 0.02
    """Weight of the penalty."""
    low: float = 0.2
    """Lower end of the band (nats)."""
    high: float = 0.6
    """Upper end of the band (nats)."""
    aggregate: Aggregate | None = None
    """None: the loss's."""
    column = "old_logprob_T"
    estimator = "k1"
    """The difference to the old policy, whose gradient is that of S: at the old policy its value is
    0, which leaves the height of the penalty out of the reported loss."""
    needs = ("logprob_T", column)

    def __post_init__(self) -> None:
        ordered(self, self.low, self.high)

    def scale(self, columns: LossColumns, state: LossState) -> Tensor:
        """-1 for each token above the band, 1 below, 0 inside."""
        surprisal = -columns.whole.mean(columns["logprob_T"])
        sign = (surprisal < self.low).double() - (surprisal > self.high).double()
        return sign.expand(columns.tokens)


@dataclass(frozen=True)
class CovarianceBonus:
    """TEA-RL of Light-IF: -coef w H, with w = clip(alpha softmax of the covariances, 0, most).

    Covariance: (A - mean A)(logprob - mean logprob) of a token; softmax over the tokens of its
    response (arXiv:2508.03178). w is of the policy before the update and has no gradient.
    """

    coef: float = 1.0
    """Weight of the bonus."""
    alpha: float = 10.0
    """Sum of a response's weights before they are bounded."""
    most: float = 5.0
    """Largest weight of a token."""
    column = "nucleus_entropy_T"
    metric = "loss/weighted_entropy"
    needs = ("advantage_T", "logprob_T", column, "offset_N1")

    def asks(self, temperature: float, state: LossState) -> Options:
        return Options(nucleus=1.0)

    def __call__(self, columns: LossColumns, state: LossState) -> tuple[Tensor, Tensor]:
        """d loss / d entropy [T], and twice the mean weighted entropy: the value is half of their
        product with the sign of the first."""
        weight_T = self.weights(columns)
        count = columns.whole.count_P.clamp(min=1)
        share_T = -self.coef * weight_T / count
        total = share_T.sum()
        value = columns.whole.sum(share_T * columns["nucleus_entropy_T"])
        return share_T, torch.where(total != 0, 2 * value / total, 0.0).squeeze()

    def weights(self, columns: LossColumns) -> Tensor:
        """w of each token that takes part [T], 0 of others."""
        covariance_T, responses = covariance(columns), columns.responses
        top_T = responses.spread(responses.largest(covariance_T))
        size_T = columns.used_or_zero((covariance_T - top_T).exp())
        sum_T = responses.spread(responses.sum(size_T)).clamp(min=1e-300)
        return columns.used_or_zero((self.alpha * size_T / sum_T).clamp(max=self.most))

    def level(self, columns: LossColumns) -> float:
        """Nothing is held on to."""
        return 0.0


OfLogprob = Penalty | ExpertLeak | SurprisalBand
"""Penalties on a log-probability, of which the kernels have room for two."""

OfNucleus = NucleusAnchor | CovarianceBonus
"""Penalties on the entropy of a nucleus, of which the kernels have room for one."""
