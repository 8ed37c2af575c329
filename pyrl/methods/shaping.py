"""Shaping: methods whose advantages follow entropies, confidences, ranks and risks."""

from dataclasses import replace

from pyrl import presets
from pyrl.advantage.difficulty import DynamicKL, WindowEntropy
from pyrl.advantage.information import InformationScore
from pyrl.advantage.ranks import RankNormal
from pyrl.advantage.risk import MixedRisk
from pyrl.advantage.shaping import ConfidenceReweight, EntropyBonus, GatedTokens, StepModulation
from pyrl.algorithm import Algorithm
from pyrl.loss import Clip
from pyrl.methods.grpo import dr_grpo, grpo
from pyrl.methods.treerl import treerl
from pyrl.replay import Replay
from pyrl.reward import LengthReward
from pyrl.select import DownSample


def funrl() -> Algorithm:
    """Uncertain responses gain, at most half of their advantage (arXiv:2508.05118).

    The bound is inferred. Its reward is that of a right call of a function: --reward-function.
    """
    parent = grpo()
    return replace(parent, advantage=(*parent.advantage, EntropyBonus()))


def empg() -> Algorithm:
    """Sure steps learn faster, and those that lead to sure ones gain (arXiv:2509.09265).

    A step of the source is a turn of an agent; here one is a paragraph
    (--advantage.step-modulation.separator).
    """
    parent = grpo()
    return replace(parent, advantage=(*parent.advantage, StepModulation()))


def erpo() -> Algorithm:
    """Experimental: token signals gated by entropy, with the outcome's sign (arXiv:2603.28204).

    All that is known is an abstract and a review; what `GatedTokens` infers is said there.
    """
    parent = grpo()
    return replace(parent, advantage=(*parent.advantage, GatedTokens()))


def progrpo() -> Algorithm:
    """Right answers that the policy was sure of gain less than others (arXiv:2602.05281)."""
    parent = grpo()
    return replace(parent, advantage=(*parent.advantage, ConfidenceReweight()), loss=presets.dapo())


def g2rpo() -> Algorithm:
    """Normal scores of ranks, a part for length, and a band of entropy (arXiv:2604.08539).

    8 answers a question. Where the source has bounds for each kind of task, here all questions are
    of one kind.
    """
    parent = grpo()
    return replace(
        parent,
        sample=replace(parent.sample, votes=8, train=8),
        reward=LengthReward(),
        advantage=(RankNormal(),),
        loss=presets.g2rpo(),
    )


def riskpo() -> Algorithm:
    """The low end of the rewards of bundles of five questions counts most (arXiv:2510.00911).

    10 answers a question, ratios of responses by their geometric mean.
    """
    parent = grpo()
    ratio = presets.gspo()
    return replace(
        parent,
        sample=replace(parent.sample, votes=10, train=10),
        advantage=(MixedRisk(),),
        loss=replace(parent.loss, ratio=ratio.ratio, aggregate=ratio.aggregate),
    )


def ares() -> Algorithm:
    """Hard questions should have more uncertain places, easy ones fewer (arXiv:2510.08457).

    With a distance from the first model whose weight each difficulty sets by itself.
    """
    parent = grpo()
    loss = replace(parent.loss, bounds=Clip(0.2, 0.3))
    return replace(parent, advantage=(WindowEntropy(), DynamicKL()), loss=loss)


def d3s() -> Algorithm:
    """Leaves of largest variance train, and of these uncertain tokens alone (arXiv:2509.22115)."""
    return replace(grpo(), select=DownSample())


def light_if() -> Algorithm:
    """An entropy bonus for tokens by covariance: TEA-RL alone (arXiv:2508.03178).

    Its rewards are shares of satisfied instructions (--reward-function). Without its supervised
    training on uncertain tokens before.
    """
    return replace(grpo(), loss=presets.light_if())


def spear() -> Algorithm:
    """Good responses are kept, and imitated when there are enough of them (arXiv:2509.22601).

    On Dr. GRPO with a raised upper clip. The source's rewards for calls of tools, and its choice of
    questions and responses, are left out; what else differs is said of `Replay`.
    """
    parent = dr_grpo()
    loss = replace(parent.loss, bounds=Clip(0.2, 0.28))
    return replace(parent, loss=loss, replay=Replay(capacity=2048))


def ib_tpo() -> Algorithm:
    """Segments against the tree, and by what they tell of a right answer (arXiv:2605.28109).

    On the trees of TreeRL with true answers: nodes are forks, and grow by entropy, not by score.
    """
    parent = treerl()
    return replace(parent, reward=grpo().reward, advantage=(InformationScore(),))
