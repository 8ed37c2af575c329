"""Budget: what a rollout may spend, what its prompts have spent, and when a prompt ends early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

from pyrl._core.tree import Forest
from pyrl.forest import BUDGET, DECIDED
from pyrl.poll import Poll


@dataclass(frozen=True)
class Allowance:
    """What a rollout may spend, whatever leaves are still missing then.

    When it is spent nothing new opens, and running branches end with the tokens that they have. A
    limit in tokens replays from the seed, a limit in seconds does not.
    """

    tokens: int = 0
    """Sampled tokens of one prompt at most; 0: no limit. A prompt ends when one more token for each
    of its branches, those that wait for a row included, would not fit. A prompt that pruning has
    left without any leaf may sample one token more."""
    seconds: float = 0.0
    """Duration of the rollout of all prompts, checked before each step of the engine; 0: no
    limit."""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens: expected >= 0 (0: no limit), got {self.tokens}")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds: expected >= 0 (0: no limit), got {self.seconds}")


UNLIMITED = Allowance()


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
    """Tokens sampled so far; counted only where they are limited."""
    decided: bool = False
    """No missing leaf can change the label."""
    spent: bool = False
    """The allowance is spent."""
    begin: dict[int, int] = field(default_factory=dict)
    """Every branch that was ever opened, in the order of opening, which is the order of the leaves,
    and the position at which it left its parent (0 for a trunk)."""

    def open(self, branches: list[int], at: int) -> None:
        """Count new branches that begin at response position `at`."""
        self.begin |= dict.fromkeys(branches, at)
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
    """Branches that the prune rule dropped, by reason; new trunks replaced them."""
    decided: int = 0
    """Prompts that stopped because no leaf could change their label any more."""
    unneeded: int = 0
    """Running branches that were pruned because their prompt had stopped so."""
    unopened: int = 0
    """Leaves that were never opened because their prompt had stopped so."""
    out_of_tokens: int = 0
    """Prompts that ended because their tokens were spent."""
    out_of_time: int = 0
    """Prompts that ended because the time was up."""
    cut: int = 0
    """Leaves that a spent allowance ended."""
    dropped: int = 0
    """Branches that a spent allowance pruned, because they had not drawn a token yet."""


@dataclass(frozen=True)
class Ending:
    """The running branches of a prompt that end early."""

    tree: int
    cut: list[int]
    """Branches that become leaves with the tokens that they have."""
    dropped: list[int]
    """Branches that are pruned."""
    reason: int
    """Why these are pruned: BUDGET or DECIDED."""


class Limits:
    """Decides when a prompt ends early: its allowance is spent, or its vote is decided.

    Lowers what the budget of such a prompt may still open, and names the running branches that end;
    `Rollout` takes those out of the forest and the engine.
    """

    def __init__(
        self,
        allowance: Allowance,
        poll: Poll | None,
        votes: int,
        forest: Forest,
        budgets: Sequence[Budget],
        counts: Counts,
    ) -> None:
        self.allowance, self.poll, self.votes = allowance, poll, votes
        self.forest, self.budgets, self.counts = forest, budgets, counts
        self.deadline = math.inf
        self.whole = False
        """Every sample is wanted whole, so that no vote stops a prompt."""

    def start(self) -> None:
        """Start the clock, once."""
        if self.allowance.seconds and self.deadline == math.inf:
            self.deadline = monotonic() + self.allowance.seconds

    @property
    def late(self) -> bool:
        """The time is up."""
        return monotonic() > self.deadline

    def spend(self, branches: Iterable[int]) -> None:
        """Charge one token for each of these branches to its prompt."""
        if self.allowance.tokens:
            for branch in branches:
                self.budgets[self.forest.tree_of(branch)].tokens += 1

    def exhausted(self) -> Iterator[Ending]:
        """End the prompts that the next step would take beyond what they may spend."""
        late = self.late
        if not (late or self.allowance.tokens):
            return
        for tree, budget in enumerate(self.budgets):
            over = 0 < self.allowance.tokens < budget.tokens + budget.running
            if (late or over) and (budget.running or budget.leaves):
                if not budget.spent:
                    self.counts.out_of_time += late
                    self.counts.out_of_tokens += not late
                budget.spent = True
                yield self._cut(tree)

    def decided(self, trees: Iterable[int]) -> Iterator[Ending]:
        """End those of these prompts whose label no missing leaf can change."""
        if self.poll is None or self.whole:
            return
        for tree in trees:
            budget = self.budgets[tree]
            missing = self.votes - budget.finished
            if budget.decided or budget.spent or not missing:
                continue
            budget.decided = self.poll.decided(self.forest, tree, missing)
            if budget.decided:
                yield self._stop(tree, self.poll.train)

    def _cut(self, tree: int) -> Ending:
        """End all that runs; a prompt without a leaf keeps one branch until it has drawn a token.

        As a leaf, a sibling that has drawn nothing yet would count its parent's tokens twice.
        """
        budget = self.budgets[tree]
        budget.respawns = 0
        budget.leaves = 0 if budget.running or budget.finished else 1
        running = self._running(tree)
        begun = [b for b in running if self.forest.length(b) > budget.begin[b]]
        empty = [b for b in running if b not in begun]
        if not begun and not budget.finished:
            del empty[:1]
        self.counts.cut += len(begun)
        self.counts.dropped += len(empty)
        return Ending(tree, begun, empty, BUDGET)

    def _stop(self, tree: int, train: int) -> Ending:
        """Keep the prompt's first `train` leaves, running or still to be opened, and no others."""
        budget = self.budgets[tree]
        running = set(self._running(tree))
        alive = running.union(self.forest.leaves(tree).tolist())
        others = [branch for branch in budget.begin if branch in alive][train:]
        unneeded = [branch for branch in others if branch in running]
        unopened = budget.leaves - max(0, train - len(alive))
        budget.leaves -= unopened
        self.counts.decided += unopened + len(unneeded) > 0
        self.counts.unneeded += len(unneeded)
        self.counts.unopened += unopened
        return Ending(tree, [], unneeded, DECIDED)

    def _running(self, tree: int) -> list[int]:
        """Branches of a prompt that run or wait for a row, in the order in which they opened."""
        return [b for b in self.forest.open().tolist() if self.forest.tree_of(b) == tree]
