"""Consensus: TTRL with other rewards than the vote's, or with parts of its samples."""

from dataclasses import replace

from pyrl import advantage, presets
from pyrl.algorithm import Algorithm
from pyrl.baselines import Return
from pyrl.loss import Clip
from pyrl.methods.ttrl import ttrl
from pyrl.reward.consensus import BalancedReward, FrequencyReward, NoveltyReward, SelectiveReward
from pyrl.reward.guard import GuardedReward
from pyrl.select import Known, WithoutAnswer


def empo() -> Algorithm:
    """The share of leaves that say the same is the reward (arXiv:2504.05812).

    16 answers a question, GSPO's clip, no distance from the first model, as released.
    """
    parent = ttrl()
    return replace(
        parent,
        sample=replace(parent.sample, votes=16, train=16, temperature=1.0),
        reward=FrequencyReward(),
        loss=presets.gspo(),
        updates_per_step=1,
    )


def scrl() -> Algorithm:
    """A label has to be clear, and rare unsure answers are wrong (arXiv:2603.19880).

    32 votes, 16 of which train.
    """
    parent = ttrl()
    sample = replace(parent.sample, votes=32, train=16)
    return replace(parent, sample=sample, reward=SelectiveReward())


def ddrl() -> Algorithm:
    """The label's leaves and the rarest ones train, with advantages 1 and -1 (arXiv:2604.21327).

    Half of 64 leaves. Without the training on agreeing responses that follows in the source.
    """
    parent = ttrl()
    return replace(
        parent,
        sample=replace(parent.sample, train=64),
        reward=BalancedReward(),
        select=Known(),
        advantage=(Return(),),
    )


def ttrl_guard() -> Algorithm:
    """Questions whose label has changed learn slower, and minorities gain (arXiv:2605.19444).

    On centred rewards: a deviation would cancel a question's weight.
    """
    return replace(ttrl(), reward=GuardedReward(), advantage=advantage.dr_grpo())


def evol_rl() -> Algorithm:
    """The vote decides the sign of a reward, novelty its size (arXiv:2509.15194).

    With a raised upper clip and an entropy bonus of 0.003.
    """
    parent = ttrl()
    loss = replace(parent.loss, bounds=Clip(0.2, 0.28), entropy=0.003)
    sample = replace(parent.sample, temperature=1.0)
    return replace(parent, sample=sample, reward=NoveltyReward(), loss=loss)


def om_grpo() -> Algorithm:
    """Shares of answers are rewards, and answers have no gradient (arXiv:2608.03119).

    From an abstract. How an answer is found (--select.extractor) has to be as in --extractor.
    """
    return replace(ttrl(), reward=FrequencyReward(gate="open"), select=WithoutAnswer())
