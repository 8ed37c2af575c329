"""Stages that shape advantages: numbers of the papers, and definitions written out slowly."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist, fmean, pstdev, stdev
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
    ragged,
    remembering,
    run,
    scored_of,
    spelled,
    with_lengths,
)

from pyrl.advantage import Ancestors, Stage, advantages, grpo
from pyrl.advantage.difficulty import DynamicKL, WindowEntropy
from pyrl.advantage.information import InformationScore
from pyrl.advantage.ranks import RankNormal, normal_scores
from pyrl.advantage.shaping import ConfidenceReweight, EntropyBonus, GatedTokens, StepModulation
from pyrl.leaves import Scored

NAN = math.nan


# -- numbers of the papers --


def test_funrl_adds_an_entropy_bonus_below_half_of_the_advantage() -> None:
    scored = scored_of(flat([0.0, 0, 0]))
    scored = change(scored, entropy_N=np.full(3, 0.8))
    given = np.repeat([1.0, -1.0, 0.2], 2)
    np.testing.assert_allclose(EntropyBonus()(scored, given)[::2], [1.32, -0.68, 0.3], atol=1e-12)
    assert EntropyBonus().metrics(scored, given) == {
        "advantage/bonus": pytest.approx((0.32 + 0.32 + 0.1) / 3),
        "advantage/bonus_bounded": pytest.approx(1 / 3),
    }


def test_funrl_can_leave_out_the_answer() -> None:
    """Entropy 2 up to the mark, 0 after it."""
    scored = spelled(scored_of([with_lengths([0.0, 0.0], [4, 4])]), ["ab|c", "abcd"])
    scored = change(scored, entropy_T=np.array([2, 2, 2, 0, 1, 1, 1, 1], np.float32))
    shaped = EntropyBonus(0.1, until="|")(scored, np.ones(8))
    np.testing.assert_allclose(shaped, [1.2] * 4 + [1.1] * 4)


def test_empg_is_that_of_its_page() -> None:
    """Two responses of three and of two steps, a token each and the separator's."""
    scored = spelled(scored_of([with_lengths([0.0, 0.0], [5, 3])]), ["a|b|c", "a|b"])
    entropy_T = np.array([0.2, 0.2, 0.5, 0.5, 0.9, 0.1, 0.1, 1.1], np.float32)
    scored = change(scored, entropy_T=entropy_T)
    stage = StepModulation(separator="|")
    given = np.array([1.0] * 5 + [-1.0] * 3)
    at = [0, 2, 4, 5, 7]
    raw = replace(stage, centre=False)(scored, given)
    assert np.array_equal(raw, raw[[0, 0, 2, 2, 4, 5, 5, 7]])
    expected = [1.400670, 1.032916, 0.662265, -1.437110, -0.542217]
    np.testing.assert_allclose(raw[at], expected, atol=1e-6)
    centred = [1.177365, 0.809611, 0.438960, -1.660415, -0.765521]
    np.testing.assert_allclose(stage(scored, given)[at], centred, atol=1e-6)
    assert stage.metrics(scored, given)["advantage/steps"] == 2.5


def test_erpo_gates_by_the_standardised_entropy() -> None:
    """One bucket, signals of size 1 after it: what is left is the gate, standardised."""
    scored = scored_of([with_lengths([0.0, 1.0], [2, 2])])
    scored = change(
        scored,
        entropy_T=np.array([0.1, 0.5, 1.2, 0.3], np.float32),
        look=lambda name: np.array([1.0, 1, -1, -1]) if name == "old_logprob_T" else np.zeros(4),
    )
    gate = [0.264028, 0.484929, 0.835918, 0.367555]
    psi = [-gate[0], -gate[1], -gate[2], -gate[3]]
    expected = [(p - fmean(psi)) / pstdev(psi) for p in psi]
    given = np.array([-1.0, -1, 1, 1])
    shaped = GatedTokens(1.0, buckets=1)(scored, given)
    np.testing.assert_allclose(shaped, given + expected, atol=2e-5)


