"""Clipping: token ratios whose gradient is bounded in another way than by PPO's clip."""

from dataclasses import replace

from pyrl import presets
from pyrl.algorithm import Algorithm
from pyrl.methods.grpo import grpo
from pyrl.reward import OverlongReward
from pyrl.select import Dynamic


def dapo() -> Algorithm:
    """A raised upper clip, questions whose rewards differ, no overlong answers (arXiv:2503.14476).

    Rewards are 1 or -1 less a long answer's penalty; --reward-function replaces both. A question
    also trains where its penalties alone differ: the paper compares right and wrong. 16 updates
    share the samples of a step, as in section 4.1.
    """
    return replace(
        grpo(),
        reward=OverlongReward(wrong=-1.0),
        select=Dynamic(),
        loss=presets.dapo(),
        updates_per_step=16,
    )


def cispo() -> Algorithm:
    """The clipped ratio only weighs a token, so that none loses its gradient (arXiv:2506.13585).

    16 updates share the samples of a step, as in section 3.1.
    """
    return replace(grpo(), loss=presets.cispo(), updates_per_step=16)


def sapo() -> Algorithm:
    """A sigmoid of the ratio in place of the clip (arXiv:2511.20347)."""
    return replace(grpo(), loss=presets.sapo())


def dppo() -> Algorithm:
    """Tokens are cut by the change of their probability, not by its ratio (arXiv:2602.04879)."""
    return replace(grpo(), loss=presets.dppo())


def dppo_kl() -> Algorithm:
    """DPPO that cuts by the KL divergence of a token against all others (arXiv:2602.04879)."""
    return replace(dppo(), loss=presets.dppo_kl())
