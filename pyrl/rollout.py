"""Rollout: questions become trees. The engine samples, the forest forks and prunes."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pyrl._core.tree import Forest, Signals, SignalSpec
from pyrl.budget import UNLIMITED, Allowance, Budget, Counts, Trunk
from pyrl.engine import RUNNING, TRUNCATED, Branches, Engine, Sampled
from pyrl.forest import BUDGET, DECIDED
from pyrl.fork import Finished, Fork, Site
from pyrl.logits.sampling import Sampling
from pyrl.poll import Poll
from pyrl.prune import Prune


def derive_seed(*parts: int) -> int:
    """The seed of a place: (run, step), (of those, prompt, trunk), (parent, at, round, sibling)."""
    data = struct.pack(f"<{len(parts)}Q", *(part & (2**64 - 1) for part in parts))
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def answer_start(tokens: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase) -> int:
    """Position of the token that opens the last \\boxed, or the number of tokens."""
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


class Rollout:
    """Grow the trees of some prompts until each has `votes` finished leaves.

    A fork enters the running batch at once; a pruned branch leaves it at once; whatever is missing
    at the end is filled up with independent samples. `seed` makes a rollout replay exactly, unless
    it is limited in time. A prompt ends earlier, with at least one leaf, when its allowance is
    spent, or when its poll is decided and the leaves that train are there.
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
        allowance: Allowance = UNLIMITED,
        poll: Poll | None = None,
        answer_start: Callable[[NDArray[np.int32]], int] = len,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        if votes < 1 or not len(prompts):
            raise ValueError(
                f"expected at least one prompt and one vote, got {len(prompts)} and {votes}"
            )
        self.engine, self.fork, self.prune, self.signals = engine, fork, prune, signals
        self.votes, self.limit, self.seed = votes, limit, seed
        self.allowance, self.poll = allowance, poll
        self.deadline = math.inf
        self.answer_start, self.on_tokens = answer_start, on_tokens
        self.forest = Forest()
        self.prompts = list(prompts)
        self.budgets = [Budget(votes, prune.respawns(votes)) for _ in self.prompts]
        for prompt in self.prompts:
            self.forest.add_tree(prompt)
        self.retain = fork.trunks(votes) < votes or prune.respawns(votes) > 0
        """There are leaves that a fork may open. A branch can fork with its last token, or after
        it, so the engine keeps those that have finished until their trunk is done."""
        self.trunk_of: dict[int, Trunk] = {}
        """Of every branch that the engine knows."""
        self.replaces = False
        """All trunks are open that the fork rule begins with, and forks come from finished ones
        alone: how many leaves will be missing is known before the end."""
        self.counts = Counts()
        engine.start(sampling)

    def run(self) -> Forest:
        """All leaves of all prompts; on an exception the engine forgets every branch."""
        if self.allowance.seconds:
            self.deadline = monotonic() + self.allowance.seconds
        try:
            if self.signals is not None:
                self._warm_up(self.signals)
            for tree in range(len(self.prompts)):
                self._spawn(tree, self.fork.trunks(self.votes) - self.budgets[tree].trunks)
            self.replaces = self.signals is None
            while self._drain():
                pass
            return self.forest
        finally:
            self.engine.abort(np.fromiter(self.trunk_of, np.int64, len(self.trunk_of)))

    def _warm_up(self, signals: Signals) -> None:
        """The first samples of a run grow alone: thresholds are read off them before any fork."""
        signals.begin_step()
        if signals.thresholds().calibrated:
            return
        spec = SignalSpec()
        self.fork.lower(spec)
        self.prune.lower(spec)
        each = -(-spec.warmup_traces // len(self.prompts))
        for tree in range(len(self.prompts)):
            self._spawn(tree, each)
        poll, self.poll = self.poll, None  # the calibration wants whole samples
        while self.engine_step():
            pass
        self.poll = poll
        signals.calibrate()
        self._stop_decided(range(len(self.prompts)))

    def _drain(self) -> bool:
        """Run until nothing is open, then fill up; False once every prompt has its leaves."""
        while self.engine_step():
            pass
        for tree, budget in enumerate(self.budgets):
            self._spawn(tree, budget.leaves)
        return any(budget.running for budget in self.budgets)

    def _spawn(self, tree: int, count: int, cap: int | None = None) -> None:
        """Open independent samples, of at most `cap` leaves each (None: as the fork rule says)."""
        budget = self.budgets[tree]
        count = min(count, budget.leaves)
        if count <= 0:
            return
        cap = self.fork.cap(self.votes) if cap is None else cap
        seeds = [derive_seed(self.seed, tree, budget.trunks + i) for i in range(count)]
        branches = [self.forest.add_trunk(tree, seed) for seed in seeds]
        budget.trunks += count
        budget.open(branches)
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
        self.trunk_of |= {branch: Trunk(tree, {branch: 0}, cap) for branch in branches}

    def engine_step(self) -> bool:
        """One token for every running branch, and what follows from it; False when none runs."""
        self._keep_allowance()
        sampled = self.engine.step()
        if not len(sampled.branch_B):
            return False
        if self.allowance.tokens:
            for branch in sampled.branch_B.tolist():
                self.budgets[self.trunk_of[branch].tree].tokens += 1
        done_B = sampled.finish_B != RUNNING
        ended = [
            self.trunk_of[branch] if self.retain else self.trunk_of.pop(branch)
            for branch in sampled.branch_B[done_B].tolist()
        ]
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
        if self.signals is not None:
            self._decide(self.signals, sampled)
        self.forest.finish(sampled.branch_B[done_B], sampled.finish_B[done_B])
        for trunk in ended:
            self.budgets[trunk.tree].finished += 1
        self._stop_decided({trunk.tree for trunk in ended})
        for trunk in ended:
            self._ended(trunk)
        return True

    def _decide(self, signals: Signals, sampled: Sampled) -> None:
        """Fork and prune by what the branches look like with this token."""
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

    def _fork(self, site: Site) -> NDArray[np.int64]:
        """Open siblings as far as the prompt's budget and the trunk's cap allow; these."""
        trunk = self.trunk_of[site.leaf]
        budget = self.budgets[trunk.tree]
        count = min(site.siblings, budget.leaves, trunk.cap - len(trunk.begin))
        if count <= 0:
            return np.empty(0, np.int64)
        place = (self.forest.seed(site.leaf), site.at, trunk.round)
        seed_B = np.array([derive_seed(*place, i) for i in range(count)], np.uint64)
        children_B = self.forest.fork(site.leaf, site.at, seed_B)
        self.engine.fork(site.leaf, site.at, children_B, seed_B)
        for child in children_B.tolist():
            trunk.begin[child] = site.at
            self.trunk_of[child] = trunk
        trunk.running += count
        budget.open(children_B.tolist())
        self.counts.forks += 1
        self.counts.siblings += count
        return children_B

    def _prune(self, branch: int, reason: int) -> None:
        """Drop a branch; its leaf goes to a new trunk."""
        budget = self.budgets[self.trunk_of[branch].tree]
        budget.respawns -= 1
        budget.leaves += 1
        self.counts.pruned[reason] = self.counts.pruned.get(reason, 0) + 1
        self.forest.prune(branch, reason)
        self._leave([branch])

    def _keep_allowance(self) -> None:
        """Cut the prompts that the next step would take beyond what they may spend."""
        late = monotonic() > self.deadline
        if not (late or self.allowance.tokens):
            return
        for tree, budget in enumerate(self.budgets):
            spent = 0 < self.allowance.tokens < budget.tokens + budget.running
            if (late or spent) and (budget.running or budget.leaves):
                if not budget.spent:
                    self.counts.out_of_time += late
                    self.counts.out_of_tokens += not late
                budget.spent = True
                self._cut(tree)

    def _cut(self, tree: int) -> None:
        """End what runs with what it has; a prompt without a leaf waits for one with a token."""
        budget = self.budgets[tree]
        budget.respawns = 0
        budget.leaves = 0 if budget.running or budget.finished else 1
        running = self._running(tree)
        begun = [b for b in running if self.forest.length(b) > self.trunk_of[b].begin[b]]
        empty = [b for b in running if b not in begun]
        if not begun and not budget.finished:
            del empty[:1]
        self.forest.finish(np.array(begun, np.int64), np.full(len(begun), TRUNCATED, np.uint8))
        for branch in empty:
            self.forest.prune(branch, BUDGET)
        budget.finished += len(begun)
        self.counts.cut += len(begun)
        self.counts.dropped += len(empty)
        self._leave(begun + empty)

    def _stop_decided(self, trees: Iterable[int]) -> None:
        """Stop prompts whose label no missing leaf can change; the leaves that train go on."""
        if self.poll is None:
            return
        for tree in trees:
            budget = self.budgets[tree]
            missing = self.votes - budget.finished
            if budget.decided or budget.spent or not missing:
                continue
            budget.decided = self.poll.decided(self.forest, tree, missing)
            if budget.decided:
                self._stop(tree, self.poll.train)

    def _stop(self, tree: int, train: int) -> None:
        """Prune what runs and open nothing, apart from the prompt's first `train` leaves."""
        budget = self.budgets[tree]
        running = set(self._running(tree))
        alive = running.union(self.forest.leaves(tree).tolist())
        others = [branch for branch in budget.branches if branch in alive][train:]
        unneeded = [branch for branch in others if branch in running]
        unopened = budget.leaves - max(0, train - len(alive))
        budget.leaves -= unopened
        self.counts.decided += unopened + len(unneeded) > 0
        self.counts.unneeded += len(unneeded)
        self.counts.unopened += unopened
        for branch in unneeded:
            self.forest.prune(branch, DECIDED)
        self._leave(unneeded)

    def _running(self, tree: int) -> list[int]:
        """Branches of a prompt that run or wait for a row, in the order in which they opened."""
        return [b for b in self.forest.open().tolist() if self.forest.tree_of(b) == tree]

    def _leave(self, branches: list[int]) -> None:
        """Take running branches out of the engine."""
        self.engine.abort(np.array(branches, np.int64))
        trunks = [self.trunk_of.pop(branch) for branch in branches]
        for trunk, branch in zip(trunks, branches, strict=True):
            del trunk.begin[branch]
        for trunk in trunks:
            self._ended(trunk)

    def _ended(self, trunk: Trunk) -> None:
        """One branch less; the last one of a trunk lets it fork again or gives its cache back."""
        trunk.running -= 1
        self.budgets[trunk.tree].running -= 1
        if trunk.running or not trunk.begin or not self.retain:
            return
        leaves = tuple(trunk.begin)
        if self.budgets[trunk.tree].leaves:
            begin = tuple(trunk.begin.values())
            finished = Finished(self.forest, leaves, begin, self._answer, trunk.round)
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
        """Open now, in a full batch, what the open trunks cannot come to any more.

        These do not fork: the leaves that are left belong to the trunks that were there first.
        """
        open_trunks = {id(t): t for t in self.trunk_of.values() if t.tree == tree}.values()
        possible = sum(trunk.cap - len(trunk.begin) for trunk in open_trunks)
        self._spawn(tree, self.budgets[tree].leaves - possible, cap=1)

    def _fork_finished(self, site: Site) -> None:
        """Fork where a branch once was: the siblings' windows start from what it looked like."""
        children_B = self._fork(site)
        if self.signals is not None and len(children_B):
            path, seen = self.forest.path(site.leaf), site.at + 1
            self.signals.rewind(site.leaf, path.entropy[:seen], path.confidence[:seen])
            self.signals.inherit(site.leaf, children_B)

    def _answer(self, leaf: int) -> int:
        return self.answer_start(self.forest.path(leaf).tokens)