def test_progrpo_is_that_of_its_page() -> None:
    scored = scored_of(flat([1.0, 1, 0, 0]))
    confident = np.log(np.repeat([0.80, 0.35, 0.60, 0.50], 2)).astype(np.float32)
    scored = change(scored, logprob_T=confident, look=lambda name: np.full(8, np.log(0.55)))
    given = np.repeat([0.866024, 0.866024, -0.866024, -0.866024], 2)
    shaped = ConfidenceReweight()(scored, given)
    expected = [0.791024, 0.926024, -0.881024, -0.851024]
    np.testing.assert_allclose(per_leaf(shaped, scored), expected, atol=1e-6)
    own = np.log([0.99, 0.98, 0.3, 0.97, 0.95, 0.6, 0.99, 0.92, 0.96, 0.5]).astype(np.float32)
    one = scored_of([with_lengths([1.0, 0.0], [10, 1])])
    one = change(one, logprob_T=np.append(own, np.float32(0)), look=lambda name: np.zeros(11))
    for share, confidence in ((0.2, 0.387298), (1.0, 0.766883)):
        shaped = ConfidenceReweight(1.0, share)(one, np.zeros(11))
        np.testing.assert_allclose(shaped[0], 1 - confidence, atol=1e-6)


def test_progrpo_leaves_prompts_without_a_right_leaf_and_solved_ones() -> None:
    scored = scored_of(flat([0.0, 0.0], [1.0, 1.0], [1.0, NAN, 0.0]))
    moved = ConfidenceReweight()(scored_with_prompts(scored), np.ones(scored.leaf_T.size))
    changed = per_leaf(moved, scored) != [1, 1, 1, 1, 1, 0, 1]
    assert changed.tolist() == [False] * 4 + [True, False, True]
    solved = ConfidenceReweight(solved=True)(scored_with_prompts(scored), moved * 0 + 1)
    assert (per_leaf(solved, scored)[2:4] != 1).all()


def scored_with_prompts(scored: Scored) -> Scored:
    return change(scored, look=lambda name: np.full(scored.leaf_T.size, -0.5))


def test_ranks_become_normal_scores_as_on_the_page() -> None:
    first = [-0.734494, -0.734494, 1.150349, 0.318639]
    np.testing.assert_allclose(normal_scores(np.array([0, 0, 1, 0.5])), first, atol=1e-6)
    one = leaf_values((RankNormal(across=False),), [1.0, 0, 0, 0])
    np.testing.assert_allclose(one, [1.150349, -0.383450, -0.383450, -0.383450], atol=1e-6)
    both = leaf_values((RankNormal(),), [0.0, 0, 1, 0.5], [0.2, 0.9, 0.4, 100])
    expected = [-0.687961, -0.687961, 1.210634, 0.323044, -1.534121, 0.323044, -0.157311, 1.210634]
    np.testing.assert_allclose(both, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("bucket", "right", "count", "bonus"),
    [
        (2, True, 25, -0.1),
        (2, False, 25, 0.219318),
        (1, True, 30, -0.218750),
        (1, False, 30, 0.352319),
        (0, True, 25, 0.589208),
        (0, True, 5, -0.163636),
        (0, False, 30, 0.438635),
    ],
)
def test_ares_rewards_places_as_on_its_page(
    bucket: int, right: bool, count: float, bonus: float
) -> None:
    asked = bucket, np.array([right]), np.array([count]), 20, 0.5
    np.testing.assert_allclose(WindowEntropy().bonus(*asked), bonus, atol=1e-6)
    centred = WindowEntropy(centred=True).bonus(2, np.array([False]), np.array([20.0]), 20, 0.5)
    assert centred == 0


def test_ib_tpo_is_that_of_its_page() -> None:
    """V(s) = 3/4, V(parent) = 1/2, V(root) = 3/8; pi = 0.4."""
    tree = ReferenceTree(
        parent=[-1, 0, 1, 2, 2, 2, 2, 1, 7, 7, 7, 7],
        length=[3] + [1] * 11,
        leaf_segment=[3, 4, 5, 6, 8, 9, 10, 11],
        reward=[1.0, 1, 1, 0, 0, 0, 0, 1],
    )
    other = ReferenceTree([-1, 0, 0], [3, 1, 1], [1, 2], [1.0, 0.0])
    scored = scored_of([tree, other])
    scored = change(scored, look=lambda name: np.full(scored.leaf_T.size, np.log(0.4)))
    stage = InformationScore(ddof=0, eps=0.0)
    at = int(np.flatnonzero(scored.segment_T == 2)[0])
    value = run((stage,), scored)[at]
    # Here V(root) = V(parent) = 1/2, so the part against the root is that of 3/4 - 1/2.
    assert value == pytest.approx(0.25 / 0.5 + 0.1 * 0.3 * 0.4)


