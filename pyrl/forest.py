"""The rollout forest: a tree of branches per prompt, every shared token stored once (C++)."""

from pyrl._core import StaleHandleError
from pyrl._core.tree import Forest, LeafTable, Path, Segments

LOW_CONFIDENCE, TAIL_DECLINE, ENTROPY_SPIKE, BUDGET, DECIDED = 1, 2, 3, 4, 5
"""Reasons of `Forest.prune` and indices of `Forest.pruned()`; BUDGET is also any other reason,
DECIDED for a vote that the branch cannot change."""

__all__ = [
    "BUDGET",
    "DECIDED",
    "ENTROPY_SPIKE",
    "LOW_CONFIDENCE",
    "TAIL_DECLINE",
    "Forest",
    "LeafTable",
    "Path",
    "Segments",
    "StaleHandleError",
]
