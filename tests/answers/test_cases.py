"""Pairs of answers that people have met, and their neighbours: what is the same and what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.answers import MathEquivalence, VerifierPool
from pyrl.answers.notation import read

CASES = Path(__file__).with_name("cases")
JUDGE = Path(__file__).parents[2] / "pyrl" / "answers" / "math_judge.py"


def cases(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (CASES / name).read_text("utf-8").splitlines()]


PAIRS = [
    (str(case["a"]), str(case["b"]), case["same"])
    for name in ("answers.jsonl", "neighbours.jsonl")
    for case in cases(name)
]
KIND = {str(case[side]): str(case["kind"]) for case in cases("answers.jsonl") for side in "ab"}
"""The kind of each answer; one that is in several, of the last."""


@pytest.fixture(scope="module")
def equivalence() -> Iterator[MathEquivalence]:
    with MathEquivalence(VerifierPool(JUDGE, workers=1, timeout_s=20)) as equivalence:
        yield equivalence


@pytest.mark.parametrize(("a", "b", "same"), PAIRS)
def test_a_pair_is_the_same_or_different_in_either_order(
    equivalence: MathEquivalence, a: str, b: str, same: bool
) -> None:
    assert equivalence.same(a, b) is same
    assert equivalence.same(b, a) is same
    assert equivalence.classes([a, b]).tolist() == ([0, 0] if same else [0, 1])


def test_every_answer_is_the_same_as_itself(equivalence: MathEquivalence) -> None:
    assert [a for a in KIND if equivalence.same(a, f" {a}\n") is not True] == []


def test_answers_of_different_kinds_are_different(equivalence: MathEquivalence) -> None:
    alike = [
        (a, b)
        for a, b in combinations(KIND, 2)
        if KIND[a] != KIND[b] and equivalence.same(a, b) is not False
    ]
    assert alike == []


def test_a_class_has_the_unit_of_its_first_member_that_has_one(
    equivalence: MathEquivalence,
) -> None:
    assert equivalence.classes(["5", "5 cm", "5 m", "5", "5 centimeters"]).tolist() == [
        0,
        0,
        1,
        0,
        0,
    ]
    assert equivalence.classes(["5 m", "5 cm", "5"]).tolist() == [0, 1, 0]


PIECES = st.sampled_from(
    [*"0123456789.,:/^_{}()[]$%&*'~ –-+=√½²°€xX", "\\frac", "\\text{ cm}", "sqrt(", " hours", "\\["]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_text_can_be_read_whatever_space_is_around_it(answer: str) -> None:
    assert read(f" {answer}\n") == read(answer)


def test_nothing_ran_into_a_limit(equivalence: MathEquivalence) -> None:
    assert equivalence.unknown == 0
    assert equivalence.pool.replaced == 0