def test_ib_scores_of_nodes() -> None:
    """Children of 0.75 and 0.25 below 0.5, of pi 0.4 and 0.1: the mean of eta pi is 0.025."""
    tree = ReferenceTree([-1, 0, 0], [3, 1, 1], [1, 2], [0.75, 0.25])
    scored = scored_of([tree])
    scored = change(scored, look=lambda name: np.log([0.4, 0.1]))
    right = InformationScore().metrics(scored, np.zeros(2))["advantage/ib_score"]
    # Both leaves count as right: eta is -0.2 for each.
    assert right == pytest.approx(6 * -0.2 * (0.4 + 0.1) / 2)


# -- definitions, on ragged prompts with unknown rewards --


def tokens_of(scored: Scored, leaf: int) -> list[int]:
    return np.flatnonzero(scored.leaf_T == leaf).tolist()


def slow_empg(scored: Scored, given: np.ndarray, separator: str) -> np.ndarray:
    steps: list[tuple[int, list[int]]] = []
    for leaf, text in enumerate(scored.texts.text_N):
        if math.isnan(scored.reward_N[leaf]):
            continue
        current: list[int] = []
        for place, token in enumerate(tokens_of(scored, leaf)):
            current.append(token)
            if text[place] == separator and place + 1 < len(text):
                steps.append((leaf, current))
                current = []
        steps.append((leaf, current))
    entropy = [fmean(float(scored.entropy_T[t]) for t in tokens) for _, tokens in steps]
    width = max(entropy) - min(entropy) + 1e-8
    unit = [(h - min(entropy)) / width for h in entropy]
    mean = fmean(math.exp(-h) for h in unit)
    result, means = np.zeros(len(given)), []
    for s, (leaf, tokens) in enumerate(steps):
        follows = s + 1 < len(steps) and steps[s + 1][0] == leaf
        bonus = 0.1 * math.exp(-unit[s + 1]) if follows else 0.0
        for t in tokens:
            result[t] = given[t] * math.exp(-unit[s]) / mean + bonus
        means.append(fmean(result[tokens]))
    known = ~np.isnan(scored.reward_N)[scored.leaf_T]
    result[known] -= fmean(means)
    return result


def slow_erpo(scored: Scored, given: np.ndarray) -> np.ndarray:
    def scaled(values: list[float]) -> list[float]:
        return [(v - fmean(values)) / (pstdev(values) + 1e-6) for v in values]

    result = np.where(np.isnan(scored.reward_N)[scored.leaf_T], 0.0, given)
    for group in set(scored.group_N.tolist()):
        leaves = [
            n
            for n in np.flatnonzero(scored.group_N == group)
            if scored.reward_N[n] == scored.reward_N[n]
        ]
        tokens = [t for n in leaves for t in tokens_of(scored, n)]
        if not tokens:
            continue
        bucket = {
            t: 10 * place // len(tokens_of(scored, n))
            for n in leaves
            for place, t in enumerate(tokens_of(scored, n))
        }
        signal: dict[int, float] = {}
        for b in set(bucket.values()):
            inside = [t for t in tokens if bucket[t] == b]
            raw = [float(scored.old_logprob_T[t] - scored.ref_logprob_T[t]) for t in inside]
            signal |= dict(zip(inside, scaled(raw), strict=True))
        z = scaled([float(scored.entropy_T[t]) for t in tokens])
        psi = [
            np.sign(given[t]) * signal[t] / (1 + math.exp(-h))
            for t, h in zip(tokens, z, strict=True)
        ]
        for t, p in zip(tokens, scaled(psi), strict=True):
            result[t] += 0.5 * p
    return result


