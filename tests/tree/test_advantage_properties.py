"""Advantages of random ragged trees: slow references, and equalities between methods."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import advantage_reference as reference
import numpy as np
from advantage_reference import (
    ReferenceTree,
    change,
    flat,
    run,
    scored_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.advantage import (
    AdvantageClip,
    Ancestors,
    EntropyReshape,
    Hybrid,
    TreeRLReleased,
    WhitenTokens,
    dr_grpo,
    grpo,
    rloo,
    tree_grpo,
    tree_po,
    tree_rl,
    tree_rl_released,
)

NAN = math.nan


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
NORMAL = st.floats(-10, 10).filter(lambda reward: reward == 0 or abs(reward) > 1e-300)
"""Halves of the smallest numbers lose a bit: there twice a baseline is not its bits."""
GROUPS = st.lists(
    st.lists(NORMAL | st.just(NAN), min_size=2, max_size=9),
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


# -- slow references on random trees ---------------------------------------------------------------


@settings(deadline=None)
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


@settings(deadline=None)
@given(BATCHES)
def test_tree_rl_matches_the_reference(batch: list[ReferenceTree]) -> None:
    expected = at_tokens(batch, [reference.tree_rl(tree) for tree in batch])
    np.testing.assert_allclose(run(tree_rl(), scored_of(batch)), expected, atol=1e-11)


@settings(deadline=None)
@given(BATCHES, st.sampled_from(["token", "step"]))
def test_released_tree_rl_matches_the_reference(batch: list[ReferenceTree], centre: Any) -> None:
    actual = run((TreeRLReleased(centre),), scored_of(batch))
    results = [reference.tree_rl_released(tree, centre == "token") for tree in batch]
    np.testing.assert_allclose(actual, at_tokens(batch, results), atol=1e-11)


@settings(deadline=None)
@given(BATCHES, st.sampled_from(["mean", "leaves"]))
def test_tree_po_matches_the_reference(batch: list[ReferenceTree], weight: Any) -> None:
    scored = scored_of(batch)
    expected = at_tokens(batch, [reference.tree_po(tree, weight == "leaves") for tree in batch])
    np.testing.assert_allclose(run((Ancestors("all", weight),), scored), expected, atol=1e-12)
    known_T = ~np.isnan(scored.reward_N)[scored.leaf_T]
    whitened = reference.whiten(expected[known_T].tolist())
    np.testing.assert_allclose(run(tree_po(weight), scored)[known_T], whitened, atol=1e-8)


@settings(deadline=None)
@given(BATCHES)
def test_tree_grpo_matches_the_reference(batch: list[ReferenceTree]) -> None:
    expected = at_tokens(batch, [reference.tree_grpo(tree) for tree in batch])
    np.testing.assert_allclose(run(tree_grpo(), scored_of(batch)), expected, atol=1e-12)


@settings(deadline=None)
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


@settings(deadline=None)
@given(BATCHES)
def test_hybrid_of_the_sampled_token_reads_its_probability(batch: list[ReferenceTree]) -> None:
    scored = scored_of(batch)
    advantage_T = run(grpo(), scored)
    of_token = replace(scored, confidence_T=np.exp(scored.logprob_T))
    found = Hybrid(of="token")(scored, advantage_T)
    assert np.array_equal(found, Hybrid()(of_token, advantage_T))


# -- equalities ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(GROUPS)
def test_trees_without_forks_give_the_bits_of_flat_groups(rewards: list[list[float]]) -> None:
    scored = scored_of(flat(*rewards))
    assert np.array_equal(run(tree_grpo(), scored), run(grpo(), scored))
    assert np.array_equal(run(tree_rl(), scored), 2 * run(rloo(), scored))
    assert np.array_equal(run((Ancestors(),), scored), run(dr_grpo(), scored))
    whitened = run((*dr_grpo(), WhitenTokens()), scored)
    assert np.array_equal(run(tree_po("mean"), scored), whitened)
    assert np.array_equal(run(tree_po("leaves"), scored), whitened)


@settings(deadline=None)
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


@settings(deadline=None)
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


@settings(deadline=None)
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
