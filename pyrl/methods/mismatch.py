"""Mismatch: methods whose ratio is to the policy of the engine that sampled."""

from dataclasses import replace

from pyrl import advantage, presets
from pyrl.algorithm import Algorithm
from pyrl.loss.aggregate import SeqMeanTokenSumNorm
from pyrl.methods.grpo import grpo


def minirl() -> Algorithm:
    """REINFORCE weighed by the ratio to the engine's policy; the clip is a mask (arXiv:2512.01374).

    Advantages are not divided by a deviation, nor sums over a response by its length. Without the
    paper's replay of a mixture's routes.
    """
    return replace(grpo(), advantage=advantage.dr_grpo(), loss=presets.minirl())


def ftis() -> Algorithm:
    """Truncated weights, without wrong answers that the learner finds far off (arXiv:2605.22537).

    12 answers a question. The generator is the run's own engine: without the paper's samples of
    other models, whose log-probs no column of a data set has.
    """
    parent = grpo()
    return replace(parent, sample=replace(parent.sample, votes=12, train=12), loss=presets.ftis())


def hispo() -> Algorithm:
    """Tokens and responses leave on which engine and learner disagree (arXiv:2603.21065).

    Over a constant in place of lengths, as `dr_grpo`. Its thresholds are not published: these are
    ours.
    """
    parent = grpo()
    constant = SeqMeanTokenSumNorm(length=parent.sample.max_tokens)
    return replace(parent, loss=replace(presets.hispo(), aggregate=constant))
