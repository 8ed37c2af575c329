"""Presets: published policy losses by name, each as its difference from PPO's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pyrl.loss.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm
from pyrl.loss.bounds import (
    BinaryKL,
    Clip,
    EntropyClip,
    PositionClip,
    Range,
    TotalVariation,
    Unbounded,
)
from pyrl.loss.factors import TIS, IcePop, Steer
from pyrl.loss.keep import (
    ClipB,
    ClipCov,
    ClipV,
    EntropyFilter,
    Improbable,
    Matched,
    NearGenerator,
    TopCovariance,
    TopEntropy,
)
from pyrl.loss.loss import Loss, Ratio
from pyrl.loss.penalties import (
    KL,
    CovarianceBonus,
    EntropySmoothing,
    ExpertLeak,
    NucleusAnchor,
    Penalty,
    SurprisalBand,
)
from pyrl.loss.reshape import Blend, EntropyBand, EntropyZ, TokenGroup
from pyrl.loss.surrogates import ClampedLogp, MaskedLogp, Sigmoid, SoftClipped

LENGTH = 1024.0
"""Constant in place of a response's length where a method has one: set it to your longest."""


def ppo() -> Loss:
    """Clip 0.2 on both sides, token mean, nothing else (arXiv:1707.06347)."""
    return Loss(dual=None, kl=KL(coef=0.0))


def dual() -> Loss:
    """PPO whose loss is capped at 3 |A| where A < 0 (arXiv:1912.09729)."""
    return replace(ppo(), dual=3.0)


def dapo() -> Loss:
    """A raised upper clip (arXiv:2503.14476)."""
    return replace(ppo(), bounds=Clip(0.2, 0.28))


def dr_grpo() -> Loss:
    """A constant in place of lengths; its advantages are not divided by a deviation
    (arXiv:2503.20783)."""
    return replace(ppo(), aggregate=SeqMeanTokenSumNorm(LENGTH))


def reinforce() -> Loss:
    """-A logprob (Williams 1992; arXiv:2402.14740)."""
    return replace(ppo(), ratio=Ratio("one"), surrogate=MaskedLogp(), bounds=Unbounded())


def dro() -> Loss:
    """REINFORCE with a squared distance to the old policy, as far as its definition says
    (arXiv:2405.19107)."""
    return replace(reinforce(), penalties=(Penalty(0.1, "k2", "old"),))


def cispo() -> Loss:
    """The clipped ratio is a detached weight, bounded above alone (arXiv:2506.13585)."""
    return replace(ppo(), surrogate=ClampedLogp(), bounds=Clip(10.0, 0.2))


def gspo() -> Loss:
    """The geometric mean of a response's ratios, in tight bounds (arXiv:2507.18071)."""
    return replace(
        ppo(), ratio=Ratio("seq_geo"), bounds=Clip(3e-4, 4e-4), aggregate=SeqMeanTokenMean()
    )


def gmpo() -> Loss:
    """The geometric mean of ratios that are clipped one by one (arXiv:2507.20673)."""
    return replace(
        ppo(),
        ratio=Ratio("seq_geo", pre_clip=0.4),
        bounds=Unbounded(),
        aggregate=SeqMeanTokenMean(),
    )


def sapo() -> Loss:
    """A sigmoid in place of the clip (arXiv:2511.20347)."""
    return replace(ppo(), surrogate=Sigmoid(), bounds=Unbounded(), aggregate=SeqMeanTokenMean())


def dppo() -> Loss:
    """Masks tokens by the change of their probability, not by its ratio (arXiv:2602.04879)."""
    return replace(ppo(), surrogate=MaskedLogp(20.0), bounds=TotalVariation())


def dppo_kl() -> Loss:
    """DPPO's masks by the KL divergence of a token against all others (arXiv:2602.04879)."""
    return replace(dppo(), bounds=BinaryKL())


def ce_gppo() -> Loss:
    """Clipped tokens keep a bounded gradient (arXiv:2509.20712)."""
    return replace(ppo(), surrogate=SoftClipped())


def ctpo() -> Loss:
    """Cumulative ratios in bounds that widen with the position (arXiv:2605.07331)."""
    return replace(
        ppo(), ratio=Ratio("cum_prod"), bounds=PositionClip(), behaviour=TIS(5.0, "sequence")
    )


def minpro() -> Loss:
    """The ratio times the smallest before it; the bounds are ours (arXiv:2601.22718)."""
    return replace(ppo(), ratio=Ratio("min_prefix"))


def minpro_cispo() -> Loss:
    """MinPRO's ratio as a detached weight, at most 1.2; the bounds are ours (arXiv:2601.22718)."""
    return replace(minpro(), surrogate=ClampedLogp(), bounds=Range(0.0, 1.2))


def tis() -> Loss:
    """Each token weighs min(old / rollout, 2): truncated importance sampling, as verl and TRL
    correct for their rollout engine."""
    return replace(ppo(), behaviour=TIS())


def tis_sequence() -> Loss:
    """Each response weighs min(product of old / rollout, 2)."""
    return replace(tis(), behaviour=TIS(level="sequence"))


def mis() -> Loss:
    """Responses leave whose geometric mean of old / rollout is not within 1 +- 0.001, as verl
    masks them."""
    return replace(ppo(), keep=(Matched(0.999, 1.001, "rho", "seq_mean"),))


def icepop() -> Loss:
    """old / rollout weighs a token within [0.5, 5] and drops it outside (arXiv:2510.18855)."""
    return replace(ppo(), behaviour=IcePop())


