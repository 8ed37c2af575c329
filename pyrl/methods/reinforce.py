"""REINFORCE and its kin: what differs is the number that a reward is compared with."""

from dataclasses import replace

from pyrl import baselines, presets
from pyrl.algorithm import Algorithm
from pyrl.methods.grpo import grpo


def reinforce() -> Algorithm:
    """-A logprob, with the reward itself as A: no ratio, no clip, no baseline (arXiv:2402.14740).

    One update takes all samples of a step: its estimate holds for the policy that sampled.
    """
    return replace(grpo(), advantage=(baselines.Return(),), loss=presets.reinforce())


def reinforce_pp() -> Algorithm:
    """REINFORCE++: PPO's clip on rewards that are whitened over the whole step (arXiv:2501.03262).

    Without the paper's KL penalty in the reward of each token: pyrl has it in the loss (--loss.kl).
    """
    return replace(grpo(), advantage=baselines.reinforce_pp())


def reinforce_pp_baseline() -> Algorithm:
    """REINFORCE++ that subtracts the prompt's mean before it whitens (arXiv:2501.03262)."""
    return replace(reinforce_pp(), advantage=baselines.reinforce_pp_baseline())


def opo() -> Algorithm:
    """The baseline of least variance weighs rewards by length, on policy (arXiv:2505.23585)."""
    return replace(grpo(), advantage=(baselines.LengthBaseline(),))


def gpg() -> Algorithm:
    """REINFORCE on centred rewards, scaled by the share of prompts that teach (arXiv:2504.02546).

    Without the paper's further samples while too few prompts do: --select dynamic has such.
    """
    return replace(reinforce(), advantage=baselines.gpg())
