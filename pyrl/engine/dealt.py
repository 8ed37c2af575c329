"""Dealt: one engine in the eyes of a rollout, whose branches the engines of all processes sample.

The rollout of the leader sees what one engine would give it, token by token and in the same order:
rules that compare all branches of a step, budgets and polls need to know of nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl.engine import NO_TOKENS, RUNNING, Branches, Dtype, Engine, Sampled, Work
from pyrl.logits.sampling import Sampling
from pyrl.ranks import Ranks

Call = tuple[str, tuple[Any, ...]]
"""A method of an engine, and its arguments."""


def serve(engine: Engine, ranks: Ranks, calls: Sequence[Sequence[Call]]) -> list[Sampled]:
    """Make this process's calls, and step; at the leader what all have sampled."""
    make: dict[str, Callable[..., object]] = {
        "start": engine.start,
        "submit": engine.submit,
        "fork": engine.fork,
        "finish": engine.finish,
        "abort": engine.abort,
    }
    for name, arguments in calls[ranks.rank]:
        make[name](*arguments)
    return ranks.collect(engine.step())


class Dealt:
    """`Engine`: new branches go to the process with the fewest, siblings to that of their parent.

    What the rollout asks for waits until the next step, and goes out in one message.
    """

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self._engine, self._ranks = engine, ranks
        self._calls: list[list[Call]] = [[] for _ in range(ranks.size)]
        self._running: list[set[int]] = [set() for _ in range(ranks.size)]
        self._rank_of: dict[int, int] = {}
        self._asked: dict[int, tuple[bool, int]] = {}
        """Of each branch that has not entered yet: whether it was submitted, and its turn. Forks
        enter first."""
        self._turn_of: dict[int, int] = {}
        """Of each branch that has entered, in the order of entry."""
        self._turn = 0

    @property
    def dtype(self) -> Dtype:
        return self._engine.dtype

    def start(self, sampling: Sampling) -> None:
        for calls in self._calls:
            calls.append(("start", (sampling,)))

    def submit(self, branches: Branches) -> None:
        rank = int(np.argmin([len(running) for running in self._running]))
        self._calls[rank].append(("submit", (branches,)))
        self._add(branches.branch_B, rank, submitted=True)

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        rank = self._rank_of[parent]
        more = (exclude,) if exclude.size else ()
        self._calls[rank].append(("fork", (parent, keep, branch_B, seed_B, *more)))
        self._add(branch_B, rank, submitted=False)

    def finish(self, branch_B: NDArray[np.int64]) -> None:
        self._each("finish", branch_B)

    def abort(self, branch_B: NDArray[np.int64]) -> None:
        self._each("abort", branch_B)

    def step(self) -> Sampled:
        calls, self._calls = self._calls, [[] for _ in self._calls]
        self._ranks.tell("step", calls)
        sampled = _joined(serve(self._engine, self._ranks, calls))
        for branch in sorted(set(sampled.branch_B.tolist()) & self._asked.keys(), key=self._entry):
            del self._asked[branch]
            self._turn_of[branch] = self._turn = self._turn + 1
        turn_B = [self._turn_of[branch] for branch in sampled.branch_B.tolist()]
        self._left(sampled.branch_B[sampled.finish_B != RUNNING])
        return _taken(sampled, np.argsort(turn_B))

    def load_weights(self, weights: Iterable[tuple[str, Any]] | None, version: int) -> None:
        self._engine.load_weights(weights, version)

    def weight_version(self) -> int:
        return self._engine.weight_version()

    def work(self) -> Work:
        """That of this process's engine."""
        return self._engine.work()

    def close(self) -> None:
        self._engine.close()

    def _entry(self, branch: int) -> tuple[bool, int]:
        return self._asked[branch]

    def _add(self, branch_B: NDArray[np.int64], rank: int, *, submitted: bool) -> None:
        for branch in branch_B.tolist():
            self._turn += 1
            self._asked[branch] = submitted, self._turn
            self._rank_of[branch] = rank
            self._running[rank].add(branch)

    def _each(self, call: str, branch_B: NDArray[np.int64]) -> None:
        """Call each process that has some of the branches, which do not run any more."""
        rank_B = np.array([self._rank_of[branch] for branch in branch_B.tolist()], np.int64)
        for rank in np.unique(rank_B).tolist():
            self._calls[rank].append((call, (branch_B[rank_B == rank],)))
        self._left(branch_B)

    def _left(self, branch_B: NDArray[np.int64]) -> None:
        for branch in branch_B.tolist():
            self._running[self._rank_of[branch]].discard(branch)
            self._asked.pop(branch, None)


def _joined(parts: Sequence[Sampled]) -> Sampled:
    names = [field.name for field in fields(Sampled)]
    return Sampled(*(np.concatenate([vars(part)[name] for part in parts]) for name in names))


def _taken(sampled: Sampled, place_B: NDArray[np.int64]) -> Sampled:
    return Sampled(*(vars(sampled)[field.name][place_B] for field in fields(Sampled)))
