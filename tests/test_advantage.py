"""Advantages: the numbers of the papers, slow references on random ragged trees, equalities."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import advantage_reference as reference
import numpy as np
import pytest
from advantage_reference import ReferenceTree
from hypothesis import given
from hypothesis import strategies as st

from pyrl._core import Forest
from pyrl.advantage import (
    AdvantageClip,
    Ancestors,
    EntropyReshape,
    GroupBaseline,
    Hybrid,
    Stage,
    TreeRLReleased,
    WhitenTokens,
    advantages,
    dr_grpo,
    grpo,
    rloo,
    tree_grpo,
    tree_po,
    tree_rl,
    tree_rl_released,
)
from pyrl.leaves import Scored

NAN = math.nan


def segments_of(parent: list[int], leaf_segment: list[int], length: list[int]) -> Any:
    return SimpleNamespace(
        parent_S=np.array(parent, np.int64),
        length_S=np.array(length, np.int64),
        leaf_segment_N=np.array(leaf_segment, np.int64),
    )


def scored_of(trees: list[ReferenceTree]) -> Scored:
    """The record of a step with these trees; signals are random."""
    random = np.random.default_rng(0)
    parent: list[int] = []
    length, leaf_segment, group, trunk, reward = [], [], [], [], []
    leaf_T: list[int] = []
    segment_T: list[int] = []
    for index, tree in enumerate(trees):
        first = len(parent)
        parent += [first + up if up >= 0 else -1 for up in tree.parent]
        length += tree.length
        for n, segment in enumerate(tree.leaf_segment):
            path = tree.path(segment)[1:]
            segment_T += [first + s for s in path for _ in range(tree.length[s])]
            leaf_T += [len(group)] * sum(tree.length[s] for s in path)
            group.append(index)
            trunk.append(path[0])
            leaf_segment.append(first + segment)
            reward.append(tree.reward[n])
    return Scored(
        group_N=np.array(group, np.int64),
        trunk_N=np.array(trunk, np.int64),
        reward_N=np.array(reward, np.float64),
        entropy_N=random.uniform(0.1, 2.0, len(group)),
        length_N=np.bincount(np.array(leaf_T, np.int64), minlength=len(group)).astype(np.int64),
        segments=segments_of(parent, leaf_segment, length),
        leaf_T=np.array(leaf_T, np.int64),
        segment_T=np.array(segment_T, np.int64),
        entropy_T=random.exponential(1.0, len(leaf_T)).astype(np.float32),
        confidence_T=random.uniform(0.2, 1.0, len(leaf_T)).astype(np.float32),
    )


def flat(*groups: list[float]) -> list[ReferenceTree]:
    """Trees without a fork."""
    return [
        ReferenceTree(
            parent=[-1] + [0] * len(reward),
            length=[3] + [2] * len(reward),
            leaf_segment=list(range(1, len(reward) + 1)),
            reward=reward,
        )
        for reward in groups
    ]


def example() -> ReferenceTree:
    """root -> {a: leaves 1, 0; b: leaves 0, 0}; a has 20 tokens, the other segments 10."""
    return ReferenceTree(
        parent=[-1, 0, 1, 1, 0, 4, 4],
        length=[5, 20, 10, 10, 10, 10, 10],
        leaf_segment=[2, 3, 5, 6],
        reward=[1.0, 0.0, 0.0, 0.0],
    )


def change(scored: Scored, **fields: Any) -> Scored:
    return Scored(**{**vars(scored), **fields})


def run(stages: tuple[Stage, ...], scored: Scored) -> np.ndarray:
    return advantages(stages, scored)[0]


def per_leaf(advantage_T: np.ndarray, scored: Scored) -> np.ndarray:
    """The advantage of each leaf, which must be one number for all its tokens."""
    result = np.full(scored.group_N.size, NAN)
    result[scored.leaf_T] = advantage_T
    assert np.array_equal(result[scored.leaf_T], advantage_T)
    return result


def leaf_values(stages: tuple[Stage, ...], *groups: list[float]) -> np.ndarray:
    scored = scored_of(flat(*groups))
    return per_leaf(run(stages, scored), scored)


@st.composite
def trees(draw: st.DrawFn, rewards: st.SearchStrategy[float]) -> ReferenceTree:
    """A random tree with chains, empty segments above the leaves, and shuffled leaves."""
    size = draw(st.integers(2, 14))
    parent = [-1, *(draw(st.integers(0, index - 1)) for index in range(1, size))]
    tips = sorted(set(range(len(parent))) - set(parent))
    length = [draw(st.integers(1 if s in tips else 0, 4)) for s in range(len(parent))]
    return ReferenceTree(
        parent=parent,
        length=length,
        leaf_segment=draw(st.permutations(tips)),
        reward=[draw(rewards) for _ in tips],
    )


BINARY = st.sampled_from([0.0, 1.0])
# Multiples of 1/8: differences are either 0 or far above the rounding error.
ANY_REWARD = st.one_of(BINARY, st.integers(-80, 80).map(lambda i: i / 8), st.just(NAN))
BATCHES = st.lists(trees(ANY_REWARD), min_size=1, max_size=4)
GROUPS = st.lists(
    st.lists(st.floats(-10, 10, allow_subnormal=False) | st.just(NAN), min_size=2, max_size=9),
    min_size=1,
    max_size=4,
)


def at_tokens(batch: list[ReferenceTree], results: list[Any]) -> np.ndarray:
    """Lists by leaf or dicts by segment, one for each tree, at the tokens; 0 if unknown."""
    value_T: list[float] = []
    for tree, result in zip(batch, results, strict=True):
        for n, segment in enumerate(tree.leaf_segment):
            for s in tree.path(segment)[1:]:
                known = not math.isnan(tree.reward[n])
                value = result[n if isinstance(result, list) else s] if known else 0.0
                value_T += [value] * tree.length[s]
    return np.array(value_T)


# -- numbers of the papers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewarded", "positive", "negative"),
    [(1, 5.4800, -0.1768), (4, 2.6041, -0.3720), (8, 1.7048, -0.5683), (16, 0.9842, -0.9842)],
)
def test_grpo_of_32_answers(rewarded: int, positive: float, negative: float) -> None:
    advantage_N = leaf_values(grpo(), [1.0] * rewarded + [0.0] * (32 - rewarded))
    np.testing.assert_allclose(advantage_N[:rewarded], positive, atol=5e-5)
    np.testing.assert_allclose(advantage_N[rewarded:], negative, atol=5e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.3])
@pytest.mark.parametrize("stages", [grpo(), dr_grpo(), rloo(), tree_rl(), tree_po(), tree_grpo()])
def test_equal_rewards_give_exactly_zero(stages: tuple[Stage, ...], reward: float) -> None:
    assert np.all(leaf_values(stages, [reward] * 31, [reward] * 7) == 0)
    tree = example()
    tree.reward = [reward] * 4
    assert np.all(run(stages, scored_of([tree])) == 0)


@pytest.mark.parametrize(
    ("stages", "positive", "negative"),
    [
        (grpo(), 1.095443, -0.730295),
        ((GroupBaseline(ddof=0),), 1.224742, -0.816495),
        (dr_grpo(), 0.6, -0.4),
        (rloo(), 0.75, -0.5),
    ],
)
def test_baselines_of_five_answers(
    stages: tuple[Stage, ...], positive: float, negative: float
) -> None:
    expected = [positive, negative, negative, positive, negative]
    actual = leaf_values(stages, [1.0, 0.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_group_baseline_then_whitening_is_reinforce_plus_plus_baseline() -> None:
    batch = flat([1.0, 0.0], [1.0, 1.0])
    batch[0].length, batch[1].length = [5, 2, 3], [5, 1, 2]
    scored = scored_of(batch)
    actual = per_leaf(run((*dr_grpo(), WhitenTokens()), scored), scored)
    np.testing.assert_allclose(actual, [1.348076, -1.048503, 0.149786, 0.149786], atol=1e-6)
    plain = per_leaf(WhitenTokens()(scored, scored.reward_N[scored.leaf_T]), scored)
    np.testing.assert_allclose(plain, [0.724569, -1.207615, 0.724569, 0.724569], atol=1e-6)


def segment_values(stages: tuple[Stage, ...]) -> np.ndarray:
    """a, a1, a2, b, b1, b2 of the example."""
    scored = scored_of([example()])
    advantage_S = np.zeros(7)
    advantage_S[scored.segment_T] = run(stages, scored)
    return advantage_S[1:]


def test_tree_rl_as_printed() -> None:
    expected = [0.471405, 1.666667, -1.0, -0.471405, -0.333333, -0.333333]
    np.testing.assert_allclose(segment_values(tree_rl()), expected, atol=1e-6)


def test_tree_rl_in_the_released_order() -> None:
    expected = [0.410457, 1.678105, -0.988562, -0.532352, -0.517157, -0.517157]
    np.testing.assert_allclose(segment_values(tree_rl_released()), expected, atol=1e-6)


def test_tree_po_averages_over_the_subtrees_of_a_leaf() -> None:
    scored = scored_of([example()])
    average = per_leaf(run((Ancestors("all", "mean"),), scored), scored)
    np.testing.assert_allclose(average, [0.625, -0.375, -0.125, -0.125], atol=1e-6)
    by_size = per_leaf(run((Ancestors("all", "leaves"),), scored), scored)
    np.testing.assert_allclose(by_size, [0.666667, -0.333333, -0.166667, -0.166667], atol=1e-6)
    whitened = per_leaf(run(tree_po(), scored), scored)
    np.testing.assert_allclose(whitened, [1.469694, -0.979796, -0.367423, -0.367423], atol=1e-6)


def test_tree_grpo_adds_the_two_scores() -> None:
    scored = scored_of([example()])
    actual = per_leaf(run(tree_grpo(), scored), scored)
    expected = [2.207103, -1.207105, -0.499999, -0.499999]
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("stage", "entropy", "expected"),
    [
        (EntropyReshape(), [0.2, 0.4, 0.6, 0.8], [1.6, 1.2, 0.8, 0.4]),
        (EntropyReshape(), [0.1, 0.1, 0.1, 1.0], [1.692308, 1.692308, 1.692308, 0.0]),
        (EntropyReshape(y_min=-math.inf), [0.1, 0.1, 0.1, 1.0], [1.692308] * 3 + [-1.076923]),
        (EntropyReshape(), [9e-5, 1e-5, 0.0, 2e-4], [1.0, 1.0, 1.0, 1.0]),
        (EntropyReshape(), [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_entropy_reshape(
    stage: EntropyReshape, entropy: list[float], expected: list[float]
) -> None:
    scored = change(scored_of(flat([1.0, 0.0, 0.0, 0.0])), entropy_N=np.array(entropy))
    actual = per_leaf(stage(scored, np.ones(scored.leaf_T.size)), scored)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_advantage_clip_touches_only_rare_successes() -> None:
    advantage_N = leaf_values((*grpo(), AdvantageClip(beta=2.0)), [1.0] * 4 + [0.0] * 28)
    assert np.all(advantage_N[:4] == 2.0)
    np.testing.assert_allclose(advantage_N[4:], -0.3720, atol=5e-5)


# -- slow references on random trees ---------------------------------------------------------------


@given(BATCHES)
def test_group_baselines_match_the_reference(batch: list[ReferenceTree]) -> None:
    scored = scored_of(batch)
    expected = at_tokens(batch, [reference.grpo(tree.reward) for tree in batch])
    np.testing.assert_allclose(run(grpo(), scored), expected, atol=1e-12)
    without_one = [tree.leave_one_out() for tree in batch]
    by_leaf = [
        [out.get(n, 0.0) for n in range(len(tree.reward))]
        for tree, out in zip(batch, without_one, strict=True)
    ]
    np.testing.assert_allclose(run(rloo(), scored), at_tokens(batch, by_leaf), atol=1e-12)


@given(BATCHES)
def test_tree_rl_matches_the_reference(batch: list[ReferenceTree]) -> None:
    expected = at_tokens(batch, [reference.tree_rl(tree) for tree in batch])
    np.testing.assert_allclose(run(tree_rl(), scored_of(batch)), expected, atol=1e-11)


@given(BATCHES, st.sampled_from(["token", "step"]))
def test_released_tree_rl_matches_the_reference(batch: list[ReferenceTree], centre: Any) -> None:
    actual = run((TreeRLReleased(centre),), scored_of(batch))
    results = [reference.tree_rl_released(tree, centre == "token") for tree in batch]
    np.testing.assert_allclose(actual, at_tokens(batch, results), atol=1e-11)


@given(BATCHES, st.sampled_from(["mean", "leaves"]))
def test_tree_po_matches_the_reference(batch: list[ReferenceTree], weight: Any) -> None:
    scored = scored_of(batch)
    expected = at_tokens(batch, [reference.tree_po(tree, weight == "leaves") for tree in batch])
    np.testing.assert_allclose(run((Ancestors("all", weight),), scored), expected, atol=1e-12)
    known_T = ~np.isnan(scored.reward_N)[scored.leaf_T]
    whitened = reference.whiten(expected[known_T].tolist())
    np.testing.assert_allclose(run(tree_po(weight), scored)[known_T], whitened, atol=1e-8)


@given(BATCHES)
def test_tree_grpo_matches_the_reference(batch: list[ReferenceTree]) -> None:
    expected = at_tokens(batch, [reference.tree_grpo(tree) for tree in batch])
    np.testing.assert_allclose(run(tree_grpo(), scored_of(batch)), expected, atol=1e-12)


@given(BATCHES, st.booleans(), st.sampled_from([0.0, 0.3]))
def test_hybrid_matches_the_reference(batch: list[ReferenceTree], whiten: bool, lam: float) -> None:
    scored = scored_of(batch)
    known = [t for t, n in enumerate(scored.leaf_T) if not math.isnan(scored.reward_N[n])]
    entropy = [float(scored.entropy_T[t]) for t in known]
    doubt = [1 - float(scored.confidence_T[t]) for t in known]
    if whiten:
        entropy, doubt = reference.whiten(entropy), reference.whiten(doubt)
    signal = [0.5 * h + 2.0 * d for h, d in zip(entropy, doubt, strict=True)]
    if whiten:
        signal = [min(max(s, -2.0), 2.0) for s in signal]
    group = [int(scored.group_N[scored.leaf_T[t]]) for t in known]
    advantage_T = run(grpo(), scored)
    expected = np.zeros(scored.leaf_T.size)
    for t, s, g in zip(known, signal, group, strict=True):
        mean = np.mean([other for other, h in zip(signal, group, strict=True) if h == g])
        expected[t] = advantage_T[t] * (1 + 0.1 * s) + lam * (s - mean)
    stage = Hybrid(alpha=0.5, beta=2.0, lam=lam, whiten=whiten)
    np.testing.assert_allclose(stage(scored, advantage_T), expected, atol=1e-10)


# -- equalities ------------------------------------------------------------------------------------


@given(GROUPS)
def test_trees_without_forks_give_the_bits_of_flat_groups(rewards: list[list[float]]) -> None:
    scored = scored_of(flat(*rewards))
    assert np.array_equal(run(tree_grpo(), scored), run(grpo(), scored))
    assert np.array_equal(run(tree_rl(), scored), 2 * run(rloo(), scored))
    assert np.array_equal(run((Ancestors(),), scored), run(dr_grpo(), scored))
    whitened = run((*dr_grpo(), WhitenTokens()), scored)
    assert np.array_equal(run(tree_po("mean"), scored), whitened)
    assert np.array_equal(run(tree_po("leaves"), scored), whitened)


@given(BATCHES)
def test_an_unknown_leaf_is_as_if_absent(batch: list[ReferenceTree]) -> None:
    scored = scored_of(batch)
    known_N = ~np.isnan(scored.reward_N)
    known_T = known_N[scored.leaf_T]
    of_leaves = {
        name: getattr(scored, name)[known_N]
        for name in ("group_N", "trunk_N", "reward_N", "entropy_N", "length_N")
    }
    of_tokens = {
        name: getattr(scored, name)[known_T] for name in ("segment_T", "entropy_T", "confidence_T")
    }
    segments = SimpleNamespace(**vars(scored.segments))
    segments.leaf_segment_N = segments.leaf_segment_N[known_N]
    leaf_T = (np.cumsum(known_N) - 1)[scored.leaf_T[known_T]]
    scored.entropy_T[~known_T] = np.nan
    absent = change(scored, segments=segments, leaf_T=leaf_T, **of_leaves, **of_tokens)
    hybrids = (Hybrid(lam=0.2), Hybrid(whiten=False))
    shaping = (EntropyReshape(), AdvantageClip(), *hybrids, WhitenTokens())
    for first in (grpo(), rloo(), tree_rl(), tree_rl_released(), tree_po(), tree_grpo()):
        advantage_T = run((*first, *shaping), scored)
        assert np.array_equal(advantage_T[known_T], run((*first, *shaping), absent))
        assert np.all(advantage_T[~known_T] == 0)


@given(trees(BINARY), st.randoms(use_true_random=False))
def test_the_order_of_leaves_does_not_matter(tree: ReferenceTree, random: Any) -> None:
    order = list(range(len(tree.reward)))
    random.shuffle(order)
    shuffled = ReferenceTree(
        parent=tree.parent,
        length=tree.length,
        leaf_segment=[tree.leaf_segment[n] for n in order],
        reward=[tree.reward[n] for n in order],
    )
    before, after = scored_of([tree]), scored_of([shuffled])
    unwhitened = (Ancestors("all", "mean"),)
    for stages in (grpo(), rloo(), tree_rl(), tree_rl_released(), unwhitened, tree_grpo()):
        advantage_T, shuffled_T = run(stages, before), run(stages, after)
        for place, n in enumerate(order):
            expected = advantage_T[before.leaf_T == n]
            np.testing.assert_allclose(shuffled_T[after.leaf_T == place], expected, atol=1e-14)


@given(GROUPS, st.floats(0.001, 11.9))
def test_equal_entropies_leave_every_bit(rewards: list[list[float]], entropy: float) -> None:
    scored = scored_of(flat(*rewards))
    advantage_T = run(grpo(), scored)
    scored = change(
        scored,
        entropy_N=np.full(scored.group_N.size, entropy),
        entropy_T=np.full(scored.leaf_T.size, entropy, np.float32),
        confidence_T=np.full(scored.leaf_T.size, 0.7, np.float32),
    )
    assert np.array_equal(EntropyReshape()(scored, advantage_T), advantage_T)
    assert np.array_equal(Hybrid(lam=0.5)(scored, advantage_T), advantage_T)


def test_a_chain_of_segments_is_one_ancestor() -> None:
    chained = ReferenceTree(
        parent=[-1, 0, 1, 2, 2, 0, 5, 5, 6],
        length=[5, 8, 12, 10, 10, 10, 4, 10, 6],
        leaf_segment=[3, 4, 8, 7],
        reward=example().reward,
    )
    for stages in (tree_rl(), tree_rl_released(), tree_po(), tree_grpo()):
        expected = run(stages, scored_of([example()]))
        np.testing.assert_allclose(run(stages, scored_of([chained])), expected, rtol=1e-12)


def test_a_forest_gives_the_numbers_of_its_tree() -> None:
    forest = Forest()
    tree = forest.add_tree(np.arange(5, dtype=np.int32))
    leaf = []
    for trunk_tokens in (20, 10):
        trunk = forest.add_trunk(tree, seed=1)
        grow(forest, [trunk], trunk_tokens)
        fork = forest.fork(trunk, trunk_tokens, np.array([2], np.uint64))
        grow(forest, [trunk, int(fork[0])], 10)
        leaf += [trunk, int(fork[0])]
    forest.finish(np.array(leaf, np.int64), np.ones(4, np.uint8))
    expected = scored_of([example()])
    scored = change(expected, segments=forest.segments(forest.leaves()))
    assert forest.leaves().tolist() == leaf
    for stages in (tree_rl(), tree_rl_released(), tree_po(), tree_grpo()):
        assert np.array_equal(run(stages, scored), run(stages, expected))


def grow(forest: Forest, branches: list[int], tokens: int) -> None:
    branch_B = np.array(branches, np.int64)
    signal_B = np.full(branch_B.size, 0.5, np.float32)
    for _ in range(tokens):
        token_B = np.zeros(branch_B.size, np.int32)
        forest.append(branch_B, token_B, signal_B, signal_B, signal_B)


def test_two_thousand_nested_forks() -> None:
    parent, tips = [-1], []
    for _ in range(2000):
        spine = len(parent) - 1
        tips.append(len(parent))
        parent += [spine, spine]
    tips.append(len(parent) - 1)
    rewards = np.random.default_rng(1).integers(0, 2, len(tips)).astype(float).tolist()
    flat_scored = scored_of(flat(rewards))
    scored = change(flat_scored, segments=segments_of(parent, tips, [1] * len(parent)))
    assert np.array_equal(run((Ancestors(),), scored), run(dr_grpo(), flat_scored))
    assert np.all(np.isfinite(run((Ancestors("all", "mean"),), scored)))


# -- single leaves, metrics, errors ----------------------------------------------------------------


def test_a_group_of_one_is_zero_or_its_reward() -> None:
    rewards = [[0.7], [NAN, 3.0], [NAN]]
    assert np.array_equal(leaf_values(grpo(), *rewards), [0, 0, 0, 0])
    for stage in (GroupBaseline(single="reward"), Ancestors(single="reward")):
        assert np.array_equal(leaf_values((stage,), *rewards), [0.7, 0, 3.0, 0])


def test_metrics_report_what_the_stages_do() -> None:
    scored = scored_of(flat([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, NAN, 1.0]))
    scored = change(scored, entropy_N=np.array([0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0]))
    stages = (*grpo(), EntropyReshape(), AdvantageClip(beta=1.0), WhitenTokens(), Hybrid())
    metrics = advantages(stages, scored)[1]
    assert metrics["reward_unknown"] == 1 / 8
    assert metrics["groups_informative"] == 1 / 2
    assert metrics["ear_clamped"] == 1 / 7
    assert metrics["ear_factor_min"] == pytest.approx(-1.076923, abs=1e-6)
    assert metrics["advantage_clipped"] == 1 / 7
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_step_without_leaves_has_no_advantages() -> None:
    stages = (*tree_rl(), EntropyReshape(), AdvantageClip(), Hybrid(lam=1.0), WhitenTokens())
    advantage_T, metrics = advantages(stages, scored_of([]))
    assert advantage_T.shape == (0,)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_N": np.array([1, 0])}, "group_N: expected non-decreasing ids, got 1 before 0"),
        ({"reward_N": np.zeros(3)}, "reward_N: expected 2 values as in group_N, got 3"),
        ({"reward_N": np.array([0.0, math.inf])}, "expected finite values or NaN, got inf at 1"),
        ({"segments": segments_of([-1, 1, 0], [1, 2], [])}, "a segment before 1, got 1"),
        ({"segments": segments_of([-1, 0, 0], [1, 3], [])}, "expected an index below 3, got 3"),
        ({"segments": segments_of([-1, 0, 0], [1], [])}, "expected 2 values as in group_N, got 1"),
        ({"segments": segments_of([-1, 0, -1, 2], [1, 3], [])}, "expected one tree for each group"),
        ({"group_N": np.array([0, 1])}, "one group for each tree, got groups 0 and 1 in one"),
    ],
)
def test_malformed_leaves_are_refused(fields: dict[str, Any], message: str) -> None:
    scored = change(scored_of(flat([1.0, 0.0])), **fields)
    with pytest.raises(ValueError, match=message):
        Ancestors()(scored, np.zeros(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, a: GroupBaseline(scale="sdt")(s, a), "expected one of none, std, got sdt"),
        (lambda s, a: GroupBaseline(ddof=2)(s, a), "ddof: expected 0 or 1, got 2"),
        (lambda s, a: GroupBaseline(eps=0.0)(s, a), "eps: expected a positive number, got 0"),
        (lambda s, a: Ancestors("leaf")(s, a), "ancestors: expected one of root, root.parent"),
        (lambda s, a: TreeRLReleased("mean"), "centre: expected token or step, got mean"),
        (lambda s, a: EntropyReshape(y_min=3.0), "expected y_min <= y_max, got 3.0 and 2.0"),
        (lambda s, a: AdvantageClip(beta=-1.0), "beta: expected a positive number, got -1.0"),
        (lambda s, a: WhitenTokens()(s, a * math.inf), "expected finite values, got inf"),
        (lambda s, a: EntropyReshape()(change(s, entropy_N=a[:2] * NAN), a), "values, got nan"),
        (lambda s, a: Hybrid()(change(s, entropy_T=s.entropy_T * NAN), a), "got S = nan"),
        (lambda s, a: Hybrid(whiten=False)(change(s, entropy_T=a * math.inf), a), "got S = inf"),
    ],
)
def test_malformed_choices_are_refused(call: Any, message: str) -> None:
    scored = scored_of(flat([1.0, 0.0]))
    with pytest.raises(ValueError, match=message):
        call(scored, np.ones(scored.leaf_T.size))
