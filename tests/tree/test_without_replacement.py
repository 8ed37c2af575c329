"""Trees without replacement: which sequences they keep, against Gumbel-top-k by enumeration."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from pyrl._core.tree import Forest, draw_roots, grow, weigh

VOCABULARY, DEPTH, END = 3, 3, 0
"""A sequence ends with token 0, or at this length."""

Sequence = tuple[int, ...]


def next_token(prefix: Sequence) -> np.ndarray:
    """The policy: a distribution for each prefix."""
    weight = np.random.default_rng([7, len(prefix), *prefix]).exponential(1.0, VOCABULARY)
    return weight / weight.sum()


def is_whole(prefix: Sequence) -> bool:
    return len(prefix) == DEPTH or (len(prefix) > 0 and prefix[-1] == END)


def enumerate_policy() -> dict[Sequence, float]:
    """The probability of every sequence."""
    open_, whole = {(): 1.0}, {}
    while open_:
        prefix, mass = open_.popitem()
        for token, p in enumerate(next_token(prefix)):
            longer = (*prefix, token)
            (whole if is_whole(longer) else open_)[longer] = mass * p
    return whole


PROBABILITY = enumerate_policy()


def set_law(votes: int) -> dict[frozenset[Sequence], float]:
    """The law of the top of Gumbel-perturbed log-probs: draws one by one, without replacement."""
    law: Counter[frozenset[Sequence]] = Counter()
    for order in permutations(PROBABILITY, votes):
        left, mass = 1.0, 1.0
        for sequence in order:
            mass *= PROBABILITY[sequence] / left
            left -= PROBABILITY[sequence]
        law[frozenset(order)] += mass
    return dict(law)


class Trees:
    """Many trees of the policy, grown through the core alone; the tokens are drawn by numpy."""

    def __init__(self, trees: int, votes: int, seed: int, *, step_share: float = 1.0) -> None:
        self.forest, self.votes = Forest(), votes
        self.random = np.random.default_rng(seed)
        self.taken: dict[int, list[int]] = {}
        running = []
        for tree in range(trees):
            self.forest.add_tree(np.array([0], np.int32))
            running.append(self.forest.add_trunk(tree, self.new_seed()))
        self.where: dict[int, Sequence] = dict.fromkeys(running, ())
        """Running branches."""
        draw_roots(self.forest, np.array(running))
        while self.where:
            rows = [b for b in self.where if step_share == 1 or self.random.random() < step_share]
            if rows:
                self.step(rows)
        weigh(self.forest)

    def new_seed(self) -> int:
        return int(self.random.integers(2**63))

    def step(self, rows: list[int]) -> None:
        logprob, rest, place = [], [], {}
        for branch in rows:
            prefix, taken = self.where[branch], self.taken.pop(branch, [])
            p = next_token(prefix)
            free = p.copy()
            free[taken] = 0
            token = int(self.random.choice(VOCABULARY, p=free / free.sum()))
            left = free.sum() - free[token] if np.count_nonzero(free) > 1 else 0.0
            logprob.append(np.log(p[token]))
            rest.append(np.log(left) if left > 0 else -np.inf)
            place[branch] = (prefix, [*taken, token])
            self.where[branch] = (*prefix, token)
        branch_B = np.array(rows)
        logprob_B = np.array(logprob, np.float32)
        tokens = np.array([self.where[b][-1] for b in rows], np.int32)
        self.forest.append(branch_B, tokens, logprob_B, logprob_B, logprob_B)
        ended = [b for b in rows if is_whole(self.where[b])]
        self.forest.finish(np.array(ended, np.int64), np.ones(len(ended), np.uint8))
        rest_B = np.array(rest, np.float32)
        growth = grow(self.forest, self.votes, branch_B, logprob_B, rest_B)
        for branch in [*growth.dropped_B.tolist(), *ended]:
            self.where.pop(branch, None)
        for parent, log_mass, gumbel in zip(
            growth.parent_B.tolist(), growth.log_mass_B, growth.gumbel_B, strict=True
        ):
            prefix, taken = place[parent]
            seed_B = np.array([self.new_seed()], np.uint64)
            (child,) = self.forest.fork(parent, len(prefix), seed_B).tolist()
            self.forest.stand(child, log_mass, gumbel)
            self.where[child], self.taken[child] = prefix, taken
        for branch in growth.dropped_B.tolist():
            self.forest.prune(branch, 6)

    def kept(self, tree: int) -> list[Sequence]:
        return [tuple(self.forest.path(b).tokens.tolist()) for b in self.forest.leaves(tree)]

    def weights(self, tree: int) -> np.ndarray:
        """exp(phi) over the probability of being kept, before they are scaled to 1 in sum."""
        log_mass = self.forest.leaf_table(self.forest.leaves(tree)).log_mass_N
        kappa = self.forest.refused(tree)
        return np.exp(log_mass) / -np.expm1(-np.exp(log_mass - kappa))


@pytest.fixture(scope="module", params=[1.0, 0.6], ids=["in step", "out of step"])
def grown(request: pytest.FixtureRequest) -> Trees:
    return Trees(4000, 4, seed=3, step_share=request.param)


def test_the_kept_set_has_the_law_of_perturbed_sequences(grown: Trees) -> None:
    count = Counter(frozenset(grown.kept(tree)) for tree in range(grown.forest.trees))
    law = set_law(grown.votes)
    common = [s for s, p in law.items() if p * grown.forest.trees >= 5]
    seen = np.array([count[s] for s in common], float)
    expected = np.array([law[s] for s in common]) * grown.forest.trees
    rest = grown.forest.trees - np.array([seen.sum(), expected.sum()])
    assert len(common) > 50
    result = chisquare([*seen, rest[0]], [*expected, rest[1]])
    assert result.pvalue > 1e-3


def test_every_sequence_is_kept_as_often_as_the_law_says(grown: Trees) -> None:
    law = set_law(grown.votes)
    trees = grown.forest.trees
    count = Counter(s for tree in range(trees) for s in grown.kept(tree))
    for sequence in PROBABILITY:
        share = sum(p for kept, p in law.items() if sequence in kept)
        noise = np.sqrt(share * (1 - share) / trees)
        assert abs(count[sequence] / trees - share) < 4 * noise + 1e-9


@pytest.mark.parametrize("power", [0, 1, 3])
def test_weighted_sums_are_unbiased(grown: Trees, power: int) -> None:
    """For functions of the sequence that are not functions of its probability."""

    def value(sequence: Sequence) -> float:
        return float(sum((1 + t) ** power for t in sequence))

    truth = sum(p * value(s) for s, p in PROBABILITY.items())
    estimates = np.array(
        [
            sum(w * value(s) for w, s in zip(grown.weights(t), grown.kept(t), strict=True))
            for t in range(grown.forest.trees)
        ]
    )
    noise = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - truth) < 4 * noise


def test_leaves_weigh_what_they_stand_for(grown: Trees) -> None:
    for tree in range(100):
        weight = grown.weights(tree)
        table = grown.forest.leaf_table(grown.forest.leaves(tree))
        np.testing.assert_allclose(table.weight_N, weight / weight.sum(), rtol=1e-12)
        probability = [PROBABILITY[s] for s in grown.kept(tree)]
        np.testing.assert_allclose(np.exp(table.log_mass_N), probability, rtol=1e-6)


def test_a_leaf_that_is_kept_was_not_refused(grown: Trees) -> None:
    forest = grown.forest
    for tree in range(100):
        gumbel = [forest.gumbel(leaf) for leaf in forest.leaves(tree).tolist()]
        assert len(gumbel) == grown.votes
        assert min(gumbel) > forest.refused(tree)


def test_as_many_votes_as_sequences_enumerate_them_with_their_probabilities() -> None:
    trees = Trees(20, len(PROBABILITY) + 2, seed=1, step_share=0.7)
    for tree in range(20):
        kept = trees.kept(tree)
        assert sorted(kept) == sorted(PROBABILITY)
        assert trees.forest.refused(tree) == -np.inf
        weight = trees.forest.leaf_table(trees.forest.leaves(tree)).weight_N
        np.testing.assert_allclose(weight, [PROBABILITY[s] for s in kept], rtol=1e-6)


def test_the_first_of_a_question_is_an_ordinary_sample() -> None:
    """The largest Gumbel number is that of a draw from the policy."""
    trees = Trees(3000, 2, seed=5)
    first: Counter[Sequence] = Counter()
    for tree in range(3000):
        leaf_N = trees.forest.leaves(tree).tolist()
        best = max(leaf_N, key=trees.forest.gumbel)
        first[tuple(trees.forest.path(best).tokens.tolist())] += 1
    expected = [3000 * p for p in PROBABILITY.values()]
    assert chisquare([first[s] for s in PROBABILITY], expected).pvalue > 1e-3


def test_a_closed_tree_opens_nothing_and_weighs_by_mass() -> None:
    forest = Forest()
    forest.add_tree(np.array([1], np.int32))
    trunk = forest.add_trunk(0, 11)
    draw_roots(forest, np.array([trunk]))
    forest.refuse(0, np.inf)
    log2 = np.array([np.log(0.5)], np.float32)
    forest.append(np.array([trunk]), np.array([2], np.int32), log2, log2, log2)
    growth = grow(forest, 8, np.array([trunk]), log2, log2)
    assert len(growth.parent_B) == len(growth.dropped_B) == 0
    assert forest.log_mass(trunk) == pytest.approx(np.log(0.5))
    forest.finish(np.array([trunk]), np.array([1], np.uint8))
    weigh(forest)
    assert forest.weight(trunk) == 1


def test_long_sequences_of_tiny_probability_keep_finite_weights() -> None:
    forest = Forest()
    forest.add_tree(np.array([1], np.int32))
    branches = [forest.add_trunk(0, seed) for seed in range(3)]
    for branch, log_mass in zip(branches, (-900.0, -1000.0, -1001.0), strict=True):
        forest.stand(branch, log_mass, log_mass + 0.5)
    forest.refuse(0, -1002.0)
    forest.finish(np.array(branches), np.ones(3, np.uint8))
    weigh(forest)
    weight = [forest.weight(branch) for branch in branches]
    assert np.isfinite(weight).all()
    assert sum(weight) == pytest.approx(1)
    # kappa is far below the first, a little below the others.
    log_w = np.array([-900, -1000 - np.log(-np.expm1(-np.exp(2.0))), 0])
    log_w[2] = -1001 - np.log(-np.expm1(-np.exp(1.0)))
    np.testing.assert_allclose(np.log(weight), log_w - log_w[0], rtol=1e-12)


def test_bad_draws_are_named_and_change_nothing() -> None:
    forest = Forest()
    forest.add_tree(np.array([1], np.int32))
    trunk, other = forest.add_trunk(0, 1), forest.add_trunk(0, 2)
    draw_roots(forest, np.array([trunk]))
    one = np.array([-1.0], np.float32)
    both = np.array([trunk, other])
    with pytest.raises(ValueError, match="has not drawn a token"):
        grow(forest, 2, np.array([trunk]), one, one)
    two = np.array([-1.0, -1.0], np.float32)
    forest.append(both, np.array([2, 2], np.int32), two, two, two)
    before = forest.save()
    with pytest.raises(ValueError, match="at least 2 without replacement, got 1"):
        grow(forest, 1, np.array([trunk]), one, one)
    for logprob, rest in ((np.nan, -1), (-np.inf, -1), (0.1, -1), (-1, np.nan)):
        draws = np.array([logprob], np.float32), np.array([rest], np.float32)
        with pytest.raises(ValueError, match=f"branch {trunk}"):
            grow(forest, 2, np.array([trunk]), *draws)
    with pytest.raises(ValueError, match="is not sampled without replacement"):
        grow(forest, 2, both, two, two)
    with pytest.raises(ValueError, match="expected 2 log-probs, one per branch, got 1 and 1"):
        grow(forest, 2, both, one, one)
    assert forest.save() == before


def test_where_branches_stand_is_saved(grown: Trees) -> None:
    loaded = Forest.load(grown.forest.save())
    assert loaded == grown.forest
    leaf_N = loaded.leaves(7)
    assert loaded.refused(7) == grown.forest.refused(7)
    assert [loaded.gumbel(n) for n in leaf_N] == [grown.forest.gumbel(n) for n in leaf_N]
