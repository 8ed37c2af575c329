"""Clipping: token ratios whose gradient is bounded in another way than by PPO's clip."""

from dataclasses import replace

from pyrl import presets
from pyrl.algorithm import Algorithm
from pyrl.methods.grpo import grpo


def dapo() -> Algorithm:
    """GRPO with a raised upper clip (arXiv:2503.14476).

    16 updates share the samples of a step, as in the paper. Without its dynamic sampling, which
    replaces prompts whose rewards are all equal, and its penalty on overlong answers.
    """
    return replace(grpo(), loss=presets.dapo(), updates_per_step=16)


def cispo() -> Algorithm:
    """The clipped ratio only weighs a token, so that none loses its gradient (arXiv:2506.13585).

    16 updates share the samples of a step, as in the paper.
    """
    return replace(grpo(), loss=presets.cispo(), updates_per_step=16)


def sapo() -> Algorithm:
    """A sigmoid of the ratio in place of the clip (arXiv:2511.20347)."""
    return replace(grpo(), loss=presets.sapo())


def dppo() -> Algorithm:
    """Tokens are cut by the change of their probability, not by its ratio (arXiv:2602.04879)."""
    return replace(grpo(), loss=presets.dppo())


def dppo_kl() -> Algorithm:
    """The same by the KL divergence of a token against all others (arXiv:2602.04879)."""
    return replace(dppo(), loss=presets.dppo_kl())
