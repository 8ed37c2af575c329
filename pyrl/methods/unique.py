"""Unique: every response of a question once, weighed by what it stands for (arXiv:1903.06059)."""

from dataclasses import replace

from pyrl.advantage import MassBaseline
from pyrl.algorithm import Algorithm
from pyrl.fork import WithoutReplacement
from pyrl.methods.grpo import grpo
from pyrl.methods.ttrl import ttrl
from pyrl.vote import Mass

VOTES = 8


def ttrl_unique() -> Algorithm:
    """TTRL on trees without replacement: the most probable answer is the label."""
    return _unique(ttrl())


def grpo_unique() -> Algorithm:
    """GRPO on trees without replacement, with true answers or a reward function."""
    return _unique(grpo())


def _unique(parent: Algorithm) -> Algorithm:
    return replace(
        parent,
        sample=replace(parent.sample, votes=VOTES, train=VOTES),
        fork=WithoutReplacement(),
        vote=Mass(),
        advantage=(MassBaseline(),),
    )
