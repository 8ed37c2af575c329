"""Baselines of independent answers: numbers of the papers, and definitions written out slowly."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from advantage_reference import flat, leaf_values, per_leaf, run, scored_of, with_lengths

from pyrl.advantage import GroupBaseline, Stage, WhitenTokens, advantages, dr_grpo
from pyrl.baselines import (
    Entropic,
    Informative,
    LengthBaseline,
    PassAtK,
    Return,
    gpg,
    reinforce_pp,
    reinforce_pp_baseline,
)

NAN = math.nan


# -- numbers of the papers --


def test_opo_weighs_rewards_by_length() -> None:
    scored = scored_of([with_lengths([1.0, 0, 0, 1, 0], [3, 2, 4, 3, 8])])
    actual = per_leaf(run((LengthBaseline(),), scored), scored)
    np.testing.assert_allclose(actual, [0.7, -0.3, -0.3, 0.7, -0.3], rtol=1e-15)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (reinforce_pp(), [0.724569, -1.207615, 0.724569, 0.724569]),
        (reinforce_pp_baseline(), [1.348076, -1.048503, 0.149786, 0.149786]),
    ],
)
def test_reinforce_pp_whitens_over_tokens(stages: tuple[Stage, ...], expected: list[float]) -> None:
    scored = scored_of([with_lengths([1.0, 0.0], [2, 3]), with_lengths([1.0, 1.0], [1, 2])])
    np.testing.assert_allclose(per_leaf(run(stages, scored), scored), expected, atol=1e-6)


def test_entropic_control_is_that_of_the_released_code() -> None:
    """Entropies of three steps about a target of 0.5, and what each carries on."""
    stage = Entropic()
    state = stage.initial()
    (tree,) = flat([1.0, -1.0, 0.0, NAN])
    steps = [(0.3, -0.2, -0.002), (0.4, -0.102, -0.003), (0.55, 0.047, -0.0025)]
    for entropy, alpha, carry in steps:
        scored = scored_of([tree])
        entropy_T = np.full(scored.leaf_T.size, entropy, np.float32)
        scored = replace(scored, entropy_T=entropy_T, state=state)
        before = advantages((Return(),), scored)[0]
        advantage_T, metrics = advantages((stage,), scored, [state])
        assert metrics["advantage/entropic"] == pytest.approx(alpha, abs=1e-6)
        np.testing.assert_allclose(
            per_leaf(advantage_T, scored), [1 + alpha, alpha - 1, 0, 0], atol=1e-6
        )
        assert state["carry"] == pytest.approx(carry, abs=1e-6)
        at_target = replace(stage, target=float(np.float32(entropy)))
        off = at_target(replace(scored, state=stage.initial()), advantage_T)
        np.testing.assert_array_equal(off, before)


def test_gpg_counts_prompts_that_teach() -> None:
    """Two of four prompts: the others do not make the mean over the batch smaller."""
    groups = [1.0, 0, 0, 0], [1.0] * 4, [0.0] * 4, [1.0, 1, 0, 0]
    expected = [1.5, -0.5, -0.5, -0.5, *[0.0] * 8, 1, 1, -1, -1]
    assert np.array_equal(leaf_values(gpg(), *groups), expected)
    half = leaf_values((*dr_grpo(), Informative(1.0)), *groups)
    assert np.array_equal(half, leaf_values(dr_grpo(), *groups))


@pytest.mark.parametrize(
    ("right", "n", "k", "positive", "negative"),
    [(2, 8, 4, 0.522233, -0.174078), (4, 8, 4, 0.120386, -0.120386), (1, 16, 8, 1.0, -0.066667)],
)
def test_pass_at_k_of_its_paper(
    right: int, n: int, k: int, positive: float, negative: float
) -> None:
    advantage_N = leaf_values((PassAtK(k),), [1.0] * right + [0.0] * (n - right))
    np.testing.assert_allclose(advantage_N[:right], positive, atol=2e-6)
    np.testing.assert_allclose(advantage_N[right:], negative, atol=2e-6)


# -- definitions --


def pass_at_k(reward: list[float], k: int) -> list[float]:
    """Each leaf against the mean over all sets of k, by the mean of the sets that it is in."""
    known = [n for n, r in enumerate(reward) if not math.isnan(r)]
    sets = [*combinations(known, min(k, len(known)))] if known else []
    best = [max(reward[n] > 0 for n in chosen) for chosen in sets]
    result = [0.0] * len(reward)
    if len(set(best)) < 2:
        return result
    mean = fmean(best)
    for n in known:
        own = fmean(b for b, chosen in zip(best, sets, strict=True) if n in chosen)
        result[n] = (own - mean) / (math.sqrt(mean * (1 - mean)) + 1e-6)
    return result


def opo(reward: list[float], length: list[int]) -> list[float]:
    known = [(r, n) for r, n in zip(reward, length, strict=True) if not math.isnan(r)]
    total = sum(n for _, n in known)
    base = sum(r * n for r, n in known) / total if known else 0.0
    return [0.0 if math.isnan(r) else r - base for r in reward]


@pytest.mark.parametrize("case", range(20))
def test_pass_at_k_and_opo_are_what_they_say_for_ragged_groups(case: int) -> None:
    random = np.random.default_rng(case)
    groups = [random.choice([0.0, 1.0, NAN], random.integers(1, 8)).tolist() for _ in range(3)]
    k = int(random.integers(1, 5))
    expected = [a for reward in groups for a in pass_at_k(reward, k)]
    np.testing.assert_allclose(leaf_values((PassAtK(k),), *groups), expected, atol=1e-12)
    lengths = [random.integers(1, 9, len(reward)).tolist() for reward in groups]
    scored = scored_of([with_lengths(r, n) for r, n in zip(groups, lengths, strict=True)])
    expected = [a for r, n in zip(groups, lengths, strict=True) for a in opo(r, n)]
    actual = per_leaf(run((LengthBaseline(),), scored), scored)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


# -- what is switched off --


def test_pass_at_1_is_grpo_with_the_deviation_of_a_population() -> None:
    rewards = [[1.0, 0, 0, 1, 0], [1.0, 1.0, NAN, 0.0], [1.0, 1.0]]
    expected = leaf_values((GroupBaseline(ddof=0),), *rewards)
    np.testing.assert_allclose(leaf_values((PassAtK(1),), *rewards), expected, rtol=1e-12)


def test_opo_of_equal_lengths_is_dr_grpo() -> None:
    """Lengths of a power of 2 round nothing."""
    rewards = [1.0, 0, 0, 1, 0, NAN], [1.0, 0.25, 0.5]
    trees = [with_lengths(reward, [4] * len(reward)) for reward in rewards]
    scored = scored_of(trees)
    assert np.array_equal(run((LengthBaseline(),), scored), run(dr_grpo(), scored))


def test_gpg_where_every_prompt_teaches_is_dr_grpo_and_returns_are_rewards() -> None:
    rewards = [1.0, 0.0, NAN], [0.5, 0.25]
    assert np.array_equal(leaf_values(gpg(), *rewards), leaf_values(dr_grpo(), *rewards))
    assert np.array_equal(leaf_values((Return(),), *rewards), [1.0, 0.0, 0.0, 0.5, 0.25])


@pytest.mark.parametrize("stages", [(LengthBaseline(),), gpg(), (PassAtK(),), reinforce_pp()])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -7.3])
def test_equal_rewards_give_exactly_zero(stages: tuple[Stage, ...], reward: float) -> None:
    assert np.all(leaf_values(stages, [reward] * 31, [reward] * 7) == 0)


# -- metrics and errors --


def test_metrics_say_what_the_rewards_were() -> None:
    scored = scored_of(flat([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, NAN, 1.0], [NAN, NAN]))
    metrics = advantages((*gpg(), PassAtK(2), WhitenTokens()), scored)[1]
    assert metrics["advantage/informative"] == 1 / 2
    assert metrics["advantage/pass_at_k"] == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize("rewards", [[], [[NAN]]])
def test_without_a_known_reward_all_is_zero_and_finite(rewards: list[list[float]]) -> None:
    scored = scored_of(flat(*rewards))
    for stages in (gpg(), (PassAtK(),), (LengthBaseline(),), reinforce_pp()):
        advantage_T, metrics = advantages(stages, scored)
        assert not advantage_T.any()
        assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PassAtK(0), "PassAtK.k: expected >= 1, got 0"),
        (lambda: PassAtK(eps=NAN), "PassAtK.eps: expected a number, got nan"),
        (lambda: Informative(0.0), "least: expected a share above 0, got 0"),
        (lambda: Informative(2.0), r"Informative.least: expected a number in \[0, 1\], got 2.0"),
    ],
)
def test_malformed_choices_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
