"""GRPO and its group baselines, with true answers or a reward function as the reward."""

from dataclasses import replace

from pyrl import advantage
from pyrl.algorithm import Algorithm, Sample
from pyrl.loss import KL, Clip
from pyrl.loss.aggregate import SeqMeanTokenSumNorm
from pyrl.reward import TrueReward


def grpo() -> Algorithm:
    """Group-normalised rewards, token mean, no KL (arXiv:2402.03300).

    One update a step, as in the paper's experiments: the clip acts only with more.
    """
    base = Algorithm(
        advantage=advantage.grpo(), sample=Sample(votes=16, train=16), reward=TrueReward()
    )
    return replace(base, loss=replace(base.loss, bounds=Clip(), dual=None, kl=KL(coef=0.0)))


def dr_grpo() -> Algorithm:
    """No division by the group's deviation nor by the answer's length (arXiv:2503.20783).

    The constant in place of the length is `loss.aggregate.length`; it scales the gradient only.
    8 updates share the samples of a step: the released scripts sample 128 questions 8 times and
    train on batches of 128 responses.
    """
    parent = grpo()
    constant = SeqMeanTokenSumNorm(length=parent.sample.max_tokens)
    return replace(
        parent,
        advantage=advantage.dr_grpo(),
        loss=replace(parent.loss, aggregate=constant),
        updates_per_step=8,
    )


def rloo() -> Algorithm:
    """The baseline of each answer is the mean of the others, on policy (arXiv:2402.14740)."""
    return replace(grpo(), advantage=advantage.rloo())
