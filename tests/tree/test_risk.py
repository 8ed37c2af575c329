"""Mixed value at risk: numbers of the paper's page, and its definition written out slowly."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from advantage_reference import flat, per_leaf, ragged, remembering, run, scored_of

from pyrl.advantage import GroupBaseline, advantages
from pyrl.advantage.risk import MixedRisk

NAN = math.nan


def test_risk_of_bundles_is_that_of_the_page() -> None:
    score = np.array([0.0, 1, 2, 2, 4])
    released = MixedRisk()
    parts = {
        (0.5, "exact", True): [-3.5, -2, -1, -1, 0],
        (1.5, "released", True): [-4.333316, -1.333331, -0.666666, -0.666666, 0],
        (1.5, "released", False): [-2.999985, 0, 0.666666, 0.666666, 1.333331],
    }
    for (weight, form, constant), expected in parts.items():
        stage = replace(released, weight=weight, form=form, constant=constant)
        np.testing.assert_allclose(stage.of_scores(score, 1, 3), expected, atol=2e-6)
    scored = scored_of(flat([0.0, 1, 2, 2, 4]))
    alone = replace(released, bundle=1, credit="uniform", rate=0.0)
    advantage_T = remembering(alone, scored, {"low": 1.0, "high": 3.0})
    expected = [-2.022588, 0, 0.449466, 0.449466, 0.898931]
    np.testing.assert_allclose(per_leaf(advantage_T, scored), expected, atol=2e-6)


def test_credit_of_a_bundle_goes_to_its_leaves_as_on_the_page() -> None:
    reward = np.array([[1.0, 0, 1, 0, 0]])
    over = reward - [0.5, 0.5, 0.9, 0.1, 0.2]
    whole = np.array([-0.5])
    released = MixedRisk(cap=math.inf).credited(whole, reward, over)
    np.testing.assert_allclose(released, [[1.25, -1.25, 0.25, -0.25, -0.5]], atol=1e-12)
    capped = MixedRisk().credited(whole, reward, over)
    np.testing.assert_allclose(capped, [[0.5, -0.5, 0.25, -0.25, -0.5]], atol=1e-12)
    np.testing.assert_allclose(MixedRisk().credited(-whole, reward, over), np.full((1, 5), 0.1))
    scored = MixedRisk(credit="score").credited(whole, reward, over)
    np.testing.assert_allclose(scored, [[-0.25, -0.75, -0.25, -0.75, -0.75]])


def test_tracked_quantiles_move_and_stay_without_data() -> None:
    stage, state = MixedRisk(bundle=2), MixedRisk().initial()
    unknown = scored_of(flat([NAN, NAN]))
    assert not remembering(stage, unknown, state).any()
    assert state == {"low": None, "high": None}
    scored = scored_of(flat([0.0, 1, 0, 1], [0.0, 0, 1, 1]))
    remembering(stage, scored, state)
    scores = [0.0, 1, 1, 2]
    assert [state["low"], state["high"]] == pytest.approx(np.quantile(scores, [0.2, 0.8]).tolist())
    before = {**state}
    metrics = advantages((stage,), scored, [state])[1]
    assert state["low"] == pytest.approx(before["low"] + 0.1 * (0.2 - 0.25))
    assert state["high"] == pytest.approx(before["high"] + 0.1 * (0.8 - 0.75))
    assert metrics["advantage/risk_high"] == state["high"]
    remembering(stage, unknown, state)
    assert metrics["advantage/risk_low"] == state["low"]


def slow_risk(groups: list[list[float]], bundle: int) -> list[float]:
    known = [[(g, i) for i, r in enumerate(x) if not math.isnan(r)] for g, x in enumerate(groups)]
    known = [places for places in known if places]
    reward = {(g, i): r for g, x in enumerate(groups) for i, r in enumerate(x)}
    chunks = [known[n : n + bundle] for n in range(0, len(known), bundle)]
    bundles = [[*zip(*chunk, strict=False)] for chunk in chunks]
    scored = [[fmean(reward[p] for p in b) * bundle for b in chunk] for chunk in bundles]
    low, high = np.quantile([r for chunk in scored for r in chunk], [0.2, 0.8])
    result = dict.fromkeys(reward, 0.0)
    for chunk, scores in zip(bundles, scored, strict=True):
        if len(set(scores)) < 2:
            continue
        for places, score in zip(chunk, scores, strict=True):
            g = max(score - low, 0) - max(score - high, 0)
            mixed = (1.5 * -max(low - score, 0) / (0.2 + 1e-6) + g / (0.6 + 1e-6)) / 2.5
            whole = mixed / (stdev(scores) + 1e-6)
            over = [
                reward[p] - fmean(reward[q] for member in known if p in member for q in member)
                for p in places
            ]
            total = sum(over)
            fair = abs(total) >= 1e-6 and total * whole >= 0
            for p, d in zip(places, over, strict=True):
                part = min(1.0, max(-1.0, d / total)) if fair else 1 / len(places)
                result[p] = whole * part
    return [*result.values()]


@pytest.mark.parametrize("case", range(12))
def test_risk_is_what_it_says_for_ragged_prompts(case: int) -> None:
    scored, groups = ragged(case)
    risk = remembering(MixedRisk(bundle=3), scored)
    np.testing.assert_allclose(per_leaf(risk, scored), slow_risk(groups, 3), atol=1e-9)


def test_risk_of_single_leaves_without_ends_is_grpo_but_for_its_baseline() -> None:
    """Every score counts alike; the baseline is the least reward, and not the mean."""
    reward = [0.0, 0.25, 1.0, 0.25, 1.0]
    scored = scored_of(flat(reward))
    alone = MixedRisk(1, 0.0, 1.0, 0.0, quantiles="batch", credit="uniform", eps=1e-9)
    values = per_leaf(remembering(alone, scored), scored)
    expected = per_leaf(run((GroupBaseline(eps=1e-9),), scored), scored)
    np.testing.assert_allclose(values - values.mean(), expected - expected.mean(), atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixedRisk(low=0.9), "MixedRisk: expected low <= high, got 0.9 and 0.8"),
        (lambda: MixedRisk(eps=0.0), "MixedRisk.eps: expected a number above 0, got 0.0"),
        (lambda: MixedRisk(bundle=0), "MixedRisk.bundle: expected >= 1, got 0"),
        (lambda: MixedRisk(credit="some"), "there is no credit of MixedRisk 'some'"),
    ],
)
def test_a_wrong_number_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
