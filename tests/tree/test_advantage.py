"""Advantages: the numbers of the papers, metrics and errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from advantage_reference import (
    ReferenceTree,
    change,
    example,
    flat,
    leaf_values,
    per_leaf,
    run,
    scored_of,
    segments_of,
)

from pyrl._core.tree import Forest
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
from pyrl.report.step import reward_metrics

NAN = math.nan


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


# -- trees -----------------------------------------------------------------------------------------


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
    metrics = advantages(stages, scored)[1] | reward_metrics(scored.group_N, scored.reward_N)
    assert metrics["advantage/reward_unknown"] == 1 / 8
    assert metrics["frac_reward_zero_std"] == 1 / 2
    assert metrics["advantage/clamp_rate"] == 1 / 7
    assert metrics["advantage/ear_factor_min"] == pytest.approx(-1.076923, abs=1e-6)
    assert metrics["advantage/clipped"] == 1 / 7
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


@dataclass(frozen=True)
class Given:
    """A stage that returns what it is made from."""

    value: Any

    def __call__(self, scored: Scored, advantage_T: np.ndarray) -> Any:
        return self.value

    def metrics(self, scored: Scored, advantage_T: np.ndarray) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (np.zeros(99), r"tokens, got a numpy array float64\[99\]"),
        (np.zeros((100, 1)), r"tokens, got a numpy array float64\[100, 1\]"),
        (np.where(np.arange(100) == 7, np.nan, 1.0), "tokens, got nan for token 7"),
        (np.where(np.arange(100) == 9, -np.inf, 1.0), "tokens, got -inf for token 9"),
        (0.0, "tokens, got float 0.0"),
    ],
)
def test_a_stage_that_gives_no_finite_number_for_a_token_is_named(value: Any, got: str) -> None:
    scored = scored_of([example()])
    says = f"advantage: Given: expected a finite number for each of {scored.leaf_T.size} {got}"
    with pytest.raises(ValueError, match=says):
        advantages((Given(value),), scored)