def slow_ranks(groups: list[list[float]]) -> list[float]:
    def scores(values: list[float]) -> list[float]:
        order = sorted(range(len(values)), key=lambda j: values[j])
        z = {i: NormalDist().inv_cdf((j + 0.5) / len(values)) for j, i in enumerate(order)}
        return [
            fmean(z[j] for j, other in enumerate(values) if math.isclose(other, v, abs_tol=1e-9))
            for v in values
        ]

    places, first = [], []
    for g, reward in enumerate(groups):
        known = [r for r in reward if not math.isnan(r)]
        if len(set(known)) > 1:
            first += scores(known)
            places += [(g, i) for i, r in enumerate(reward) if not math.isnan(r)]
    second = dict(zip(places, scores(first), strict=True)) if first else {}
    return [second.get((g, i), 0.0) for g, r in enumerate(groups) for i in range(len(r))]


def slow_progrpo(scored: Scored, given: np.ndarray) -> np.ndarray:
    result = np.where(np.isnan(scored.reward_N)[scored.leaf_T], 0.0, given)
    for group in set(scored.group_N.tolist()):
        leaves = [n for n, r in enumerate(scored.reward_N) if scored.group_N[n] == group and r == r]
        right = sum(scored.reward_N[n] > 0 for n in leaves)
        for n in leaves if 0 < right < len(leaves) else []:
            at = tokens_of(scored, n)
            low = sorted(float(scored.logprob_T[t]) for t in at)[: math.ceil(len(at) / 5)]
            shift = math.exp(scored.prompt_logprob_T[at[0]]) - math.exp(fmean(low))
            result[at] += 0.3 * shift
    return result


def slow_ares(scored: Scored) -> list[float]:
    """The first step, every token a word, windows of two: rewards with their bonus, by GRPO."""

    def windows(leaf: int) -> list[float]:
        entropy = [float(scored.entropy_T[t]) for t in tokens_of(scored, leaf)]
        return [fmean(entropy[i : i + 2]) for i in range(len(entropy) - 1)]

    found = {n: windows(n) for n in range(len(scored.reward_N))}
    high = [float(np.quantile(w, 0.95)) for w in found.values() if w]
    threshold = float(np.median(high)) if high else math.inf
    count = {n: sum(value >= threshold for value in w) for n, w in found.items()}
    known = [n for n, r in enumerate(scored.reward_N) if not math.isnan(r)]
    bucket = {}
    for n in known:
        same = [m for m in known if scored.group_N[m] == scored.group_N[n]]
        accuracy = fmean(float(scored.reward_N[m] > 0) for m in same)
        bucket[n] = "hard" if accuracy < 1 / 3 else "medium" if accuracy < 2 / 3 else "easy"
    reward = {}
    for n in known:
        slack, soft, heat, most, wrong = {
            "easy": (0.15, 2, 2, 0.5, 0.6),
            "medium": (0.25, 3, 2.5, 0.5, 0.8),
            "hard": (0.35, 4, 3, 0.6, 1.0),
        }[bucket[n]]
        alike = [count[m] for m in known if bucket[m] == bucket[n]]
        target = round(fmean(alike))
        move = 0.05 * (fmean(alike) - target) * (-1 if bucket[n] == "hard" else 1)
        most *= (0.5 + move) / 0.5
        over, margin = count[n] - target, max(1, slack * target)

        def cost(x: float, soft: float = soft, margin: float = margin) -> float:
            x = max(x, 0)
            return (x * x / (2 * soft) if x <= soft else x - soft / 2) / (margin + soft)

        def rise(x: float, heat: float = heat) -> float:
            return 1 / (1 + math.exp(-x / heat))

        if not scored.reward_N[n] > 0:
            bonus = most * wrong * rise(max(over - margin, 0))
        elif bucket[n] == "hard" and over >= -margin:
            bonus = most * rise(over + margin)
        elif bucket[n] == "hard":
            bonus = -min(most, most / 2 * cost(-over - margin))
        else:
            bonus = -most * min(1, cost((abs(over) if bucket[n] == "medium" else over) - margin))
        reward[n] = float(scored.reward_N[n]) + bonus
    result = []
    for n in range(len(scored.reward_N)):
        same = [reward[m] for m in known if scored.group_N[m] == scored.group_N[n]]
        one = n not in reward or len(same) < 2
        result.append(0.0 if one else (reward[n] - fmean(same)) / (stdev(same) + 1e-6))
    return result


