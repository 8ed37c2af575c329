"""Rollouts that run out of tokens or time: what is open ends, and every prompt has a leaf."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from demo_rollout import demo_engine, demo_prompts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rollout_rules import FORKS, PRUNES, RandomDoubt
from toy_rollout import TREES, answers, assert_forgotten, prompts, random_toy, rollout

from pyrl.budget import Allowance
from pyrl.engine import STOPPED, TRUNCATED, Engine, Sampled
from pyrl.forest import BUDGET
from pyrl.fork import EntropyConfidence, Flat, Fork, TopEntropy
from pyrl.prune import Doubt, Keep, Prune
from pyrl.rollout import Rollout, make_signals


class TokenCounter:
    """An engine that counts the tokens of each prompt, whatever becomes of them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.run: Rollout
        self.tokens: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> Sampled:
        sampled = self.engine.step()
        self.tokens.update(self.run.forest.tree_of(b) for b in sampled.branch_B.tolist())
        return sampled


@dataclass
class Clock:
    """Seconds that pass when an engine steps, one each."""

    engine: Engine
    now: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self) -> float:
        return self.now

    def step(self) -> Sampled:
        sampled = self.engine.step()
        self.now += len(sampled.branch_B) > 0
        return sampled


def check_ended(run: Rollout) -> None:
    """Every prompt has leaves, each of at least one token, and nothing else is left over."""
    forest, counts = run.forest, run.counts
    forest.check()
    assert len(forest.open()) == 0
    assert_forgotten(run.engine)
    for tree, budget in enumerate(run.budgets):
        assert 1 <= len(forest.leaves(tree)) == budget.finished <= run.votes
        assert budget.running == 0
    table = forest.leaf_table(forest.leaves())
    assert table.length_N.min() >= 1
    dropped = int(forest.pruned()[BUDGET]) - counts.pruned.get(BUDGET, 0)
    assert dropped == counts.dropped
    pruned = sum(counts.pruned.values())
    assert len(forest.leaves()) + pruned + dropped == counts.trunks + counts.siblings
    short_N = (table.finish_N == TRUNCATED) & (table.length_N < run.limit)
    assert counts.cut >= short_N.sum()


