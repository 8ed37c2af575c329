"""Rollouts keep their budgets, replay, survive exceptions, and are flat where nothing forks."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_rollout import EOS, ForkRecorder, answers, prompts, random_toy, rollout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl._core import Observed, SignalSpec
from pyrl.engine import STOPPED, Engine
from pyrl.engine.hf import HFEngine
from pyrl.fork import (
    EntropyConfidence,
    EPTree,
    Finished,
    Flat,
    Fork,
    OnlineEntropy,
    Site,
    TopEntropy,
)
from pyrl.models import load_model
from pyrl.prompts import load_prompts
from pyrl.prune import Doubt, Keep, Prune
from pyrl.rollout import Rollout, answer_start, derive_seed, make_signals

FLAT_FORKS = [
    TopEntropy(forks=0),
    TopEntropy(siblings=0),
    EPTree(forks=0),
    EPTree(rounds=0),
    OnlineEntropy(forks=0),
    OnlineEntropy(siblings=0),
    EntropyConfidence(max_width=1),
]
TREES = [
    TopEntropy(mask_tail=0),
    EPTree(forks=1, rounds=2, mask_tail=0),
    OnlineEntropy(quantile=0.6, cooldown=1),
    EntropyConfidence(
        entropy_high=0.7, confidence=0.9, entropy_rise=0.3, cooldown=2, min_tokens=1, group_window=4
    ),
]


@cache
def demo() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model("demo")


def demo_engine(max_rows: int = 64, dtype: torch.dtype = torch.float32) -> HFEngine:
    model, tokenizer = demo()
    return HFEngine(model.to(dtype), [tokenizer.eos_token_id], max_rows=max_rows)


def demo_prompts(count: int) -> list[np.ndarray]:
    return [p.tokens for p in load_prompts("demo:train", demo()[1], max_tokens=64)[:count]]


# ---- where nothing forks


@pytest.mark.parametrize("fork", FLAT_FORKS, ids=repr)
def test_a_rule_that_never_forks_samples_what_flat_samples(fork: Fork) -> None:
    questions = prompts(3, 1, 2)
    flat = rollout(random_toy(), questions).run()
    assert answers(rollout(random_toy(), questions, fork=fork).run()) == answers(flat)


@pytest.mark.parametrize("fork", [FLAT_FORKS[0], FLAT_FORKS[4], FLAT_FORKS[6]], ids=repr)
def test_a_rule_that_never_forks_samples_what_flat_samples_from_the_demo_model(fork: Fork) -> None:
    flat = rollout(demo_engine(), demo_prompts(2), votes=6).run()
    assert answers(rollout(demo_engine(), demo_prompts(2), votes=6, fork=fork).run()) == answers(
        flat
    )


def test_signals_that_decide_nothing_change_no_sample() -> None:
    questions = prompts(3, 1, 2)
    run = rollout(random_toy(), questions, fork=OnlineEntropy(min_tokens=1000))
    assert answers(run.run()) == answers(rollout(random_toy(), questions).run())
    assert run.counts.trunks == 24


# ---- budgets


@dataclass(frozen=True)
class RandomDoubt(Keep):
    """Prunes by a hash of what it sees; a custom rule without C++."""

    share: float
    respawn_share: float

    def lower(self, spec: SignalSpec) -> bool:
        return True

    def reason(self, observed: Observed) -> np.ndarray:
        noise_B = (observed.tail_confidence_B * 1e4) % 1
        return np.where(noise_B < self.share, 4, 0).astype(np.uint8)

    def respawns(self, votes: int) -> int:
        return round(votes * self.respawn_share)


FORKS = st.one_of(
    st.just(Flat()),
    st.builds(
        TopEntropy,
        forks=st.integers(0, 3),
        siblings=st.integers(0, 3),
        min_gap=st.integers(0, 3),
        mask_tail=st.integers(0, 4),
    ),
    st.builds(
        EPTree,
        forks=st.integers(0, 2),
        siblings=st.integers(0, 2),
        rounds=st.integers(0, 3),
        mask_tail=st.integers(0, 4),
    ),
    st.builds(
        OnlineEntropy,
        forks=st.integers(0, 3),
        siblings=st.integers(0, 3),
        quantile=st.floats(0, 1),
        cooldown=st.integers(0, 3),
        warmup_traces=st.integers(0, 20),
    ),
    st.builds(
        EntropyConfidence,
        entropy_high=st.floats(0, 1),
        entropy_low=st.just(0.0),
        confidence=st.floats(0, 1),
        entropy_rise=st.floats(0, 1),
        max_width=st.integers(1, 4),
        cooldown=st.integers(0, 3),
        trunk_cap=st.integers(1, 6),
        trunk_share=st.sampled_from([0.0, 0.3, 1.0]),
        group_window=st.integers(1, 4),
        min_tokens=st.integers(0, 2),
        warmup_traces=st.integers(0, 20),
    ),
)
PRUNES = st.one_of(
    st.just(Keep()),
    st.builds(
        Doubt,
        confidence_low=st.floats(0, 1),
        tail_low=st.floats(0, 1),
        decline_run=st.integers(1, 3),
        spike=st.floats(0, 1),
        spike_run=st.integers(1, 3),
        tail_window=st.integers(1, 4),
        respawn_share=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    ),
    st.builds(RandomDoubt, share=st.sampled_from([0.05, 0.5]), respawn_share=st.just(1.0)),
)


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


# ---- replay


@pytest.mark.parametrize("fork", TREES, ids=repr)
@pytest.mark.parametrize("prune", [Keep(), Doubt(spike=0.5, tail_window=4)], ids=repr)
def test_a_rollout_replays_from_its_seed(fork: Fork, prune: Prune) -> None:
    def run(seed: int) -> Any:
        signals = make_signals(fork, prune)
        engine = random_toy(end=0.05)
        forests = [
            rollout(engine, prompts(3, 1), fork=fork, prune=prune, votes=12, signals=signals,
                    seed=derive_seed(seed, step)).run()
            for step in range(2)
        ]  # fmt: skip
        return [forest.save() for forest in forests]

    first = run(1)
    assert run(1) == first
    other = run(2)
    assert other[0] != first[0]
    assert other[1] != first[1]


@pytest.mark.parametrize("fork", [Flat(), TopEntropy(mask_tail=2), EPTree(mask_tail=2)], ids=repr)
def test_answers_do_not_depend_on_the_rows_of_the_engine(fork: Fork) -> None:
    """Online rules of one prompt compete for its leaves, so with them the schedule has a say."""

    def tokens(max_rows: int) -> list[Any]:
        engine = demo_engine(max_rows, torch.float64)
        forest = rollout(engine, demo_prompts(3), fork=fork, votes=10).run()
        rows = [(forest.tree_of(leaf), forest.seed(leaf), forest.path(leaf).tokens.tobytes())
                for leaf in forest.leaves().tolist()]  # fmt: skip
        return sorted(rows)

    try:
        wide = tokens(64)
        assert tokens(3) == wide
    finally:
        demo()[0].to(torch.float32)


# ---- exceptions


class Interrupted(Exception):
    """Raised in the middle of a rollout."""


@dataclass
class Interrupt:
    """An `on_tokens` that gives up after some steps."""

    after: int

    def __call__(self, tokens: int) -> None:
        self.after -= 1
        if self.after == 0:
            raise Interrupted


@pytest.mark.parametrize("fork", [Flat(), *TREES], ids=repr)
def test_an_interrupted_rollout_leaves_the_engine_empty(fork: Fork) -> None:
    engine, questions = random_toy(end=0.05), prompts(2, 1)
    fresh = rollout(random_toy(end=0.05), questions, fork=fork).run()
    for steps in range(1, 12):
        with pytest.raises(Interrupted):
            rollout(engine, questions, fork=fork, on_tokens=Interrupt(steps)).run()
        assert_forgotten(engine)
    assert rollout(engine, questions, fork=fork).run().save() == fresh.save()


def test_an_interrupted_rollout_of_the_demo_model_leaves_the_engine_empty() -> None:
    engine, questions = demo_engine(max_rows=5), demo_prompts(2)
    fork = TopEntropy(mask_tail=2)
    for steps in (1, 20):
        with pytest.raises(Interrupted):
            rollout(engine, questions, fork=fork, on_tokens=Interrupt(steps)).run()
        assert_forgotten(engine)
    again = rollout(engine, questions, fork=fork).run()
    assert again == rollout(demo_engine(max_rows=5), questions, fork=fork).run()


@pytest.mark.parametrize("where", ["width", "at_end"])
def test_a_rule_that_raises_leaves_the_engine_empty(where: str) -> None:
    @dataclass(frozen=True)
    class Broken(TopEntropy):
        def lower(self, spec: SignalSpec) -> bool:
            return True

        def width(self, observed: Observed) -> np.ndarray:
            if where == "width":
                raise Interrupted
            return observed.width_B

        def at_end(self, trunk: Finished) -> list[Site]:
            raise Interrupted

    engine = random_toy(end=0.3)
    with pytest.raises(Interrupted):
        rollout(engine, prompts(1, 1), fork=Broken()).run()
    assert_forgotten(engine)


def test_what_the_engine_refuses_is_what_the_caller_reads() -> None:
    engine = random_toy()
    with pytest.raises(ValueError, match="prompt 0: expected at least one token"):
        rollout(engine, [*prompts(1), np.array([99], np.int32)]).run()
    assert_forgotten(engine)
    with pytest.raises(ValueError, match="expected a limit >= 1, got 0"):
        rollout(engine, prompts(1), limit=0).run()
    assert_forgotten(engine)


@pytest.mark.parametrize(("questions", "votes"), [([], 4), (prompts(1), 0)])
def test_a_rollout_needs_prompts_and_votes(questions: list[np.ndarray], votes: int) -> None:
    with pytest.raises(ValueError, match="expected at least one prompt and one vote"):
        rollout(random_toy(), questions, votes=votes)


# ---- rules in Python


@dataclass(frozen=True)
class ForkAfterFalls(Flat):
    """Forks where entropy has fallen: a rule that no C++ knows."""

    def trunks(self, votes: int) -> int:
        return 2

    def cap(self, votes: int) -> int:
        return 5

    def lower(self, spec: SignalSpec) -> bool:
        spec.smooth_window, spec.min_tokens, spec.cooldown = 1, 2, 3
        spec.warmup_traces = 0
        return True

    def width(self, observed: Observed) -> np.ndarray:
        return np.where(observed.entropy_rise_B < 0, 2, 1).astype(np.int32)


def test_a_fork_rule_can_be_written_in_python() -> None:
    engine = ForkRecorder(random_toy(end=0.02))
    run = rollout(engine, prompts(1, 2), fork=ForkAfterFalls(), votes=10)
    forest = run.run()
    check_budgets(run)
    assert len(engine.forks) > 6
    last: dict[int, int] = {}
    for parent, at, children in engine.forks:
        entropy = forest.path(parent).entropy
        assert entropy[at] < entropy[at - 1]
        assert at >= 2  # min_tokens
        assert at > last.get(parent, -9) + 3  # cool-down, which siblings inherit
        last |= dict.fromkeys([parent, *children], at)


def test_fork_sites_at_the_end_may_repeat_and_exceed_the_budget() -> None:
    @dataclass(frozen=True)
    class Greedy(Flat):
        def trunks(self, votes: int) -> int:
            return 1

        def at_end(self, trunk: Finished) -> list[Site]:
            return [Site(leaf, 0, 3) for leaf in trunk.leaves]

    run = rollout(random_toy(end=0.02), prompts(1), fork=Greedy(), votes=20)
    forest = run.run()
    check_budgets(run)
    assert run.counts.trunks == 1
    assert len(set(answers(forest))) == 20


# ---- where answers open


@pytest.mark.parametrize(
    ("text", "opening"),
    [("12", None), ("\\boxed{12}", 0), ("1 \\boxed{2} 3 \\boxed{4}", 14), ("\\box \\boxed", 5)],
)
def test_answer_start_is_where_the_last_box_is_opened(text: str, opening: int | None) -> None:
    class Characters:
        def decode(self, tokens: list[int]) -> str:
            return "".join(map(chr, tokens))

    tokens = np.array([ord(c) for c in text], np.int32)
    expected = len(text) if opening is None else opening + len("\\boxed") - 1
    assert answer_start(tokens, Characters()) == expected
    assert answer_start(tokens[:0], Characters()) == 0


# ---- work


def test_a_rollout_without_late_trunks_computes_each_prompt_once_and_each_token_once() -> None:
    engine = random_toy(end=0.0)
    run = rollout(engine, prompts(5, 7), fork=TopEntropy(mask_tail=0), votes=20)
    leaves = len(run.run().leaves())
    work = engine.work()
    assert work.prompt_tokens == 12
    # The model never sees the token that ends a leaf.
    assert work.decode_tokens == run.counts.sampled_tokens - leaves
