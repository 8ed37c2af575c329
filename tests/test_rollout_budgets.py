"""Rollouts keep their budgets under every pair of rules, and compute no token twice."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rollout_rules import FORKS, PRUNES, RandomDoubt
from toy_rollout import (
    EOS,
    TREES,
    ForkRecorder,
    assert_forgotten,
    check_budgets,
    prompts,
    random_toy,
    rollout,
)

from pyrl._core.tree import Observed, SignalSpec
from pyrl.engine import STOPPED
from pyrl.fork import EntropyConfidence, Fork, TopEntropy
from pyrl.prune import Keep, Prune
from pyrl.rollout import make_signals


@settings(max_examples=250, deadline=None)
@example(  # a branch may fork with the token that ends it, also if all leaves began as trunks
    fork=EntropyConfidence(entropy_high=0.0, confidence=1.0, entropy_rise=0.0, trunk_share=1.0,
                           cooldown=0, min_tokens=0, warmup_traces=0, max_width=3),
    prune=RandomDoubt(share=0.5, respawn_share=1.0), votes=9, limit=12, end=0.3, seed=0,
)  # fmt: skip
@given(
    fork=FORKS,
    prune=PRUNES,
    votes=st.integers(1, 14),
    limit=st.sampled_from([1, 2, 5, 12]),
    end=st.sampled_from([0.0, 0.1, 0.4, 0.9]),
    seed=st.integers(0, 1000),
)
def test_every_prompt_gets_its_votes_within_its_budgets(
    fork: Fork, prune: Prune, votes: int, limit: int, end: float, seed: int
) -> None:
    signals = make_signals(fork, prune)
    engine = random_toy(seed, end=end)
    for step in range(2):  # the second has thresholds from the start
        run = rollout(
            engine,
            prompts(3, 1, 2),
            fork=fork,
            prune=prune,
            votes=votes,
            limit=limit,
            signals=signals,
            seed=step,
        )
        run.run()
        check_budgets(run)
        assert_forgotten(engine)


@pytest.mark.parametrize("fork", TREES, ids=repr)
def test_answers_that_end_at_once_leave_a_flat_group(fork: Fork) -> None:
    for engine, limit in [(random_toy(end=1.0), 9), (random_toy(end=0.0), 1)]:
        run = rollout(engine, prompts(1, 4), fork=fork, limit=limit, votes=7)
        run.run()
        check_budgets(run)
        assert (run.counts.trunks, run.counts.forks) == (14, 0)
        assert set(run.forest.leaf_table(run.forest.leaves()).length_N.tolist()) == {1}


@pytest.mark.parametrize("fork", TREES, ids=repr)
def test_trees_do_fork(fork: Fork) -> None:
    signals = make_signals(fork, Keep())
    for seed in range(2):
        run = rollout(random_toy(end=0.03), prompts(1, 4), fork=fork, votes=30, signals=signals,
                      seed=seed)  # fmt: skip
        run.run()
    assert run.counts.forks > 4
    assert run.counts.sampled_tokens < run.forest.leaf_table(run.forest.leaves()).length_N.sum()


def test_every_leaf_is_a_path_of_the_model_with_its_probabilities() -> None:
    engine = random_toy(end=0.05)
    log_VV = engine._log_VV.numpy()
    run = rollout(engine, prompts(1, 2, 3), fork=TopEntropy(mask_tail=0), votes=20)
    forest = run.run()
    for leaf in forest.leaves().tolist():
        path = forest.path(leaf)
        last = np.concatenate([forest.prompt(forest.tree_of(leaf))[-1:], path.tokens[:-1]])
        np.testing.assert_allclose(path.logprob, log_VV[last, path.tokens], rtol=1e-6)
        assert EOS not in path.tokens[:-1]
        row = forest.leaf_table(np.array([leaf]))
        assert (path.tokens[-1] == EOS) == (row.finish_N[0] == STOPPED)
        assert path.tokens[-1] == EOS or len(path.tokens) == run.limit


def test_without_respawns_nothing_is_pruned() -> None:
    run = rollout(random_toy(), prompts(2), prune=RandomDoubt(share=1.0, respawn_share=0.0))
    run.run()
    assert run.counts.pruned == {}


def test_pruned_branches_are_replaced_by_trunks_and_counted() -> None:
    run = rollout(random_toy(end=0.02), prompts(2), prune=RandomDoubt(share=1.0, respawn_share=0.5))
    forest = run.run()
    assert run.counts.pruned == {4: 4}
    assert run.counts.trunks == 12
    assert forest.pruned()[4] == 4
    assert run.counts.sampled_tokens > forest.leaf_table(forest.leaves()).length_N.sum()


def test_siblings_of_a_finished_trunk_are_judged_by_all_that_they_share() -> None:
    """A fork behind the trunk's low point is as doubtful as the trunk was there."""

    @dataclass(frozen=True)
    class Seen(Keep):
        seen: list[tuple[float, float]]

        def lower(self, spec: SignalSpec) -> bool:
            spec.group_window, spec.tail_window, spec.warmup_traces = 1, 3, 0
            return True

        def reason(self, observed: Observed) -> np.ndarray:
            columns = (observed.min_confidence_B, observed.tail_confidence_B)
            self.seen.extend(zip(*(x.tolist() for x in columns), strict=True))
            return observed.prune_B

    engine, seen = ForkRecorder(random_toy(3, vocabulary=12, end=0.02)), Seen([])
    run = rollout(engine, prompts(1), fork=TopEntropy(mask_tail=0), prune=seen, votes=5)
    forest = run.run()
    assert len(engine.forks) == 2
    expected = []
    for leaf in forest.leaves().tolist():
        begin = next((at for _, at, new in engine.forks if leaf in new), 0)
        confidence = forest.path(leaf).confidence
        expected += [
            (confidence[: t + 1].min(), confidence[max(0, t - 2) : t + 1].mean())
            for t in range(begin, len(confidence))
        ]
    np.testing.assert_allclose(sorted(seen.seen), sorted(expected), rtol=1e-6)


def test_a_branch_may_fork_with_its_last_token_also_if_all_leaves_began_as_trunks() -> None:
    fork = EntropyConfidence(
        entropy_high=0.0, confidence=1.0, entropy_rise=0.0, trunk_share=1.0, cooldown=0,
        min_tokens=0, warmup_traces=0,
    )  # fmt: skip
    prune, last = RandomDoubt(share=0.3, respawn_share=1.0), []
    for seed in range(10):
        engine = ForkRecorder(random_toy(end=0.4))
        run = rollout(engine, prompts(1, 2), fork=fork, prune=prune, votes=12, seed=seed)
        leaves = set(run.run().leaves().tolist())
        last += [
            at == run.forest.length(parent) - 1
            for parent, at, _ in engine.forks
            if parent in leaves
        ]
    assert any(last)
    assert not all(last)


# ---- work


def test_a_rollout_without_late_trunks_computes_each_prompt_once_and_each_token_once() -> None:
    engine = random_toy(end=0.0)
    run = rollout(engine, prompts(5, 7), fork=TopEntropy(mask_tail=0), votes=20)
    leaves = len(run.run().leaves())
    work = engine.work()
    assert work.prompt_tokens == 12
    # The model never sees the token that ends a leaf.
    assert work.decode_tokens == run.counts.sampled_tokens - leaves
