"""Entropy: methods that hold, raise or spend the entropy of the policy."""

from dataclasses import replace

from pyrl import presets
from pyrl.algorithm import Algorithm
from pyrl.baselines import Entropic
from pyrl.loss import Steer
from pyrl.methods.clipping import dapo
from pyrl.methods.grpo import dr_grpo, grpo
from pyrl.reward import TrueReward
from pyrl.tempered import Tempered


def clip_cov() -> Algorithm:
    """A few random tokens of high covariance leave the update (arXiv:2505.22617).

    8 answers a question and 8 updates a step, as in the released scripts: 32 of 256 questions are
    an update's.
    """
    parent = grpo()
    sample = replace(parent.sample, votes=8, train=8)
    return replace(parent, sample=sample, loss=presets.clip_cov(), updates_per_step=8)


def kl_cov() -> Algorithm:
    """Tokens of highest covariance are held to the policy before the update (arXiv:2505.22617).

    8 answers a question and 8 updates a step, as `clip_cov`.
    """
    return replace(clip_cov(), loss=presets.kl_cov())


def steer() -> Algorithm:
    """DAPO's clip, and tokens weigh less, the more they change the entropy (arXiv:2510.10150).

    Without DAPO's sampling and penalty, with 8 answers a question and 16 updates a step, as in the
    released scripts.
    """
    parent = grpo()
    sample = replace(parent.sample, votes=8, train=8)
    return replace(parent, sample=sample, loss=presets.steer(), updates_per_step=16)


def steer_exp() -> Algorithm:
    """STEER with weights that fall exponentially from 1 (arXiv:2510.10150)."""
    parent = steer()
    return replace(parent, loss=replace(parent.loss, weight=Steer("exp")))


def clip_b() -> Algorithm:
    """Wrong tokens leave whose update would lower the entropy most (arXiv:2602.03392)."""
    return replace(grpo(), loss=presets.clip_b())


def clip_v() -> Algorithm:
    """Clip_B by the exact change of entropy to first order (arXiv:2602.03392)."""
    return replace(clip_b(), loss=presets.clip_v())


def top_entropy() -> Algorithm:
    """DAPO on the most uncertain fifth of the tokens alone (arXiv:2506.01939).

    All other parts are DAPO's, as in section 5.2.
    """
    parent = dapo()
    return replace(parent, loss=replace(parent.loss, keep=presets.top_entropy().keep))


def lp_reg() -> Algorithm:
    """Improbable tokens that are no noise are protected from wrong answers (arXiv:2510.03222).

    One update takes all samples of a step, as in the paper's main runs.
    """
    return replace(grpo(), loss=presets.lp_reg())


def siren() -> Algorithm:
    """The nucleus entropy of uncertain tokens is held to its first value (arXiv:2509.25133).

    Otherwise Dr. GRPO. The nucleus keeps the token that crosses its mass, which the released code
    drops.
    """
    parent = dr_grpo()
    return replace(parent, loss=replace(parent.loss, penalties=presets.siren().penalties))


def hapo() -> Algorithm:
    """Advantages, bounds and baselines move with each token's entropy (arXiv:2509.16591).

    On DAPO's sampling, penalty and 16 updates, as the released scripts. With the sign of cold
    tokens as the paper means it. Without its temperature that moves with the entropy while a token
    is sampled.
    """
    return replace(dapo(), loss=presets.hapo())


def dcpo() -> Algorithm:
    """Rewards tempered towards a target entropy by a second temperature (arXiv:2601.12730).

    5 answers a question, as in the release.
    """
    parent = grpo()
    sample = replace(parent.sample, votes=5, train=5)
    return replace(parent, sample=sample, loss=presets.dcpo())


def epo() -> Algorithm:
    """An entropy bonus, and a band about the run's mean entropy (arXiv:2509.22576).

    The band moves the reported loss alone, as released, and its history is of the whole run: the
    paper has one for each step of an environment.
    """
    return replace(grpo(), loss=presets.epo())


def entrocraft() -> Algorithm:
    """Right or wrong answers alone while the entropy is outside a band (arXiv:2604.26326).

    As released: a reward takes the place of the advantage there. The band falls linearly over the
    run, by a cosine with --loss.reshape.entropy-band.cosine, or stays where its ends are equal. 8
    answers a question, rewarded with 1 or -1. Without the paper's random acceptance of answers,
    which is not released.
    """
    parent = grpo()
    return replace(
        parent,
        sample=replace(parent.sample, votes=8, train=8),
        reward=TrueReward(wrong=-1.0),
        loss=presets.entrocraft(),
    )


def entrocraft_filter() -> Algorithm:
    """Entrocraft as printed: answers of one sign leave, others keep their A (arXiv:2604.26326).

    Of 8 answers a question those of advantage >= 0 train above the band, and <= 0 below it. The
    band falls linearly from 0.6 and 0.7 to 0.1 and 0.2.
    """
    parent = grpo()
    sample = replace(parent.sample, votes=8, train=8)
    return replace(parent, sample=sample, loss=presets.entrocraft_filter())


def entropic() -> Algorithm:
    """Right answers count more, the more the entropy is above a target (arXiv:2604.26326).

    A controller of the released code, on rewards of 1 and -1 without a baseline.
    """
    parent = entrocraft()
    return replace(parent, advantage=(Entropic(),), loss=presets.ppo())


def aepo() -> Algorithm:
    """Right answers at another temperature hold the entropy at a target (arXiv:2510.08141).

    A quarter of the questions are sampled again at 1.2 times the temperature while the entropy is
    up to 0.75, and at 0.8 above it.
    """
    return replace(grpo(), temper=Tempered(share=0.25))


def aepo_agentic() -> Algorithm:
    """Uncertain tokens weigh more, and keep a gradient beyond the clip (arXiv:2510.14545).

    The loss alone: the paper's budget of branches, which its released scripts leave out too, is
    --fork aepo_agentic.
    """
    return replace(grpo(), loss=presets.aepo_agentic())