@settings(max_examples=200, deadline=None)
@example(  # all that has a token is pruned, and a new trunk finds nothing left
    fork=Flat(), prune=RandomDoubt(share=1.0, respawn_share=1.0), votes=1, limit=5, end=0.1,
    tokens=1, seed=0,
)  # fmt: skip
@given(
    fork=FORKS,
    prune=PRUNES,
    votes=st.integers(1, 14),
    limit=st.sampled_from([1, 5, 12]),
    end=st.sampled_from([0.0, 0.1, 0.4]),
    tokens=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
def test_no_prompt_samples_more_tokens_than_it_may(
    fork: Fork, prune: Prune, votes: int, limit: int, end: float, tokens: int, seed: int
) -> None:
    tokens = max(tokens, votes)
    engine = TokenCounter(random_toy(seed, end=end))
    run = rollout(engine, prompts(3, 1, 2), fork=fork, prune=prune, votes=votes, limit=limit,
                  seed=seed, allowance=Allowance(tokens=tokens))  # fmt: skip
    engine.run = run
    run.run()
    check_ended(run)
    for tree, budget in enumerate(run.budgets):
        assert budget.tokens == engine.tokens[tree]
        # A prompt whose every branch was pruned goes on to its first leaf.
        extra = budget.spent and budget.finished == 1
        assert engine.tokens[tree] <= tokens + extra
        assert budget.spent or budget.finished == votes
    assert run.counts.sampled_tokens == engine.tokens.total()
    assert run.counts.out_of_tokens == sum(budget.spent for budget in run.budgets)
    assert run.counts.out_of_time == 0


def test_most_of_the_allowance_is_spent() -> None:
    run = rollout(random_toy(end=0.0), prompts(1, 2), votes=8, allowance=Allowance(tokens=100))
    forest = run.run()
    assert [budget.tokens for budget in run.budgets] == [96, 96]
    table = forest.leaf_table(forest.leaves())
    assert set(table.length_N.tolist()) == {12}
    assert set(table.finish_N.tolist()) == {TRUNCATED}
    assert (run.counts.cut, run.counts.dropped, run.counts.out_of_tokens) == (16, 0, 2)


@pytest.mark.parametrize("fork", [Flat(), *TREES], ids=repr)
@pytest.mark.parametrize("prune", [Keep(), Doubt(spike=0.5, tail_window=4)], ids=repr)
def test_an_allowance_that_is_not_spent_changes_nothing(fork: Fork, prune: Prune) -> None:
    def grown(allowance: Allowance) -> Rollout:
        run = rollout(random_toy(end=0.05), prompts(3, 1), fork=fork, prune=prune, votes=12,
                      allowance=allowance)  # fmt: skip
        run.run()
        return run

    free, limited = grown(Allowance()), grown(Allowance(tokens=10_000, seconds=1000.0))
    assert limited.forest.save() == free.forest.save()
    assert limited.counts == free.counts


@pytest.mark.parametrize("fork", [Flat(), *TREES], ids=repr)
def test_a_rollout_that_runs_out_of_tokens_replays_from_its_seed(fork: Fork) -> None:
    def grown(seed: int) -> bytes:
        run = rollout(random_toy(end=0.05), prompts(3, 1), fork=fork, votes=12, seed=seed,
                      allowance=Allowance(tokens=60))  # fmt: skip
        forest = run.run()
        assert run.counts.out_of_tokens == 2
        return forest.save()

    assert grown(1) == grown(1)
    assert grown(1) != grown(2)


def test_siblings_that_have_drawn_nothing_are_dropped() -> None:
    """They are what they share with their parent: a leaf of theirs would count it twice."""
    fork = TopEntropy(mask_tail=0)
    whole = rollout(random_toy(end=0.0), prompts(1), fork=fork, votes=5)
    whole.run()
    run = rollout(random_toy(end=0.0), prompts(1), fork=fork, votes=5,
                  allowance=Allowance(tokens=30 + 3))  # fmt: skip
    forest = run.run()
    check_ended(run)
    assert len(forest.leaves()) == 1
    assert answers(forest)[0] in answers(whole.forest)
    assert forest.pruned()[BUDGET] == run.counts.dropped == 4
    assert run.counts.cut == 0
    assert forest.leaf_table(forest.leaves()).length_N.tolist() == [30]


def test_what_was_cut_is_no_sample_of_the_thresholds() -> None:
    """An answer's lowest confidence is known at its end, and so is it of 16 answers."""
    fork = EntropyConfidence(min_tokens=0, group_window=2, warmup_traces=4)
    signals = make_signals(fork, Keep())
    assert signals is not None
    for tokens, calibrated in [(20, False), (10_000, True)]:
        run = rollout(random_toy(end=0.0), prompts(1), fork=fork, votes=8, signals=signals,
                      allowance=Allowance(tokens=tokens))  # fmt: skip
        run.run()
        check_ended(run)
        assert signals.thresholds().calibrated == calibrated


# ---- time


@settings(max_examples=100, deadline=None)
@given(
    fork=FORKS,
    prune=PRUNES,
    votes=st.integers(1, 14),
    seconds=st.sampled_from([0.5, 1.0, 3.5, 8.0, 40.0]),
    seed=st.integers(0, 1000),
)
def test_when_time_is_up_all_that_runs_ends(
    fork: Fork, prune: Prune, votes: int, seconds: float, seed: int
) -> None:
    clock = Clock(random_toy(seed, end=0.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrl.budget.monotonic", clock)
        run = rollout(clock, prompts(3, 1), fork=fork, prune=prune, votes=votes, limit=12,
                      seed=seed, allowance=Allowance(seconds=seconds))  # fmt: skip
        run.run()
    check_ended(run)
    assert run.counts.out_of_tokens == 0
    assert run.counts.out_of_time == sum(budget.spent for budget in run.budgets)
    # The step that passes the limit, and one more for a prompt without a leaf.
    assert clock.now <= int(seconds) + 2 or not run.counts.out_of_time
    if not run.counts.out_of_time:
        assert len(run.forest.leaves()) == 2 * votes


def test_prompts_that_still_wait_for_a_row_end_with_one_token() -> None:
    clock = Clock(demo_engine(max_rows=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrl.budget.monotonic", clock)
        run = rollout(clock, demo_prompts(3), votes=6, allowance=Allowance(seconds=4.0))
        forest = run.run()
    check_ended(run)
    lengths = [forest.leaf_table(forest.leaves(tree)).length_N.tolist() for tree in range(3)]
    assert lengths == [[5, 5, 5, 5], [1], [1]]
    assert (run.counts.cut, run.counts.dropped, run.counts.out_of_time) == (6, 12, 3)


def test_time_is_up_before_the_first_token() -> None:
    run = rollout(random_toy(end=0.0), prompts(1, 2), allowance=Allowance(seconds=1e-9))
    forest = run.run()
    check_ended(run)
    assert forest.leaf_table(forest.leaves()).length_N.tolist() == [1, 1]


# ---- the engine over transformers


@pytest.mark.parametrize("fork", [Flat(), TopEntropy(mask_tail=2)], ids=repr)
@pytest.mark.parametrize("max_rows", [3, 64])
def test_the_demo_model_runs_out_of_tokens(fork: Fork, max_rows: int) -> None:
    def grown() -> Rollout:
        run = rollout(demo_engine(max_rows), demo_prompts(2), fork=fork, votes=10,
                      allowance=Allowance(tokens=40))  # fmt: skip
        run.run()
        return run

    run = grown()
    check_ended(run)
    assert run.counts.out_of_tokens == 2
    assert all(budget.tokens <= 40 for budget in run.budgets)
    assert grown().forest == run.forest
    finish_N = run.forest.leaf_table(run.forest.leaves()).finish_N
    assert set(finish_N.tolist()) <= {STOPPED, TRUNCATED}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": -1}, "tokens: expected >= 0"),
        ({"seconds": -1.0}, "seconds: expected >= 0"),
        ({"seconds": float("nan")}, "seconds: expected >= 0"),
        ({"seconds": float("inf")}, "seconds: expected >= 0"),
    ],
)
def test_an_allowance_is_a_number(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Allowance(**settings)


def test_an_allowance_is_looked_at_where_there_is_one() -> None:
    assert rollout(random_toy(), prompts(1)).allowance == Allowance()
    assert np.isinf(rollout(random_toy(), prompts(1)).limits.deadline)