@pytest.mark.parametrize("case", range(12))
def test_stages_are_what_they_say_for_ragged_prompts(case: int) -> None:
    scored, groups = ragged(case)
    given = run(grpo(), scored) + np.where(np.isnan(scored.reward_N)[scored.leaf_T], 0.0, 0.25)
    empg = StepModulation(separator="|")(scored, given)
    np.testing.assert_allclose(empg, slow_empg(scored, given, "|"), atol=1e-9)
    erpo = GatedTokens()(scored, given)
    np.testing.assert_allclose(erpo, slow_erpo(scored, given), atol=1e-9)
    np.testing.assert_allclose(leaf_values((RankNormal(),), *groups), slow_ranks(groups), atol=1e-9)
    progrpo = ConfidenceReweight()(scored, given)
    np.testing.assert_allclose(progrpo, slow_progrpo(scored, given), atol=1e-9)
    ares = remembering(WindowEntropy(words="", window=2), scored)
    np.testing.assert_allclose(per_leaf(ares, scored), slow_ares(scored), atol=1e-9)
    kl = DynamicKL(0.3)
    shaped = advantages((kl,), scored, [kl.initial()])[0]
    away = 0.3 * (scored.old_logprob_T - scored.ref_logprob_T)
    known = ~np.isnan(scored.reward_N)[scored.leaf_T]
    np.testing.assert_allclose(shaped, np.where(known, -away, 0.0), atol=1e-12)


def test_ares_counts_places_of_words_and_keeps_targets_of_the_last_step() -> None:
    """Windows of two tokens; the threshold is the median of each response's largest mean."""
    scored = spelled(scored_of([with_lengths([1.0, 0.0], [4, 4])]), ["aXaa", "Xaaa"])
    entropy_T = np.array([0, 4, 4, 0, 2, 0, 0, 0], np.float32)
    scored = change(scored, entropy_T=entropy_T)
    stage = WindowEntropy(words="x", window=2, quantile=1.0)
    state = stage.initial()
    _, metrics = advantages((stage,), scored, [state])
    assert metrics["advantage/places_threshold"] == pytest.approx(2.5)  # of 4 and 1
    assert metrics["advantage/places"] == 0.5  # the X of the first response
    assert state["target"] == [None, 0, None]  # round(0.5): half of the leaves are right
    advantages((replace(stage, words=""),), scored, [state])
    assert state["alpha"][1] == pytest.approx(0.5 + 0.05 * 0.5 + 0.05 * (0.5 - 0))


def test_the_weight_of_a_distance_follows_its_target_by_difficulty() -> None:
    stage = DynamicKL(0.1, target=0.5, every=2)
    scored = scored_of(flat([0.0, 0, 0, 1], [1.0, 1]))  # hard and easy
    state = stage.initial()
    for _ in range(2):
        advantages((stage,), scored, [state])
    distance = math.expm1(-1) + 1  # old -1, reference -2
    error = 0.03 * (distance / 0.5 - 1)
    beta = 0.1 * math.exp(0.05 * error)
    assert state["beta"] == pytest.approx([beta, 0.1, beta])
    assert state["distance"] == [pytest.approx(distance), None, pytest.approx(distance)]


def slow_information(scored: Scored, trees: list[ReferenceTree]) -> list[dict[int, float]]:
    found, first = [], 0
    for tree in trees:
        reward = [tree.reward[n] for n in tree.known()]
        value: dict[int, float] = {}
        for s in range(1, len(tree.parent)):
            if not tree.below(s) or len(set(reward)) < 2:
                value[s] = 0.0
                continue
            mean = fmean(tree.reward[n] for n in tree.below(s))
            share = fmean(float(tree.reward[n] > 0) for n in tree.below(s))
            before = fmean(float(tree.reward[n] > 0) for n in tree.below(tree.parent[s]))
            eta = (share / before if before else 0.0) - 1.2
            at = np.flatnonzero(scored.segment_T == first + s)
            pi = math.exp(fmean(scored.ref_logprob_T[at])) if at.size else 1.0
            value[s] = (mean - fmean(reward)) / (stdev(reward) + 1e-6) + 0.1 * eta * pi
        found.append(value)
        first += len(tree.parent)
    return found


