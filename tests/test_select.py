"""Which leaves train: both choices against slow versions, on ragged groups."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leaf_records import leaves_of

from pyrl.leaves import Leaves
from pyrl.select import (
    Dynamic,
    First,
    Rejection,
    Stratified,
    accepted,
    lift,
    of_accepted,
    selected,
)

TRUNKS_OF_GROUPS = st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=1, max_size=5)
"""For each group, possibly empty, the trunk of each of its leaves."""


def ragged(trunks_of_groups: list[list[int]]) -> Leaves:
    group_N = [g for g, trunks in enumerate(trunks_of_groups) for _ in trunks]
    trunk_N = [trunk for trunks in trunks_of_groups for trunk in trunks]
    return leaves_of(
        ["a"] * len(group_N), group_N=group_N, groups=len(trunks_of_groups), trunk_N=trunk_N
    )


def members(leaves: Leaves, group: int) -> list[int]:
    return [n for n in range(len(leaves.group_N)) if leaves.group_N[n] == group]


@settings(max_examples=200, deadline=None)
@given(TRUNKS_OF_GROUPS, st.integers(0, 10))
def test_first_takes_the_first_leaves_of_each_group(groups: list[list[int]], train: int) -> None:
    leaves = ragged(groups)
    expected = [n for g in range(len(groups)) for n in members(leaves, g)[:train]]
    assert First()(leaves, train).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(TRUNKS_OF_GROUPS, st.integers(0, 10))
def test_stratified_deals_the_trunks_leaves_in_turn(groups: list[list[int]], train: int) -> None:
    leaves = ragged(groups)
    expected = []
    for g in range(len(groups)):
        hands: dict[int, list[int]] = {}
        for n in members(leaves, g):
            hands.setdefault(int(leaves.trunk_N[n]), []).append(n)
        taken: list[int] = []
        while len(taken) < train and any(hands.values()):
            for trunk in sorted(hands):
                if hands[trunk] and len(taken) < train:
                    taken.append(hands[trunk].pop(0))
        expected += sorted(taken)
    assert Stratified()(leaves, train).tolist() == expected


def test_stratified_takes_half_of_etmrs_leaves_from_all_trunks_themselves_first() -> None:
    leaves = leaves_of(["a"] * 60, trunk_N=[n // 5 for n in range(60)])
    kept_N = Stratified()(leaves, 32)
    assert len(kept_N) == 32
    assert set(np.bincount(leaves.trunk_N[kept_N])) == {2, 3}
    assert set(range(0, 60, 5)) <= set(kept_N.tolist())
    assert len(set(leaves.trunk_N[First()(leaves, 32)].tolist())) == 7


def test_both_agree_on_a_flat_group() -> None:
    leaves = leaves_of(["a"] * 9, group_N=[0] * 4 + [2] * 5, trunk_N=[0, 1, 2, 3, 0, 1, 2, 3, 4])
    assert First()(leaves, 3).tolist() == Stratified()(leaves, 3).tolist() == [0, 1, 2, 4, 5, 6]


# -- questions that are refused --

NAN = float("nan")


def test_dynamic_sampling_trains_the_first_questions_whose_rewards_differ() -> None:
    """Groups: equal, different, unknown, different, different."""
    leaves = leaves_of(["abc", "d"] * 5, group_N=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    reward_N = np.array([1, 1, 1, 0, NAN, 1, 0, 1, 0, 1], np.float64)
    accepted_G = accepted(Dynamic(), leaves, reward_N)
    assert accepted_G.tolist() == [False, True, False, True, True]
    kept_N, metrics = of_accepted(Dynamic(), leaves, np.arange(10), accepted_G, 2)
    assert kept_N.tolist() == [2, 3, 6, 7]
    assert metrics == {
        "select/questions": 5,
        "select/refused": pytest.approx(0.4),
        "select/idle_tokens": pytest.approx(0.6),
    }


def test_no_question_is_refused_where_all_would_be_or_no_other_may_come() -> None:
    leaves, reward_N = leaves_of(["a"] * 4, group_N=[0, 0, 1, 1]), np.ones(4)
    refusing = accepted(Dynamic(), leaves, reward_N)
    assert not refusing.any()
    kept_N, metrics = of_accepted(Dynamic(), leaves, np.arange(4), refusing, 2)
    assert (kept_N.tolist(), metrics["select/refused"]) == ([0, 1, 2, 3], 1)
    for select in (Dynamic(rounds=0), First()):
        accepted_G = accepted(select, leaves, reward_N)
        assert accepted_G.all()
        assert of_accepted(select, leaves, np.array([0, 2]), accepted_G, 1)[1] == {}


@dataclass(frozen=True)
class Given:
    """Returns what it is made from."""

    kept_N: Any

    def __call__(self, leaves: Leaves, train: int) -> Any:
        return self.kept_N


@pytest.mark.parametrize(
    ("kept_N", "got"),
    [
        (np.array([0, 3]), r"a numpy array int64\[2\]"),
        (np.array([1, 0]), r"a numpy array int64\[2\]"),
        (np.array([1, 1]), r"a numpy array int64\[2\]"),
        (np.array([-1]), r"a numpy array int64\[1\]"),
        (np.array([True, False, True]), r"a numpy array bool\[3\]"),
        (np.array([0.0]), r"a numpy array float64\[1\]"),
        ([0, 1], r"list \[0, 1\]"),
    ],
)
def test_a_selection_of_other_than_its_leaves_is_refused(kept_N: Any, got: str) -> None:
    says = f"select: Given: expected ascending ordinals of 3 leaves, got {got}"
    with pytest.raises(ValueError, match=says):
        selected(Given(kept_N), leaves_of(["a"] * 3), 3)


def test_a_selection_may_take_no_leaf_and_all() -> None:
    leaves = leaves_of(["a"] * 3)
    for kept_N in ([], [0, 1, 2]):
        assert selected(Given(np.array(kept_N, np.int64)), leaves, 3).tolist() == kept_N


# -- by rewards --


def test_rso_accepts_by_the_distance_to_the_largest_reward() -> None:
    probability_N = Rejection().acceptance(np.array([1, 0.8, 0.2, -0.5]))
    np.testing.assert_allclose(probability_N, [1, 0.670320, 0.201897, 0.049787], atol=1e-6)
    assert probability_N.mean() == pytest.approx(0.480501, abs=1e-6)
    assert Rejection().acceptance(np.array([NAN, 0.5, 0])).tolist() == [0, 1, np.exp(-1)]
    assert Rejection().acceptance(np.array([NAN, NAN])).tolist() == [1, 1]


@settings(max_examples=100, deadline=None)
@given(TRUNKS_OF_GROUPS, st.integers(0, 10), st.integers(0, 9))
def test_rso_without_a_temperature_takes_the_largest_and_at_inf_the_first(
    groups: list[list[int]], train: int, seed: int
) -> None:
    leaves = ragged(groups)
    reward_N = np.random.default_rng(seed).permutation(len(leaves.group_N)).astype(np.float64)
    expected = [
        n
        for g in range(len(groups))
        for n in sorted(sorted(members(leaves, g), key=lambda n: -reward_N[n])[:train])
    ]
    picked = selected(Rejection(1e-9), leaves, train, reward_N=reward_N)
    assert picked.tolist() == expected
    first = selected(Rejection(np.inf), leaves, train, reward_N=reward_N)
    assert first.tolist() == First()(leaves, train).tolist()


def test_rso_draws_as_it_says_and_unknown_rewards_come_last() -> None:
    """Of two leaves the worse one trains only where a first pass takes it: it comes first."""
    reward_N, seeds = np.array([0.2, 1.0]), range(2000)
    worse = [
        selected(Rejection(seed=seed), leaves_of(["a", "b"]), 1, reward_N=reward_N)[0] == 0
        for seed in seeds
    ]
    assert np.mean(worse) == pytest.approx(np.exp(-1.6), abs=0.03)
    reward_N = np.array([NAN, 0.0, NAN, 0.0])
    for seed, train, kept in ((0, 2, [1, 3]), (1, 3, [0, 1, 3]), (2, 9, [0, 1, 2, 3])):
        leaves = leaves_of(["a"] * 4)
        assert selected(Rejection(0.1, seed), leaves, train, reward_N=reward_N).tolist() == kept
    assert lift(Rejection(), np.array([1, NAN, 0, 0.5]), np.array([0, 1])) == {
        "select/reward_lift": 0.5
    }


def test_rso_needs_a_temperature_and_rewards() -> None:
    with pytest.raises(ValueError, match=r"Rejection\.beta: expected > 0, got 0"):
        Rejection(0)
    with pytest.raises(ValueError, match="Rejection: expected the rewards of all leaves before"):
        selected(Rejection(), leaves_of(["a"]), 1)
