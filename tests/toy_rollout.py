"""Rollouts on toy models, and what tests read off them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyrl.engine import NO_TOKENS, Engine
from pyrl.engine.toy import ToyEngine
from pyrl.forest import Forest
from pyrl.fork import EntropyConfidence, EPTree, Flat, Fork, OnlineEntropy, TopEntropy
from pyrl.logits.sampling import Sampling
from pyrl.prune import Keep, Prune
from pyrl.rollout import Rollout, make_signals

EOS = 0
TREES = [
    TopEntropy(mask_tail=0),
    EPTree(forks=1, rounds=2, mask_tail=0),
    OnlineEntropy(quantile=0.6, cooldown=1),
    EntropyConfidence(
        entropy_high=0.7, confidence=0.9, entropy_rise=0.3, cooldown=2, min_tokens=1, group_window=4
    ),
]


def random_toy(seed: int = 0, *, vocabulary: int = 6, end: float = 0.1) -> ToyEngine:
    """Rows of very different entropy; each but that of EOS ends with probability `end`."""
    rng = np.random.default_rng(seed)
    transition_VV = rng.random((vocabulary, vocabulary)) ** rng.uniform(0.2, 8, (vocabulary, 1))
    transition_VV[:, EOS] = 0
    transition_VV *= (1 - end) / transition_VV.sum(axis=1, keepdims=True)
    transition_VV[:, EOS] = end
    return ToyEngine(transition_VV, [EOS])


def prompts(*lengths: int) -> list[NDArray[np.int32]]:
    """Prompt i has lengths[i] tokens and ends with token 1 + i % 5."""
    return [np.full(length, 1 + i % 5, np.int32) for i, length in enumerate(lengths)]


def rollout(
    engine: Engine,
    prompt_tokens: Sequence[NDArray[np.int32]],
    *,
    fork: Fork | None = None,
    prune: Prune | None = None,
    votes: int = 8,
    limit: int = 30,
    seed: int = 7,
    **options: Any,
) -> Rollout:
    fork, prune = fork or Flat(), prune or Keep()
    options.setdefault("signals", make_signals(fork, prune))
    return Rollout(
        engine,
        prompt_tokens,
        votes=votes,
        limit=limit,
        sampling=options.pop("sampling", Sampling()),
        fork=fork,
        prune=prune,
        seed=seed,
        **options,
    )


def answers(forest: Forest) -> list[tuple[Any, ...]]:
    """All that was sampled, bit for bit, in an order that does not depend on the schedule."""
    rows = []
    for leaf in forest.leaves().tolist():
        path = forest.path(leaf)
        columns = (path.tokens, path.logprob, path.entropy, path.confidence)
        rows.append((forest.tree_of(leaf), forest.seed(leaf), *(x.tobytes() for x in columns)))
    return sorted(rows)


def check_budgets(run: Rollout) -> None:
    forest, counts = run.forest, run.counts
    forest.check()
    assert len(forest.open()) == 0
    for tree in range(len(run.prompts)):
        leaf_N = forest.leaves(tree)
        assert len(leaf_N) == run.votes
        per_trunk = Counter(forest.trunk_of(leaf) for leaf in leaf_N.tolist())
        assert max(per_trunk.values()) <= run.fork.cap(run.votes)
    leaf_N = forest.leaves()
    table = forest.leaf_table(leaf_N)
    assert set(table.finish_N.tolist()) <= {1, 2}
    assert table.length_N.max() <= run.limit
    assert len({forest.seed(leaf) for leaf in leaf_N.tolist()}) == len(leaf_N)
    pruned = sum(counts.pruned.values())
    assert pruned <= run.prune.respawns(run.votes) * len(run.prompts)
    assert len(leaf_N) + pruned == counts.trunks + counts.siblings
    assert counts.sampled_tokens == forest.stats()["tokens"]
    if not pruned:
        for trunk in {(t, k) for t, k in zip(table.tree_N, table.trunk_N, strict=True)}:
            mask_N = (table.tree_N == trunk[0]) & (table.trunk_N == trunk[1])
            assert table.weight_N[mask_N].sum() == pytest.approx(1)


def assert_forgotten(engine: Engine) -> None:
    engine.load_weights(None, engine.weight_version())  # RuntimeError if it knows a branch


class ForkRecorder(ToyEngine):
    """A toy engine that remembers its forks as (parent, position, siblings)."""

    def __init__(self, toy: ToyEngine) -> None:
        self.__dict__ = toy.__dict__
        self.forks: list[tuple[int, int, list[int]]] = []

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        self.forks.append((parent, keep, branch_B.tolist()))
        super().fork(parent, keep, branch_B, seed_B, exclude)
