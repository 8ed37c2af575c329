"""Rollout: questions become trees. The engine samples, the forest forks and prunes."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from inspect import signature
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl import _core
from pyrl._core.tree import Forest, Path, Signals, SignalSpec
from pyrl.budget import UNLIMITED, Allowance, Budget, Counts, Ending, Limits
from pyrl.engine import (
    NO_TOKENS,
    RUNNING,
    STOPPED,
    TRUNCATED,
    Branches,
    Engine,
    EngineError,
    Sampled,
)
from pyrl.forest import DECIDED, REFUSED
from pyrl.fork import Finished, Fork, Site
from pyrl.law import Law
from pyrl.logits.sampling import Sampling
from pyrl.poll import Poll
from pyrl.prune import Prune

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Stop(Protocol):
    """Ends a response that no end token has ended: `pyrl.answers.reading.StopText`."""

    def may_end(self, token_B: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether a response could end with each of these tokens; the others are not asked for."""

    def __call__(self, token_T: NDArray[np.int32]) -> bool:
        """Whether a response, which had not ended before its last token, ends with it."""


def derive_seed(*parts: int) -> int:
    """The seed of a place, which is named by numbers: (run, step) for a step, (step's seed, prompt,
    trunk) for a trunk, (parent's seed, at, round, sibling) for a sibling."""
    data = struct.pack(f"<{len(parts)}Q", *(part & (2**64 - 1) for part in parts))
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def even_seeds(seed: int, tree: int, trunk: int, count: int) -> list[int]:
    """Seeds of `count` trunks, from this one on, whose first random numbers lie one in each of as
    many equal parts of [0, 1), in random order: by itself each number is uniform."""
    random = np.random.default_rng([seed, tree, trunk])
    found: dict[int, int] = {}
    while len(found) < count:
        seed_B = random.integers(0, 2**64, 8 * count, dtype=np.uint64)
        number_B = _core.logits.uniforms(seed_B, np.zeros(len(seed_B), np.int64))
        for part, candidate in zip((number_B * count).astype(int), seed_B.tolist(), strict=True):
            found.setdefault(int(part), candidate)
    return [found[part] for part in random.permutation(count).tolist()]


def answer_start(tokens: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase) -> int:
    """Position of the token that opens the last \\boxed, or the number of tokens without one."""
    opening = "\\boxed"
    boxes = tokenizer.decode(tokens.tolist()).count(opening)
    if boxes == 0:
        return len(tokens)
    # The shortest prefix with all boxes ends with the token that completes the last opening.
    return bisect_left(
        range(len(tokens)),
        boxes,
        key=lambda n: tokenizer.decode(tokens[: n + 1].tolist()).count(opening),
    )


def make_signals(fork: Fork, prune: Prune) -> Signals | None:
    """The C++ signals that the two rules read, or None where neither decides online."""
    spec = SignalSpec()
    forks, prunes = fork.lower(spec), prune.lower(spec)
    return Signals(spec) if forks or prunes else None


@dataclass
class Trunk:
    """The branches that grew from one independent sample of a prompt."""

    tree: int
    branches: list[int]
    """Branches that run or have finished, in the order of opening, the trunk first."""
    cap: int
    """Leaves that it may have."""
    running: int = 1
    round: int = 0
    """Rounds of forks that it has had at its end."""


@dataclass(frozen=True)
class Pruned:
    """What a branch had come to when it was pruned; the forest has forgotten it."""

    reason: int
    """As `Forest.prune` had it."""
    path: Path


