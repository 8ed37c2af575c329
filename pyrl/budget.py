"""Budget: what a rollout may spend, what a prompt has spent of it, and what happened."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Allowance:
    """What a rollout may spend beside its leaves.

    When it is spent nothing new opens, and what runs ends with what it has. Tokens replay from the
    seed, seconds do not.
    """

    tokens: int = 0
    """Sampled for one prompt, at most; 0: no limit. It is spent once a token for each of its
    branches, those that wait for a row included, would not fit; a prompt that pruning has left
    without any samples one more."""
    seconds: float = 0.0
    """Of the rollout of all prompts, looked at before each step of the engine; 0: no limit."""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens: expected >= 0 (0: no limit), got {self.tokens}")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds: expected >= 0 (0: no limit), got {self.seconds}")


UNLIMITED = Allowance()


@dataclass
class Trunk:
    """The branches that grew from one independent sample of a prompt."""

    tree: int
    begin: dict[int, int]
    """Each branch (the trunk first) and the position where it left its parent."""
    cap: int
    """Leaves that it may have."""
    running: int = 1
    round: int = 0


@dataclass
class Budget:
    """What one prompt may still open, and what it has."""

    leaves: int
    """Leaves still to be opened."""
    respawns: int
    """Pruned branches that may still be replaced; with none left nothing more is pruned."""
    trunks: int = 0
    running: int = 0
    finished: int = 0
    tokens: int = 0
    """Sampled so far; counted only where they are limited."""
    decided: bool = False
    """No missing leaf can change the label."""
    spent: bool = False
    """It has no allowance left."""
    branches: list[int] = field(default_factory=list)
    """All that were ever opened, in that order, which is the order of the leaves."""

    def open(self, branches: list[int]) -> None:
        self.branches += branches
        self.leaves -= len(branches)
        self.running += len(branches)


@dataclass
class Counts:
    """What happened in one rollout; the source of the tree/* metrics."""

    sampled_tokens: int = 0
    trunks: int = 0
    forks: int = 0
    siblings: int = 0
    pruned: dict[int, int] = field(default_factory=dict)
    """By the rule, per reason; these were replaced."""
    decided: int = 0
    """Prompts that stopped because no leaf could change their label any more."""
    unneeded: int = 0
    """Branches of theirs that were pruned."""
    unopened: int = 0
    """Leaves of theirs that were never opened."""
    out_of_tokens: int = 0
    """Prompts."""
    out_of_time: int = 0
    """Prompts."""
    cut: int = 0
    """Leaves that an allowance ended."""
    dropped: int = 0
    """Branches pruned at that time, because they had no token of their own."""