def test_ib_tpo_is_what_it_says_on_trees() -> None:
    trees = [example(), example(), *flat([1.0, 0.0, 1.0])]
    trees[1].reward = [1.0, NAN, 0.5, 0.0]
    scored = scored_of(trees)
    random = np.random.default_rng(1)
    logprob_S = -random.exponential(1.0, len(scored.segments.parent_S))
    scored = change(scored, look=lambda name: logprob_S[scored.segment_T])
    expected, first = np.zeros(scored.leaf_T.size), 0
    for tree, value in zip(trees, slow_information(scored, trees), strict=True):
        for s, v in value.items():
            expected[scored.segment_T == first + s] = v
        first += len(tree.parent)
    expected[np.isnan(scored.reward_N)[scored.leaf_T]] = 0.0
    np.testing.assert_allclose(run((InformationScore(),), scored), expected, atol=1e-9)


# -- what is switched off --


@pytest.mark.parametrize(
    "off",
    [
        EntropyBonus(coef=0.0),
        StepModulation(sharpness=0.0, bonus=0.0, separator="|", centre=False),
        GatedTokens(coef=0.0),
        ConfidenceReweight(alpha=0.0),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_a_stage_that_is_switched_off_changes_nothing(off: Stage) -> None:
    scored, _ = ragged(3)
    np.testing.assert_array_equal(run((*grpo(), off), scored), run(grpo(), scored))


def test_ares_without_weights_is_grpo() -> None:
    scored, _ = ragged(3)
    places = remembering(WindowEntropy(words="", window=2, alpha=0.0, rate=0.0), scored)
    np.testing.assert_array_equal(places, run(grpo(), scored))
    kl = DynamicKL(coef=0.0)
    given = advantages((*grpo(), kl), scored, [None, kl.initial()])[0]
    np.testing.assert_array_equal(given, run(grpo(), scored))


def test_ib_tpo_without_its_term_is_the_tree_against_its_root() -> None:
    scored = scored_of([example(), *flat([1.0, NAN, 0.0])])
    root = Ancestors("root", weight="std", per="segment")
    np.testing.assert_allclose(
        run((InformationScore(lam=0.0),), scored), run((root,), scored), atol=1e-12
    )


def test_ranks_of_two_equally_frequent_rewards_are_a_multiple_of_grpo() -> None:
    ranks = leaf_values((RankNormal(),), [1.0, 0, 1, 0], [0.0, 1.0, 0, 1])
    plain = leaf_values(grpo(), [1.0, 0, 1, 0], [0.0, 1.0, 0, 1])
    np.testing.assert_allclose(ranks / plain, ranks[0] / plain[0], rtol=1e-12)
    assert not leaf_values((RankNormal(),), [1.0, 1.0], [0.0], [NAN, 0.5]).any()


# -- wrong numbers --


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyBonus(kappa=1.0), "EntropyBonus.kappa: expected a number above 1, got 1.0"),
        (lambda: EntropyBonus(coef=-1.0), "EntropyBonus.coef: expected >= 0, got -1.0"),
        (lambda: StepModulation(separator=""), "StepModulation.separator: expected a text"),
        (lambda: GatedTokens(buckets=0), "GatedTokens.buckets: expected >= 1, got 0"),
        (lambda: ConfidenceReweight(share=1.5), "ConfidenceReweight.share: expected a number in"),
        (lambda: WindowEntropy(window=0), "WindowEntropy.window: expected >= 1, got 0"),
        (lambda: DynamicKL(target=0.0), "DynamicKL.target: expected a number above 0, got 0.0"),
        (lambda: InformationScore(beta=0.0), "InformationScore.beta: expected a number above 0"),
    ],
)
def test_a_wrong_number_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
