"""The rollout forest: a tree of branches per prompt, every shared token stored once (C++)."""

from pyrl._core import StaleHandleError
from pyrl._core.tree import Forest, LeafTable, Path, Segments

LOW_CONFIDENCE, TAIL_DECLINE, ENTROPY_SPIKE, BUDGET, DECIDED, REFUSED = range(1, 7)
"""Reasons of `Forest.prune` and indices of `Forest.pruned()`; BUDGET is also any other reason,
DECIDED for a vote that the branch cannot change, REFUSED for a tree without replacement that keeps
others."""

__all__ = [
    "BUDGET",
    "DECIDED",
    "ENTROPY_SPIKE",
    "LOW_CONFIDENCE",
    "REFUSED",
    "TAIL_DECLINE",
    "Forest",
    "LeafTable",
    "Path",
    "Segments",
    "StaleHandleError",
]
