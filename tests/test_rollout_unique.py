"""Rollouts without replacement: the law on an engine, its budgets, and what reads its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from leaf_records import leaves_of
from numpy.typing import NDArray
from scipy.stats import chisquare
from toy_rollout import EOS, answers, assert_forgotten, prompts, random_toy, rollout

from pyrl.advantage import GroupBaseline, MassBaseline, advantages
from pyrl.algorithm import Algorithm, Sample
from pyrl.answers import Answers, Exact, Pattern, classify
from pyrl.budget import Allowance
from pyrl.engine import EngineError
from pyrl.engine.toy import ToyEngine
from pyrl.forest import REFUSED, Forest
from pyrl.fork import Flat, WithoutReplacement
from pyrl.leaves import Leaves, collect
from pyrl.logits.sampling import Sampling
from pyrl.methods import METHODS
from pyrl.poll import Poll
from pyrl.prune import Doubt, Keep
from pyrl.report.step import vote_metrics
from pyrl.rollout import Rollout
from pyrl.vote import Majority, Mass, Weighted

UNIQUE = WithoutReplacement()


def toy(vocabulary: int = 3) -> ToyEngine:
    return random_toy(4, vocabulary=vocabulary, end=0.3)


def grow(trees: int, votes: int, *, limit: int = 3, engine: Any = None, **options: Any) -> Rollout:
    """Rollouts of one prompt many times over."""
    run = rollout(
        engine or toy(),
        [np.ones(1, np.int32)] * trees,
        fork=UNIQUE,
        votes=votes,
        limit=limit,
        **options,
    )
    run.run()
    run.forest.check()
    assert_forgotten(run.engine)
    return run


def sequences(forest: Forest, tree: int) -> list[tuple[int, ...]]:
    return [tuple(forest.path(leaf).tokens.tolist()) for leaf in forest.leaves(tree).tolist()]


def probabilities(
    engine: ToyEngine, limit: int, sampling: Sampling | None = None
) -> dict[tuple[int, ...], float]:
    """Of every response to the prompt (1), by enumeration."""
    p_VV = np.exp(engine._log_VV.numpy()) ** (1 / (sampling or Sampling()).temperature)
    if sampling and sampling.top_k:
        p_VV[p_VV < np.sort(p_VV, axis=1)[:, -sampling.top_k, None]] = 0
    p_VV /= p_VV.sum(axis=1, keepdims=True)
    open_, whole = {(): 1.0}, {}
    while open_:
        path, mass = open_.popitem()
        for token in np.flatnonzero(p_VV[path[-1] if path else 1]).tolist():
            longer = (*path, token)
            ended = token == EOS or len(longer) == limit
            (whole if ended else open_)[longer] = mass * p_VV[path[-1] if path else 1, token]
    return whole


# ---- the law


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.5), Sampling(1.3, top_k=3)], ids=["plain", "cool", "top-k"]
)
def test_sets_of_leaves_have_the_law_of_perturbed_responses(sampling: Sampling) -> None:
    trees, votes = 1000, 3
    run = grow(trees, votes, engine=toy(4), sampling=sampling)
    probability = probabilities(toy(4), 3, sampling)
    law: Counter[frozenset[Any]] = Counter()
    for order in permutations(probability, votes):
        left, mass = 1.0, 1.0
        for response in order:
            mass, left = mass * probability[response] / left, left - probability[response]
        law[frozenset(order)] += mass
    count = Counter(frozenset(sequences(run.forest, tree)) for tree in range(trees))
    assert count.keys() <= law.keys()
    common = [kept for kept, p in law.items() if p * trees >= 5]
    seen = [count[kept] for kept in common]
    expected = [law[kept] * trees for kept in common]
    rest = trees - sum(expected)
    if rest >= 5:
        seen, expected = [*seen, trees - sum(seen)], [*expected, rest]
    expected = np.array(expected) * sum(seen) / sum(expected)
    assert len(common) >= 6
    assert chisquare(seen, expected).pvalue > 1e-3


def test_the_log_mass_of_a_leaf_is_that_of_what_was_drawn_from() -> None:
    sampling = Sampling(0.7, top_k=2)
    run = grow(20, 4, sampling=sampling)
    probability = probabilities(toy(), 3, sampling)
    leaf_N = run.forest.leaves()
    log_mass_N = run.forest.leaf_table(leaf_N).log_mass_N
    expected = [probability[s] for tree in range(20) for s in sequences(run.forest, tree)]
    np.testing.assert_allclose(np.exp(log_mass_N), expected, rtol=1e-5)


def test_a_policy_of_few_responses_gives_them_all_with_their_probabilities() -> None:
    probability = probabilities(toy(), 3)
    run = grow(6, len(probability) + 5)
    for tree in range(6):
        kept = sequences(run.forest, tree)
        assert sorted(kept) == sorted(probability)
        weight_N = run.forest.leaf_table(run.forest.leaves(tree)).weight_N
        np.testing.assert_allclose(weight_N, [probability[s] for s in kept], rtol=1e-5)
    assert run.counts.trunks == 6
    assert not run.counts.pruned


def test_no_response_comes_twice_and_the_budget_is_kept() -> None:
    run = rollout(
        random_toy(end=0.05), prompts(3, 1, 2, 5), fork=UNIQUE, votes=12, limit=25, seed=3
    )
    forest = run.run()
    for tree in range(4):
        kept = sequences(forest, tree)
        assert len(set(kept)) == len(kept) == 12
        assert run.budgets[tree].finished == 12
        assert forest.leaf_table(forest.leaves(tree)).weight_N.sum() == pytest.approx(1)
    dropped = run.counts.pruned[REFUSED]
    assert dropped > 10
    assert 4 * 12 + dropped == run.counts.trunks + run.counts.siblings
    assert run.counts.sampled_tokens == forest.stats()["tokens"]


def test_it_replays_by_its_seed() -> None:
    def grown(seed: int, order: int = 1) -> list[Any]:
        run = rollout(random_toy(end=0.1), prompts(2, 3)[::order], fork=UNIQUE, seed=seed)
        return answers(run.run())

    assert grown(5) == grown(5)
    assert grown(5) != grown(6)


def test_a_greedy_engine_has_one_response() -> None:
    run = grow(3, 4, sampling=Sampling(0.0))
    assert [len(run.forest.leaves(tree)) for tree in range(3)] == [1, 1, 1]


# ---- budgets, stops and refusals


@pytest.mark.parametrize("tokens", [9, 14, 25])
def test_a_question_that_is_cut_keeps_prefixes_with_their_masses(tokens: int) -> None:
    engine = random_toy(end=0.02)
    run = rollout(
        engine, prompts(2, 2, 2), fork=UNIQUE, votes=6, limit=40, allowance=Allowance(tokens)
    )
    forest = run.run()
    assert run.counts.out_of_tokens == 3
    assert run.counts.sampled_tokens <= 3 * tokens
    p_VV = np.exp(engine._log_VV.numpy())
    for tree in range(3):
        assert 1 <= len(forest.leaves(tree)) <= 6
        table = forest.leaf_table(forest.leaves(tree))
        assert table.weight_N.sum() == pytest.approx(1)
        for kept, log_mass in zip(sequences(forest, tree), table.log_mass_N, strict=True):
            path = (int(forest.prompt(tree)[-1]), *kept)
            mass = np.prod([p_VV[a, b] for a, b in pairwise(path)])
            assert np.exp(log_mass) == pytest.approx(mass, rel=1e-5)


def say(paths: list[NDArray[np.int32]]) -> list[str]:
    return ["ab"[int(tokens.sum()) % 2] for tokens in paths]


@pytest.mark.parametrize("seed", range(4))
def test_a_label_that_is_certain_is_the_most_probable_answer(seed: int) -> None:
    engine = random_toy(seed, vocabulary=4, end=0.5)
    poll = Poll(Mass(), say, Pattern("(a|b)"), Exact(), 1)
    run = grow(40, 12, limit=4, engine=engine, seed=seed, poll=poll)
    leaves = collect(run.forest, say)
    votes = Mass()(leaves, classify(leaves, Pattern("(a|b)"), Exact()))
    mass = Counter[str]()
    for response, p in probabilities(engine, 4).items():
        if response[-1] == EOS:  # a response that was cut has no answer
            mass[say([np.array(response)])[0]] += p
    assert run.counts.decided > 10
    for tree in range(40):
        if run.budgets[tree].decided:
            assert votes.label_G[tree] == mass.most_common()[0][0]
            weight_N = leaves.weight_N[leaves.group_N == tree]
            mass_N = np.exp(leaves.log_mass_N[leaves.group_N == tree])
            np.testing.assert_allclose(weight_N, mass_N / mass_N.sum())


def test_an_engine_without_exclusions_is_refused() -> None:
    class Old(ToyEngine):
        def fork(self, parent: int, keep: int, branch_B: Any, seed_B: Any) -> None:
            raise AssertionError

    with pytest.raises(EngineError, match="Old: fork: expected an `exclude`"):
        rollout(Old(np.eye(2), [0]), prompts(1), fork=UNIQUE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vote": Majority()}, r"expected WithoutReplacement\(\) and Mass\(\) together"),
        ({"vote": Weighted()}, r"expected WithoutReplacement\(\) and Mass\(\) together"),
        ({"fork": Flat()}, r"expected WithoutReplacement\(\) and Mass\(\) together"),
        ({"prune": Doubt()}, r"prune: expected Keep\(\) beside"),
        ({"sample": Sample(votes=1, train=1)}, "sample.votes: expected at least 2"),
    ],
    ids=str,
)
def test_choices_that_do_not_go_together_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(METHODS["ttrl_unique"](), **change)


# ---- what reads the weights


def scored_leaves(*groups: list[tuple[float, float]]) -> tuple[Leaves, NDArray[np.float64]]:
    """Leaves of (weight, reward) pairs, and their rewards."""
    pairs = [pair for group in groups for pair in group]
    leaves = leaves_of(
        ["x"] * len(pairs),
        group_N=[g for g, group in enumerate(groups) for _ in group],
        weight_N=[w for w, _ in pairs],
    )
    return leaves, np.array([r for _, r in pairs])


class OneToken:
    """What `MassBaseline` reads of `Scored`, with one token a leaf."""

    def __init__(self, leaves: Leaves, reward_N: NDArray[np.float64]) -> None:
        self.group_N, self.weight_N, self.reward_N = leaves.group_N, leaves.weight_N, reward_N
        self.leaf_T = np.arange(len(reward_N))


def run_stage(stage: Any, *groups: list[tuple[float, float]]) -> NDArray[np.float64]:
    return advantages((stage,), OneToken(*scored_leaves(*groups)))[0]


def test_the_baseline_is_the_mean_over_the_policy_that_the_weights_estimate() -> None:
    given = [(0.6, 1.0), (0.3, 0.0), (0.1, 0.5)]
    baseline = sum(w * r for w, r in given)
    deviation = np.sqrt(sum(w * (r - baseline) ** 2 for w, r in given))
    for power in (1.0, 0.5, 0.0):
        factors = [w**power / sum(v**power for v, _ in given) for w, _ in given]
        expected = [
            3 * f * (r - baseline) / (deviation + 1e-6)
            for f, (_, r) in zip(factors, given, strict=True)
        ]
        np.testing.assert_allclose(run_stage(MassBaseline(power), given), expected, rtol=1e-12)


def test_equal_weights_are_grpo_without_bessel_and_groups_do_not_mix() -> None:
    groups = [[(0.25, r) for r in (1.0, 0.0, 0.0, 1.0)], [(0.5, 3.0), (0.5, 1.0)]]
    ours = run_stage(MassBaseline(power=1.0), *groups)
    theirs = np.concatenate(
        [(r - r.mean()) / (r.std() + 1e-6) for r in (np.array([x for _, x in g]) for g in groups)]
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    options = GroupBaseline(ddof=0)
    scored = OneToken(*scored_leaves(*groups))
    np.testing.assert_allclose(ours, advantages((options,), scored)[0], rtol=1e-9)


def test_equal_rewards_unknown_ones_and_lone_leaves_give_nothing() -> None:
    nan = np.nan
    assert not run_stage(MassBaseline(), [(0.2, 0.3), (0.8, 0.3)], [(1.0, 5.0)], []).any()
    assert not run_stage(MassBaseline(), [(0.0, 1.0), (0.0, 0.0)], [(0.5, nan), (0.5, nan)]).any()
    with_unknown = run_stage(MassBaseline(), [(0.3, 1.0), (0.5, nan), (0.2, 0.0)])
    without = run_stage(MassBaseline(), [(0.6, 1.0), (0.4, 0.0)])
    np.testing.assert_allclose(with_unknown[[0, 2]], without)
    assert with_unknown[1] == 0


def test_mass_votes_by_weight_and_health_is_told() -> None:
    leaves = leaves_of(
        ["a", "b", "b", "c"], weight_N=[0.5, 0.2, 0.2, 0.1], mass_N=[0.4, 0.1, 0.1, 0.05]
    )
    found = Answers(tuple(leaves.text_N), np.array([0, 1, 1, 2]), 0, Exact())
    votes = Mass()(leaves, found)
    assert votes.label_G == ("a",)
    assert votes.ratio_G[0] == pytest.approx(0.5)
    metrics = vote_metrics(leaves, found, votes)
    assert metrics["vote/mass"] == pytest.approx(0.65)
    assert metrics["vote/unseen"] == pytest.approx(0.35)
    assert Majority()(leaves, found).label_G == ("b",)
    flat = vote_metrics(leaves_of(["a"]), Answers(("a",), np.zeros(1, int), 0, Exact()), votes)
    assert "vote/mass" not in flat


@pytest.mark.parametrize(
    ("class_N", "mass_N", "certain"),
    [
        ([0], [0.6], True),
        ([0], [0.4], False),
        ([0, 1], [0.55, 0.2], True),
        ([0, 1], [0.45, 0.2], False),
        ([0, 1, 0], [0.3, 0.3, 0.15], False),
        ([0, 1, 0], [0.35, 0.2, 0.3], True),
        ([-1, 0], [0.5, 0.3], True),  # no answer is no rival
        ([-1], [0.9], False),
    ],
)
def test_a_label_is_certain_when_the_unseen_mass_cannot_change_it(
    class_N: list[int], mass_N: list[float], certain: bool
) -> None:
    more = Mass().undecided(np.array(class_N, np.int64), 3, np.array(mass_N))
    assert (more == 0) == certain


def test_methods_without_replacement_differ_from_their_parents_in_what_they_say() -> None:
    for name, parent in (("ttrl_unique", "ttrl"), ("grpo_unique", "grpo")):
        algorithm, base = METHODS[name](), METHODS[parent]()
        assert isinstance(algorithm, Algorithm)
        assert algorithm.fork == UNIQUE
        assert algorithm.prune == Keep()
        same = ("reward", "loss", "select", "updates_per_step")
        assert [getattr(algorithm, f) for f in same] == [getattr(base, f) for f in same]
