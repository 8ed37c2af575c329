"""Sequence: ratios of a response, of a prefix, or of a token and what came before it."""

from dataclasses import replace

from pyrl import presets
from pyrl.algorithm import Algorithm
from pyrl.methods.grpo import grpo


def gspo() -> Algorithm:
    """A response is clipped as a whole, by the geometric mean of its ratios (arXiv:2507.18071).

    4 updates share the samples of a step, as in section 5.1.
    """
    return replace(grpo(), loss=presets.gspo(), updates_per_step=4)


def gmpo() -> Algorithm:
    """The geometric mean of a response's ratios, each clipped before (arXiv:2507.20673)."""
    return replace(grpo(), loss=presets.gmpo())


def ctpo() -> Algorithm:
    """Ratios of prefixes, in bounds that widen with the position (arXiv:2605.07331).

    With the released weight, at most 5, for a response's mismatch with the engine that sampled it.
    16 updates share the samples of a step: the released scripts train on 32 of 512.
    """
    return replace(grpo(), loss=presets.ctpo(), updates_per_step=16)


def minpro() -> Algorithm:
    """A token's ratio times the smallest before it (arXiv:2601.22718).

    The paper's bounds are not published: PPO's stand in for them.
    """
    return replace(grpo(), loss=presets.minpro())


def minpro_cispo() -> Algorithm:
    """MinPRO's ratio as a detached weight of at most 1.2, a bound of ours (arXiv:2601.22718)."""
    return replace(minpro(), loss=presets.minpro_cispo())
