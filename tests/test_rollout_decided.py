"""Prompts that stop when their vote is decided: the label is that of the whole rollout."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from demo_rollout import demo, demo_engine, demo_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from leaf_records import leaves_of
from numpy.typing import NDArray
from rollout_rules import FORKS, PRUNES, RandomDoubt
from toy_rollout import TREES, answers, assert_forgotten, prompts, random_toy, rollout

from pyrl.algorithm import Algorithm, Sample
from pyrl.answers import Answers, Equivalence, Exact, Extractor, MathEquivalence, Pattern, classify
from pyrl.answers.reading import decoder
from pyrl.budget import Allowance
from pyrl.forest import DECIDED, Forest
from pyrl.fork import Flat, Fork, OnlineEntropy, TopEntropy
from pyrl.leaves import collect
from pyrl.methods import METHODS
from pyrl.poll import Poll
from pyrl.prune import Keep, Prune
from pyrl.report.tree import tree_metrics
from pyrl.rollout import Rollout, make_signals
from pyrl.select import First
from pyrl.vote import Majority, Tie, Votes, Weighted

NO_MASS = np.empty(0)
ANSWER = Pattern(r"(\w+)")
"""Cut responses have no answer, nor has the empty text."""


def decode(paths: Sequence[NDArray[np.int32]]) -> list[str]:
    """Most say "a", some "b" or "c", a few nothing; by what was sampled."""
    return ["aaaaaabbc_"[int(tokens.sum() + len(tokens)) % 10].strip("_") for tokens in paths]


def say_a(paths: Sequence[NDArray[np.int32]]) -> list[str]:
    return ["a"] * len(paths)


class CountedDecode:
    """How many responses were decoded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, paths: Sequence[NDArray[np.int32]]) -> list[str]:
        self.count += len(paths)
        return decode(paths)


def poll(train: int, equivalence: Equivalence | None = None, **choices: Any) -> Poll:
    options = {"vote": Majority(), "decode": decode, "extractor": ANSWER} | choices
    return Poll(equivalence=equivalence or Exact(), train=train, **options)


def elect(
    forest: Forest, tie: Tie = "first", extractor: Extractor = ANSWER
) -> tuple[Votes, Answers]:
    leaves = collect(forest, decode)
    sorted_answers = classify(leaves, extractor, Exact())
    return Majority(tie)(leaves, sorted_answers), sorted_answers


def by_seed(forest: Forest, tree: int) -> dict[int, bytes]:
    """What each leaf of a prompt sampled, in leaf order; a seed names a place in the tree."""
    leaf_N = forest.leaves(tree).tolist()
    return {forest.seed(leaf): forest.path(leaf).tokens.tobytes() for leaf in leaf_N}


# ---- what a majority knows before its end


@pytest.mark.parametrize("tie", ["first", "skip"])
def test_a_majority_is_decided_just_where_no_completion_changes_it(tie: Tie) -> None:
    def label(class_N: Sequence[int]) -> int:
        leaves = leaves_of(["x"] * len(class_N))
        said = tuple(None if c < 0 else str(c) for c in class_N)
        answer = Answers(said, np.array(class_N, np.int64), 0, Exact())
        return int(Majority(tie)(leaves, answer).class_G[0])

    vote, decided = Majority(tie), 0
    for seen, missing in [(n, m) for n in range(1, 5) for m in range(3)]:
        for class_N in product((-1, 0, 1, 2), repeat=seen):
            ends = {label(class_N + more) for more in product((-1, 0, 1, 2, 3), repeat=missing)}
            certain = vote.undecided(np.array(class_N, np.int64), missing, NO_MASS) == 0
            assert not certain or (len(ends) == 1 and label(class_N) >= 0)
            # A tie that the order of the leaves would break is not called.
            assert certain or tie == "first" or len(ends) > 1 or ends == {-1}
            decided += certain
    assert decided > 60


def test_it_is_not_worth_counting_before_the_vote_can_be_decided() -> None:
    def soonest(class_N: tuple[int, ...], missing: int) -> int:
        for k in range(missing + 1):
            if any(
                vote.undecided(np.array(class_N + more, np.int64), missing - k, NO_MASS) == 0
                for more in product((-1, 0, 1, 2), repeat=k)
            ):
                return k
        return missing + 1

    vote = Majority()
    for seen, missing in product(range(5), range(4)):
        for class_N in product((-1, 0, 1), repeat=seen):
            more = vote.undecided(np.array(class_N, np.int64), missing, NO_MASS)
            assert min(more, missing + 1) == soonest(class_N, missing)


# ---- rollouts