class Rollout:
    """Grow the trees of some prompts until each has `votes` finished leaves.

    A fork enters the running batch at once, and a pruned branch leaves it at once; leaves that are
    missing at the end are filled up with independent samples. A branch ends with a token of the
    engine's end tokens, at its limit, or with the token at which `stop` ends it. `seed` makes a
    rollout replay exactly, unless it is limited in time. `Limits` ends a prompt earlier, with at
    least one leaf, when its allowance is spent, or when its poll is decided and the leaves that
    train are there.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[NDArray[np.int32]],
        *,
        votes: int,
        limit: int,
        sampling: Sampling,
        fork: Fork,
        prune: Prune,
        signals: Signals | None,
        seed: int,
        even: bool = False,
        allowance: Allowance = UNLIMITED,
        poll: Poll | None = None,
        stop: Stop | None = None,
        answer_start: Callable[[NDArray[np.int32]], int] = len,
        on_tokens: Callable[[int], None] = lambda tokens: None,
        remembered: int = 0,
    ) -> None:
        """`remembered`: the first trees of which `pruned` keeps what the forest forgets."""
        if votes < 1 or not len(prompts):
            raise ValueError(
                f"expected at least one prompt and one vote, got {len(prompts)} and {votes}"
            )
        self.engine, self.fork, self.prune, self.signals = engine, fork, prune, signals
        self.votes, self.limit, self.seed, self.sampling = votes, limit, seed, sampling
        self.even, self.allowance, self.poll, self.stop = even, allowance, poll, stop
        self.answer_start, self.on_tokens = answer_start, on_tokens
        self.forest = Forest()
        self.law = fork.law(self.forest, votes)
        if self.law is not None and "exclude" not in signature(engine.fork).parameters:
            raise EngineError(
                f"{type(engine).__name__}: fork: expected an `exclude`, the tokens that a sibling "
                f"never draws, for {fork}; this engine has none"
            )
        self.prompts: list[NDArray[np.int32]] = []
        self.budgets: list[Budget] = []
        self.extend(prompts)
        self.retain = fork.trunks(votes) < votes or prune.respawns(votes) > 0
        """Forks may open leaves. A branch can fork with its last token, or after it, so the engine
        keeps finished branches until their trunk is done."""
        self.remembered = remembered
        self.pruned: dict[int, Pruned] = {}
        """Pruned branches of the trees that are remembered."""
        self.parent_of: dict[int, int] = {}
        """The branch that each sibling left; where, is in `Budget.begin`."""
        self.trunk_of: dict[int, Trunk] = {}
        """The trunk of every branch that the engine knows."""
        self.replaces = False
        """All trunks that the fork rule begins with are open, and only finished trunks fork: how
        many leaves will be missing is known before the end."""
        self.counts = Counts()
        self.limits = Limits(allowance, poll, votes, self.forest, self.budgets, self.counts)

    def extend(self, prompts: Sequence[NDArray[np.int32]]) -> None:
        """Further prompts, after those that have their leaves: `run` goes on with their trees."""
        self.engine.start(self.sampling)  # since the last run a sync may have had its probe
        self.prompts += prompts
        self.budgets += [Budget(self.votes, self.prune.respawns(self.votes)) for _ in prompts]
        for prompt in prompts:
            self.forest.add_tree(prompt)

    def run(self) -> Forest:
        """Grow all leaves of all prompts; on an exception the engine forgets every branch."""
        self.limits.start()
        self.replaces = False
        try:
            if self.signals is not None and not self.counts.sampled_tokens:
                self._warm_up(self.signals)
            for tree in range(len(self.prompts)):
                self._spawn(tree, self.fork.trunks(self.votes) - self.budgets[tree].trunks)
            self.replaces = self.signals is None
            while self._drain():
                pass
            if self.law is not None:
                self.law.weigh()
            return self.forest
        finally:
            self.engine.abort(np.fromiter(self.trunk_of, np.int64, len(self.trunk_of)))

    def _warm_up(self, signals: Signals) -> None:
        """Grow the first samples of a run without forks, and read the thresholds off them."""
        signals.begin_step()
        if signals.thresholds().calibrated:
            return
        spec = SignalSpec()
        self.fork.lower(spec)
        self.prune.lower(spec)
        each = -(-spec.warmup_traces // len(self.prompts))
        for tree in range(len(self.prompts)):
            self._spawn(tree, each)
        self.limits.whole = True
        while self.engine_step():
            pass
        self.limits.whole = False
        signals.calibrate()
        for ending in self.limits.decided(range(len(self.prompts))):
            self._end(ending)

    def _drain(self) -> bool:
        """Run until nothing is open, then fill up; False when every prompt has its leaves."""
        while self.engine_step():
            pass
        for tree, budget in enumerate(self.budgets):
            self._spawn(tree, budget.leaves)
        return any(budget.running for budget in self.budgets)

    def _spawn(self, tree: int, count: int, cap: int | None = None) -> None:
        """Open independent samples, each of at most `cap` leaves (None: as the fork rule says)."""
        budget = self.budgets[tree]
        count = min(count, budget.leaves)
        if count <= 0:
            return
        cap = self.fork.cap(self.votes) if cap is None else cap
        if self.even and count > 1:
            seeds = even_seeds(self.seed, tree, budget.trunks, count)
        else:
            seeds = [derive_seed(self.seed, tree, budget.trunks + i) for i in range(count)]
        branches = [self.forest.add_trunk(tree, seed) for seed in seeds]
        if self.law is not None:
            self.law.begin(branches)
        budget.trunks += count
        budget.open(branches, at=0)
        self.counts.trunks += count
        self.engine.submit(
            Branches(
                prompts=[self.prompts[tree]],
                prompt_B=np.zeros(count, np.int64),
                branch_B=np.array(branches, np.int64),
                seed_B=np.array(seeds, np.uint64),
                limit_B=np.full(count, self.limit, np.int64),
                retain=self.retain,
            )
        )
        self.trunk_of |= {branch: Trunk(tree, [branch], cap) for branch in branches}

    def engine_step(self) -> bool:
        """Sample a token for every running branch and act on it; False when none runs."""
        for ending in self.limits.exhausted():
            self._end(ending)
        sampled = self.engine.step()
        if not len(sampled.branch_B):
            return False
        ended = self._gone(sampled.branch_B[sampled.finish_B != RUNNING])
        self.limits.spend(sampled.branch_B.tolist())
        self.counts.sampled_tokens += len(sampled.branch_B)
        self.on_tokens(len(sampled.branch_B))
        self.forest.append(
            sampled.branch_B,
            sampled.token_B,
            sampled.logprob_B,
            sampled.entropy_B,
            sampled.confidence_B,
            self.engine.weight_version(),
        )
        if self.stop is not None:
            stopped_B = self._stopped(self.stop, sampled)
            newly_B = sampled.branch_B[stopped_B & (sampled.finish_B == RUNNING)]
            self.engine.finish(newly_B)
            ended += self._gone(newly_B)
            finish_B = np.where(stopped_B, STOPPED, sampled.finish_B).astype(np.uint8)
            sampled = replace(sampled, finish_B=finish_B)
        done_B = sampled.finish_B != RUNNING
        if self.signals is not None:
            self._decide(self.signals, sampled)
        self.forest.finish(sampled.branch_B[done_B], sampled.finish_B[done_B])
        for trunk in ended:
            self.budgets[trunk.tree].finished += 1
        if self.law is not None:
            ended += self._follow(self.law, sampled)
        for ending in self.limits.decided({trunk.tree for trunk in ended}):
            self._end(ending)
        for trunk in ended:
            self._ended(trunk)
        return True

    def _gone(self, branch_B: NDArray[np.int64]) -> list[Trunk]:
        """Trunks of branches that have ended; the engine knows these no longer, or retains them."""
        known = self.trunk_of
        return [known[b] if self.retain else known.pop(b) for b in branch_B.tolist()]

    def _stopped(self, stop: Stop, sampled: Sampled) -> NDArray[np.bool_]:
        """Which branches `stop` ends with this token; a branch at its limit may be one of them."""
        asked_B = (sampled.finish_B != STOPPED) & stop.may_end(sampled.token_B)
        stopped_B = np.zeros(len(asked_B), bool)
        for row in np.flatnonzero(asked_B).tolist():
            stopped_B[row] = stop(self.forest.path(int(sampled.branch_B[row])).tokens)
        return stopped_B

    def _decide(self, signals: Signals, sampled: Sampled) -> None:
        """Fork and prune, as the rules judge the branches after this token."""
        observed = signals.observe(sampled.branch_B, sampled.entropy_B, sampled.confidence_B)
        running_B = sampled.finish_B == RUNNING
        reason_B = np.where(running_B, self.prune.reason(observed), 0)
        may_fork_B = (reason_B == 0) & (observed.ready_B > 0) & (running_B | self.retain)
        width_B = np.where(may_fork_B, self.fork.width(observed), 1)
        for row in np.flatnonzero(width_B > 1).tolist():
            branch = int(sampled.branch_B[row])
            # Before the token just drawn: each sibling draws its own from the same distribution.
            children_B = self._fork(
                Site(branch, self.forest.length(branch) - 1, int(width_B[row]) - 1)
            )
            if len(children_B):
                signals.inherit(branch, children_B)
        signals.close(sampled.branch_B[~running_B])
        for row in np.flatnonzero(reason_B).tolist():
            branch = int(sampled.branch_B[row])
            if self.budgets[self.trunk_of[branch].tree].respawns > 0:
                signals.close(np.array([branch], np.int64))
                self._prune(branch, int(reason_B[row]))

    def _follow(self, law: Law, sampled: Sampled) -> list[Trunk]:
        """Open and drop what the law says; the trunks of the running branches that were dropped."""
        growth = law.grow(sampled.branch_B, sampled.truncated_logprob_B, sampled.rest_logprob_B)
        stopped = [self._drop(branch) for branch in growth.dropped_B.tolist()]
        siblings = (growth.parent_B, growth.log_mass_B, growth.gumbel_B)
        for parent, log_mass, gumbel in zip(*(x.tolist() for x in siblings), strict=True):
            at = self.forest.length(parent) - 1
            taken = law.taken(parent, at)
            for child in self._fork(Site(parent, at, 1), taken).tolist():
                law.open(child, at, taken, log_mass, gumbel)
        return [trunk for trunk in stopped if trunk is not None]

    def _drop(self, branch: int) -> Trunk | None:
        """Forget a branch that the law keeps no longer; its trunk if it was running."""
        trunk = self.trunk_of.pop(branch)
        budget = self.budgets[trunk.tree]
        budget.leaves += 1
        finished = self.forest.leaf_table(np.array([branch])).finish_N[0] != RUNNING
        budget.finished -= int(finished)
        self.counts.pruned[REFUSED] = self.counts.pruned.get(REFUSED, 0) + 1
        self._forget(branch, REFUSED)
        self.engine.abort(np.array([branch], np.int64))
        trunk.branches.remove(branch)
        return None if finished else trunk

    def _fork(self, site: Site, exclude: NDArray[np.int32] = NO_TOKENS) -> NDArray[np.int64]:
        """Open siblings as far as the prompt's budget and the trunk's cap allow; their handles."""
        trunk = self.trunk_of[site.leaf]
        budget = self.budgets[trunk.tree]
        count = min(site.siblings, budget.leaves, trunk.cap - len(trunk.branches))
        if count <= 0:
            return np.empty(0, np.int64)
        place = (self.forest.seed(site.leaf), site.at, trunk.round)
        seed_B = np.array([derive_seed(*place, i) for i in range(count)], np.uint64)
        children_B = self.forest.fork(site.leaf, site.at, seed_B)
        self.engine.fork(site.leaf, site.at, children_B, seed_B, exclude)
        children = children_B.tolist()
        self.trunk_of |= dict.fromkeys(children, trunk)
        self.parent_of |= dict.fromkeys(children, site.leaf)
        trunk.branches += children
        trunk.running += count
        budget.open(children, site.at)
        self.counts.forks += 1
        self.counts.siblings += count
        return children_B

    def _prune(self, branch: int, reason: int) -> None:
        """Drop a branch; its leaf goes to a new trunk."""
        budget = self.budgets[self.trunk_of[branch].tree]
        budget.respawns -= 1
        budget.leaves += 1
        self.counts.pruned[reason] = self.counts.pruned.get(reason, 0) + 1
        self._forget(branch, reason)
        self._leave([branch])

    def _forget(self, branch: int, reason: int) -> None:
        if self.forest.tree_of(branch) < self.remembered:
            self.pruned[branch] = Pruned(reason, self.forest.path(branch))
        self.forest.prune(branch, reason)

    def _end(self, ending: Ending) -> None:
        """End branches of a prompt early, as its limits say."""
        cut_B = np.array(ending.cut, np.int64)
        self.forest.finish(cut_B, np.full(len(cut_B), TRUNCATED, np.uint8))
        if self.law is not None:
            self._break(self.law, ending)
        for branch in ending.dropped:
            self._forget(branch, ending.reason)
        self.budgets[ending.tree].finished += len(cut_B)
        self._leave(ending.cut + ending.dropped)

    def _break(self, law: Law, ending: Ending) -> None:
        """A question ends before the law has: its weights are of what it has come to."""
        if ending.reason == DECIDED:
            law.close(ending.tree)
        for branch in ending.dropped:
            law.refuse(branch)

    def _leave(self, branches: list[int]) -> None:
        """Take running branches out of the engine."""
        self.engine.abort(np.array(branches, np.int64))
        trunks = [self.trunk_of.pop(branch) for branch in branches]
        for trunk, branch in zip(trunks, branches, strict=True):
            trunk.branches.remove(branch)
        for trunk in trunks:
            self._ended(trunk)

    def _ended(self, trunk: Trunk) -> None:
        """Count a branch that has ended; after its last one a trunk forks again, or is done."""
        budget = self.budgets[trunk.tree]
        trunk.running -= 1
        budget.running -= 1
        if trunk.running or not trunk.branches or not self.retain:
            return
        leaves = tuple(trunk.branches)
        if self.law is not None:
            budget.leaves = 0  # The policy has fewer responses than votes were wanted.
        if budget.leaves:
            begin = tuple(budget.begin[leaf] for leaf in leaves)
            finished = Finished(self.forest, leaves, begin, self._answer, trunk.round, self.votes)
            trunk.round += 1
            sites = self.fork.at_end(finished)
            if len({(site.leaf, site.at) for site in sites}) < len(sites):
                rule = type(self.fork).__name__
                raise ValueError(f"{rule}.at_end: expected each place once, got {sites}")
            for site in sites:
                self._fork_finished(site)
        if not trunk.running:
            self.engine.abort(np.array(leaves, np.int64))
            for leaf in leaves:
                del self.trunk_of[leaf]
            if self.replaces:
                self._replace(trunk.tree)

    def _replace(self, tree: int) -> None:
        """Open now, in a full batch, the leaves that the open trunks can no longer supply.

        These samples do not fork: the other leaves belong to the trunks that were there first.
        """
        open_trunks = {id(t): t for t in self.trunk_of.values() if t.tree == tree}.values()
        possible = sum(trunk.cap - len(trunk.branches) for trunk in open_trunks)
        self._spawn(tree, self.budgets[tree].leaves - possible, cap=1)

    def _fork_finished(self, site: Site) -> None:
        """Fork a finished branch: its siblings start with its windows as they were there."""
        children_B = self._fork(site)
        if self.signals is not None and len(children_B):
            path, seen = self.forest.path(site.leaf), site.at + 1
            self.signals.rewind(site.leaf, path.entropy[:seen], path.confidence[:seen])
            self.signals.inherit(site.leaf, children_B)

    def _answer(self, leaf: int) -> int:
        return self.answer_start(self.forest.path(leaf).tokens)
