"""Selections after the advantages: the leaves and tokens that train."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from advantage_reference import scored_of, spelled, with_lengths

from pyrl.select import DownSample, Known, WithoutAnswer, widest

NAN = math.nan


def scored(groups: list[list[float]], lengths: list[list[int]], texts: Any = None) -> Any:
    trees = [with_lengths(r, n) for r, n in zip(groups, lengths, strict=True)]
    found = scored_of(trees)
    return found if texts is None else spelled(found, texts)


def test_the_widest_subset_is_that_of_the_page_and_of_all_subsets() -> None:
    page = np.array([1.2, 0.5, 0, -0.3, -1.4])
    chosen = np.sort(page[widest(page, 3)])
    assert chosen.tolist() == [-1.4, 0.5, 1.2]
    assert chosen.var() == pytest.approx(1.206667, abs=1e-6)
    random = np.random.default_rng(0)
    for _ in range(60):
        value = random.choice([-1.0, 0.0, 0.5, 1.0], random.integers(1, 8))
        wanted = int(random.integers(1, value.size + 1))
        best = max(np.var(subset) for subset in combinations(value, wanted))
        assert value[widest(value, wanted)].var() == pytest.approx(best)


def test_d3s_keeps_the_tokens_of_largest_advantage_times_entropy() -> None:
    given = scored([[0.0, 0.0]], [[3, 3]])
    entropy_T = np.array([0.1, 0.9, 0.4, 0.05, 0.6, 1.5], np.float32)
    given = replace(given, entropy_T=entropy_T, progress=0.0)
    advantage_T = np.repeat([1.2, -1.4], 3)
    third = DownSample((1.0, 1.0), (1 / 3, 1.0)).after(given, advantage_T)
    assert np.flatnonzero(third).tolist() == [1, 5]
    half = replace(given, progress=0.5)
    later = DownSample((1.0, 1.0), (1 / 3, 1.0)).after(half, advantage_T)
    assert np.flatnonzero(later).tolist() == [1, 2, 4, 5]
    forced = replace(given, forced_T=np.arange(6) == 5)
    assert np.flatnonzero(DownSample((1, 1), (0.2, 1)).after(forced, advantage_T)).tolist() == [1]


def test_d3s_chooses_leaves_of_a_step_or_of_each_question() -> None:
    given = replace(scored([[0.0] * 3, [0.0] * 3], [[1] * 3, [1] * 3]), progress=0.0)
    advantage_T = np.array([0.1, 0.2, 0.0, 3.0, -3.0, 1.0])
    across = DownSample((1 / 3, 1.0), (1.0, 1.0))
    assert np.flatnonzero(across.after(given, advantage_T)).tolist() == [3, 4]
    each = DownSample((2 / 3, 1.0), (1.0, 1.0), across=False)
    assert np.flatnonzero(each.after(given, advantage_T)).tolist() == [1, 2, 3, 4]
    assert DownSample((1.0, 1.0), (1.0, 1.0)).after(given, advantage_T).all()


def test_answers_have_no_gradient_where_they_are_found() -> None:
    given = scored([[0.0] * 3], [[6, 3, 2]], ["7 is 7", "ten", "42"])
    trained = WithoutAnswer("number").after(given, np.ones(11))
    assert trained.tolist() == [True] * 5 + [False] + [True] * 3 + [False] * 2
    assert not WithoutAnswer("whole").after(given, np.ones(11)).any()
    assert WithoutAnswer("boxed").after(given, np.ones(11)).all()


def test_leaves_of_unknown_reward_leave_the_loss() -> None:
    given = scored([[1.0, NAN], [NAN]], [[2, 1], [2]])
    assert Known().after(given, np.zeros(5)).tolist() == [True] * 2 + [False] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DownSample(leaf_share=(0.0, 1.0)), "DownSample.leaf_share: expected two shares"),
        (lambda: DownSample(token_share=(0.5, 2.0)), "DownSample.token_share: expected two shares"),
        (lambda: WithoutAnswer("some"), "extractor: expected one of boxed, whole, number"),
    ],
)
def test_a_selection_that_cannot_work_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