@settings(max_examples=250, deadline=None)
@given(
    fork=FORKS,
    prune=PRUNES,
    votes=st.integers(2, 24),
    share=st.floats(0, 0.99),
    limit=st.sampled_from([2, 5, 12]),
    end=st.sampled_from([0.1, 0.4, 0.9]),
    seed=st.integers(0, 1000),
    tie=st.sampled_from(["first", "skip"]),
)
def test_the_label_is_that_of_the_whole_rollout(
    fork: Fork, prune: Prune, votes: int, share: float, limit: int, end: float, seed: int, tie: Tie
) -> None:
    train = max(1, int(share * votes))

    def grown(early: Poll | None) -> Rollout:
        run = rollout(random_toy(seed, end=end), prompts(3, 1, 2), fork=fork, prune=prune,
                      votes=votes, limit=limit, seed=seed, poll=early)  # fmt: skip
        run.run()
        run.forest.check()
        assert_forgotten(run.engine)
        return run

    whole, early = grown(None), grown(poll(train, vote=Majority(tie)))
    assert elect(early.forest, tie)[0].label_G == elect(whole.forest, tie)[0].label_G
    pruned = early.forest.pruned()[DECIDED]
    assert pruned == early.counts.unneeded
    missing = 3 * votes - len(early.forest.leaves())
    assert missing == early.counts.unneeded + early.counts.unopened
    assert (early.counts.decided > 0) == (missing > 0)
    for tree in range(3):
        leaves = by_seed(early.forest, tree)
        assert len(leaves) >= train
        if fork == Flat() and prune == Keep():
            assert leaves.items() <= by_seed(whole.forest, tree).items()


@pytest.mark.parametrize("fork", [Flat(), *TREES], ids=repr)
def test_prompts_do_stop_early_and_save_tokens(fork: Fork) -> None:
    def grown(early: Poll | None) -> Rollout:
        run = rollout(random_toy(end=0.05), prompts(1, 2, 3), fork=fork, votes=60, poll=early)
        run.run()
        return run

    whole, early, again = grown(None), grown(poll(8)), grown(poll(8))
    assert early.counts.decided == 3
    assert early.counts.unneeded + early.counts.unopened > 20
    assert early.counts.sampled_tokens < whole.counts.sampled_tokens - 100
    assert again.forest.save() == early.forest.save()


def test_the_leaves_that_train_are_those_of_the_whole_rollout() -> None:
    """Were they the first to finish, training would prefer short answers."""
    engine, questions = random_toy(end=0.05), prompts(1, 2, 3, 1)
    kept = []
    for early in (None, poll(10)):
        forest = rollout(engine, questions, votes=40, poll=early).run()
        leaves = collect(forest, decode)
        kept.append([
            (forest.seed(leaf), forest.path(leaf).tokens.tobytes())
            for leaf in leaves.leaf_N[First()(leaves, 10)].tolist()
        ])  # fmt: skip
        lengths = leaves.length_N
    assert kept[0] == kept[1]
    assert len(lengths) < 160


def test_a_trunk_that_trains_goes_on_and_its_forks_are_not_opened() -> None:
    """12 of 60 leaves train: those are the trunks, and whatever was forked is not needed."""
    agreed = poll(12, decode=say_a, extractor=Pattern("(a)", needs_end=False))
    run = rollout(random_toy(end=0.05), prompts(1), fork=TopEntropy(mask_tail=0), votes=60,
                  poll=agreed)  # fmt: skip
    forest = run.run()
    leaves = collect(forest, decode)
    assert set(range(12)) == set(leaves.trunk_N.tolist())
    assert run.counts.decided == 1
    assert 31 <= len(leaves.leaf_N) < 60


def test_answers_count_as_the_vote_counts_them() -> None:
    """1/2 and 0.5 are one answer: neither is ahead of the other."""
    texts = {0: "1/2", 1: "0.5", 2: "7"}
    halves = Pattern(r"(.+)", needs_end=False)

    def say(paths: Sequence[NDArray[np.int32]]) -> list[str]:
        return [texts[int(tokens.sum()) % 2] for tokens in paths]

    run = {}
    for equivalence in (Exact(), MathEquivalence()):
        early = poll(2, equivalence, decode=say, extractor=halves)
        grown = rollout(random_toy(2), prompts(1), votes=24, poll=early)
        grown.run()
        run[type(equivalence)] = grown.counts.decided, len(grown.forest.leaves())
        equivalence.close()
    assert run[Exact] == (0, 24)
    assert run[MathEquivalence][0] == 1
    assert run[MathEquivalence][1] < 24