def hispo() -> Loss:
    """PPO on the ratio to the rollout engine with masks for its mismatch; the thresholds are not
    published and ours (arXiv:2603.21065)."""
    keep = (
        Matched(0.9, 1.1, "rho", "seq_mean", shrink=False),
        Matched(0.5, 2.0, "rho", "token", shrink=False),
    )
    return replace(
        ppo(),
        ratio=Ratio(to="rollout"),
        bounds=Clip(0.2, 0.28),
        dual=3.0,
        keep=keep,
        aggregate=SeqMeanTokenSumNorm(LENGTH),
    )


def minirl() -> Loss:
    """REINFORCE weighed by the ratio to the rollout engine, masked by that to the old policy
    (arXiv:2512.01374)."""
    return replace(
        ppo(),
        ratio=Ratio(to="rollout"),
        trust="old",
        surrogate=MaskedLogp(5.0),
        bounds=Clip(0.2, 0.27),
        aggregate=SeqMeanTokenSum(),
    )


def ftis() -> Loss:
    """TIS without the far-off responses of negative advantage (arXiv:2605.22537); how they
    compose is ours."""
    return replace(tis(), keep=(NearGenerator(),))


def clip_cov() -> Loss:
    """Drops a few random tokens of high covariance (arXiv:2505.22617)."""
    return replace(ppo(), bounds=Clip(1.0, 1.0), keep=(ClipCov(),))


def kl_cov() -> Loss:
    """Holds the tokens of highest covariance to the old policy (arXiv:2505.22617)."""
    return replace(
        ppo(), bounds=Unbounded(), penalties=(Penalty(1.0, "abs", "old", TopCovariance()),)
    )


def steer() -> Loss:
    """Weighs tokens by their change of entropy (arXiv:2510.10150)."""
    return replace(dapo(), dual=10.0, weight=Steer())


def clip_b() -> Loss:
    """Drops negative tokens whose update lowers the entropy most (arXiv:2602.03392)."""
    return replace(ppo(), keep=(ClipB(),))


def clip_v() -> Loss:
    """Clip_B by the exact change of entropy to first order (arXiv:2602.03392)."""
    return replace(clip_b(), keep=(ClipV(),))


def top_entropy() -> Loss:
    """Only the fifth of the tokens that is most uncertain (arXiv:2506.01939)."""
    return replace(ppo(), keep=(TopEntropy(),))


def lp_reg() -> Loss:
    """Protects improbable tokens that survive a min-p filter (arXiv:2510.03222)."""
    penalty = Penalty(1.0, "k3", "proxy", Improbable())
    return replace(ppo(), bounds=Clip(1.0, 9.0), penalties=(penalty,))


def siren() -> Loss:
    """Holds the nucleus entropy of uncertain tokens (arXiv:2509.25133)."""
    return replace(dr_grpo(), penalties=(NucleusAnchor(),))


def hapo() -> Loss:
    """Bounds, advantages and normalisation by a token's entropy (arXiv:2509.16591)."""
    return replace(
        ppo(), bounds=EntropyClip(), dual=10.0, reshape=(TokenGroup(),), redistribute=1.0
    )


def dcpo() -> Loss:
    """Rewards tempered towards a target entropy (arXiv:2601.12730)."""
    return replace(ppo(), dual=3.0, reshape=(Blend(),))


def epo() -> Loss:
    """An entropy bonus and a band about its history (arXiv:2509.22576)."""
    return replace(ppo(), entropy=0.001, penalties=(EntropySmoothing(),))


def entrocraft() -> Loss:
    """Positive or negative rewards alone when entropy leaves a band (arXiv:2604.26326).

    Rewards must be -1 or 1.
    """
    return replace(ppo(), reshape=(EntropyBand(),))


def entrocraft_filter() -> Loss:
    """Answers of one sign leave when entropy leaves a band, as printed (arXiv:2604.26326)."""
    return replace(ppo(), keep=(EntropyFilter(),))


def calibrl() -> Loss:
    """Pulls towards an expert's response (arXiv:2602.20197)."""
    return replace(ppo(), dual=3.0, penalties=(ExpertLeak(),))


def aepo_agentic() -> Loss:
    """Uncertain tokens weigh more, and clipped ones keep a gradient (arXiv:2510.14545)."""
    surrogate = SoftClipped(low=0.0, high=1.0, scale_value=False)
    return replace(ppo(), dual=3.0, reshape=(EntropyZ(),), surrogate=surrogate)


def g2rpo() -> Loss:
    """Holds the mean surprisal of the tokens in a band (arXiv:2604.08539)."""
    return replace(ppo(), penalties=(SurprisalBand(),))


def light_if() -> Loss:
    """An entropy bonus for tokens by covariance, TEA-RL (arXiv:2508.03178)."""
    return replace(ppo(), penalties=(CovarianceBonus(),))


PRESETS: dict[str, Callable[[], Loss]] = {
    preset.__name__: preset
    for preset in (
        *(ppo, dual, dapo, dr_grpo, reinforce, dro, cispo, gspo, gmpo, sapo, dppo, dppo_kl),
        *(ce_gppo, ctpo, minpro, minpro_cispo, tis, tis_sequence, mis, icepop, hispo, minirl),
        *(ftis, clip_cov, kl_cov, steer, clip_b, clip_v, top_entropy, lp_reg, siren, hapo),
        *(dcpo, epo, entrocraft, entrocraft_filter, calibrl, aepo_agentic),
        *(g2rpo, light_if),
    )
}
"""Losses by name; advantages before reshaping are the method's own."""