def test_each_leaf_is_read_once_and_not_before_it_can_matter() -> None:
    count, never = CountedDecode(), CountedDecode()
    run = rollout(random_toy(end=0.05), prompts(1, 2), votes=40, poll=poll(5, decode=count))
    forest = run.run()
    assert 0 < count.count <= len(forest.leaves())
    early = Poll(Majority(), never, ANSWER, Exact(), 5)
    growing = rollout(random_toy(end=0.3), prompts(1), votes=40, poll=early)
    growing._spawn(0, 40)
    while growing.budgets[0].finished <= 10:
        growing.engine_step()
    assert never.count == 0
    growing.engine.abort(np.array(list(growing.trunk_of)))


def test_the_calibration_of_a_run_is_not_cut_short() -> None:
    fork = OnlineEntropy(quantile=0.6, cooldown=1, warmup_traces=16)
    sketches = []
    for early in (None, poll(1)):
        signals = make_signals(fork, Keep())
        assert signals is not None
        run = rollout(random_toy(end=0.05), prompts(1), fork=fork, votes=17, signals=signals,
                      poll=early)  # fmt: skip
        run.run()
        thresholds = signals.thresholds()
        sketches.append((thresholds.calibrated, thresholds.entropy_high))
    assert sketches[0] == sketches[1]
    assert run.counts.decided == 1


def test_a_prompt_may_be_decided_and_then_run_out_of_tokens() -> None:
    seen = set()
    for seed in range(40):
        run = rollout(random_toy(seed, end=0.05), prompts(1), votes=20, seed=seed,
                      allowance=Allowance(tokens=280),
                      poll=poll(12, decode=say_a))  # fmt: skip
        forest = run.run()
        forest.check()
        assert_forgotten(run.engine)
        assert run.budgets[0].tokens <= 280
        seen.add((run.counts.decided, run.counts.out_of_tokens))
    assert (1, 1) in seen


def test_pruned_branches_of_a_stopped_prompt_are_still_replaced() -> None:
    prune = RandomDoubt(share=0.1, respawn_share=1.0)
    pruned = 0
    for seed in range(20):
        run = rollout(random_toy(seed, end=0.1), prompts(1), prune=prune, votes=20, seed=seed,
                      poll=poll(8))  # fmt: skip
        forest = run.run()
        assert len(forest.leaves()) >= 8
        pruned += sum(run.counts.pruned.values()) * run.counts.decided
    assert pruned > 20


@pytest.mark.parametrize("max_rows", [5, 64])
def test_the_demo_model_stops_when_decided(max_rows: int) -> None:
    text = decoder(demo()[1])

    def grown() -> Rollout:
        early = poll(3, decode=text, extractor=Pattern(r"(\d)", needs_end=False))
        run = rollout(demo_engine(max_rows), demo_prompts(3), votes=12, poll=early)
        run.run()
        return run

    run = grown()
    assert_forgotten(run.engine)
    assert run.counts.decided >= 1
    assert grown().forest == run.forest
    metrics = tree_metrics(run.forest, collect(run.forest, text), run)
    assert metrics["tree/decided"] == run.counts.decided / 3
    assert metrics["tree/unneeded"] + metrics["tree/unopened"] + metrics["tree/leaves"] == 36


# ---- where it cannot be had


def test_a_weighted_vote_is_refused() -> None:
    parent = METHODS["ttrl"]()
    early = replace(parent.sample, stop_when_decided=True)
    replace(parent, sample=early)
    with pytest.raises(ValueError, match=r"expected vote=Majority\(\) or Mass\(\), got Weighted"):
        replace(parent, sample=early, vote=Weighted())


def test_where_all_leaves_train_none_is_unneeded() -> None:
    with pytest.raises(ValueError, match=r"expected train < votes .*, got 32 for both"):
        Sample(votes=32, train=32, stop_when_decided=True)


def test_a_poll_is_made_where_it_is_asked_for() -> None:
    def of(algorithm: Algorithm) -> Poll | None:
        return algorithm.poll(decode, ANSWER, Exact())

    parent = METHODS["ttrl"]()
    assert of(parent) is None
    made = of(replace(parent, sample=replace(parent.sample, stop_when_decided=True)))
    assert made is not None
    assert (made.train, made.vote) == (32, parent.vote)


def test_answers_are_unchanged_without_the_option() -> None:
    plain = answers(rollout(random_toy(), prompts(1, 2)).run())
    never = rollout(random_toy(), prompts(1, 2), poll=poll(2, extractor=Pattern("(z)"))).run()
    assert answers(never) == plain
