from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from leaf_records import leaves_of

from pyrl.answers import (
    EQUIVALENCES,
    EXTRACTORS,
    Boxed,
    Exact,
    Extractor,
    LastNumber,
    MathEquivalence,
    Pattern,
    VerifierPool,
    Whole,
    classify,
    extractor_named,
)
from pyrl.engine import STOPPED, TRUNCATED

JUDGE = Path(__file__).parents[2] / "pyrl" / "answers" / "math_judge.py"


@pytest.fixture(scope="module")
def equivalence() -> Iterator[MathEquivalence]:
    with MathEquivalence(VerifierPool(JUDGE, workers=1, timeout_s=20)) as equivalence:
        yield equivalence


# -- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1}, no: \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {7}", "7"),
        ("\\boxed{ 8\n}", "8"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"} {\boxed{5}", "5"),
        (r"\boxed{", None),
        (r"\boxed{{1}", None),
        (r"\boxed{ }", None),
        (r"\fbox{4}", None),
        ("4", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, answer: str | None) -> None:
    assert Boxed()(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 42.", "42"),
        ("3 + 4 = 7", "7"),
        ("x=-5", "-5"),
        ("3-5", "5"),
        ("(2)-1", "1"),
        ("about 1,234,567.5 km", "1234567.5"),
        ("half: 1/2", "1/2"),
        ("\N{MINUS SIGN}3", "-3"),
        ("+3", "3"),
        ("room A1", None),
        ("none", None),
    ],
)
def test_the_last_number_is_the_answer(text: str, answer: str | None) -> None:
    assert LastNumber()(text) == answer


def test_a_pattern_gives_the_first_group_of_its_last_match() -> None:
    pattern = Pattern(r"answer:\s*(\w+)")
    assert pattern("answer: a\nanswer:\nb") == "b"
    assert pattern("no") is None
    assert Pattern("x(y)?")("x") is None


def test_the_whole_text_is_an_answer_unless_it_is_empty() -> None:
    assert Whole()(" a b\n") == "a b"
    assert Whole()(" \n") is None


@pytest.mark.parametrize("extractor", [*EXTRACTORS.values(), Pattern("(7+)")])
@pytest.mark.parametrize(
    "text", [r"\boxed{" * 20_000, "{" * 100_000, "7" * 100_000, "\\" * 100_000, "1," * 50_000]
)
def test_extraction_takes_linear_time(extractor: Extractor, text: str) -> None:
    begin = time.perf_counter()
    extractor(text)
    assert time.perf_counter() - begin < 2


def test_extractors_are_found_by_name() -> None:
    assert extractor_named("boxed") == Boxed()
    assert extractor_named("whole") == Whole()
    assert extractor_named("number") == LastNumber()
    assert extractor_named("regex:#### (.*)") == Pattern("#### (.*)")
    with pytest.raises(ValueError, match="expected one of boxed, whole, number, regex:PATTERN"):
        extractor_named("box")
    with pytest.raises(ValueError, match="expected a group"):
        extractor_named("regex:x")
    with pytest.raises(ValueError, match="does not compile"):
        extractor_named("regex:(")


# -- equivalence


def test_exact_answers_are_equal_up_to_white_space_at_the_ends() -> None:
    classes = Exact().classes(["b", None, "a", " b ", "B"])
    assert classes.tolist() == [0, -1, 1, 0, 2]
    assert classes.dtype == np.int64
    assert Exact().same("a", "a\n")
    assert not Exact().same("1/2", "0.5")


def test_one_half_is_one_half(equivalence: MathEquivalence) -> None:
    assert equivalence.classes(["1/2", "0.5", None, "2"]).tolist() == [0, 0, -1, 1]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/2", r"\frac12"),
        ("1/2", r"\dfrac{1}{2}"),
        ("0.50", ".5"),
        (r"50\%", "0.5"),
        ("1,000", "1000"),
        (r"1{,}000", "1000"),
        ("$5$", "5"),
        (r"\$5", "5"),
        (r"5 \text{ cm}", "5"),
        ("x=5", "5"),
        ("x+1", "1+x"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt 3}"),
        ("10^{10}", "10000000000"),
        (r"\{2,1\}", "1, 2"),
        ("1<x<2", "(1,2)"),
        ("A", "a"),
        (r"\text{Yes}", "yes"),
        ("New  York.", "new york"),
        (r"25\,000", "25000"),
        (r"1\ 234~567", "1{,}234{,}567"),
        ("7.", "7"),
        ("5.", "5.0"),
        (r"\frac{1}{2}.", "1/2"),
        (r"7 \%", r"7\%"),
    ],
)
def test_equal_answers_are_recognised_in_either_order(
    equivalence: MathEquivalence, a: str, b: str
) -> None:
    assert equivalence.same(a, b) is True
    assert equivalence.same(b, a) is True
    assert equivalence.classes([a, b]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/2", "2"),
        ("0.333333", "1/3"),
        (r"50\%", "50"),
        ("dusty", "study"),
        ("no", "on"),
        ("12 34", "46"),
        ("3:45", r"\frac{1}{15}"),
        ("(1,2)", "(2,1)"),
        ("x", "y"),
        ("-3", "3"),
        (r"\sqrt{2}", "1.414"),
        ("1/0", "2/0"),
        ("}{", "{}"),
        ("A", "B"),
        (r"25\,000", r"30\,000"),
        (r"25\,000", "0"),
        (r"12\,500", "512"),
        (r"2\,3", "6"),
        ("1_000", "1"),
        ("2024-03-05", "2024-05-03"),
        ("01/02/2025", "02/04/2025"),
        ("555-1234", "-679"),
        ("123456789012345678901", "123456789012345678902"),
    ],
)
def test_different_answers_are_told_apart(equivalence: MathEquivalence, a: str, b: str) -> None:
    assert equivalence.same(a, b) is False
    assert equivalence.classes([a, b]).tolist() == [0, 1]


def test_plain_numbers_and_words_need_no_process() -> None:
    with MathEquivalence() as equivalence:
        answers = ["1", "1.0", "2/2", "100%", "yes", "Yes", "no", "-7", "1,000", "9" * 100_000]
        answers += [r"-\dfrac{14}{2}", r"\frac{1}{2}"]
        assert equivalence.classes(answers).tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 3, 6]
        assert equivalence.pool.calls == 0


def test_nothing_is_judged_twice() -> None:
    with MathEquivalence(VerifierPool(JUDGE, workers=1, timeout_s=20)) as equivalence:
        answers = ["(x+1)^2", "(1+x)^2", "2x", "x^2+2x+1", "(x+1)^2"]
        assert equivalence.classes(answers).tolist() == [0, 0, 1, 0, 0]
        # four parses; (1+x)^2 has the form of (x+1)^2, 2x another value: one pair to judge
        assert equivalence.pool.calls == 5
        assert equivalence.classes([*answers[::-1], None]).tolist() == [0, 0, 1, 0, 0, -1]
        assert equivalence.same("x^2+2x+1", "(1+x)^2") is True
        assert equivalence.pool.calls == 5


def test_different_values_need_no_verifier_however_many_there_are() -> None:
    with MathEquivalence(VerifierPool(JUDGE, workers=1, timeout_s=20)) as equivalence:
        answers = [rf"{n}x+\sqrt{{2}}" for n in range(2, 22)]
        assert equivalence.classes(answers).tolist() == list(range(20))
        assert equivalence.pool.calls == 20


def test_the_partition_does_not_depend_on_order_and_its_numbers_follow_it(
    equivalence: MathEquivalence,
) -> None:
    answers = ["0.5", r"\frac{1}{2}", "x+1", "1+x", None]
    for order in permutations(range(5)):
        classes = equivalence.classes([answers[i] for i in order])
        of = {answers[i]: int(classes[at]) for at, i in enumerate(order)}
        assert of["0.5"] == of[r"\frac{1}{2}"] != of["x+1"] == of["1+x"]
        seen = [int(c) for c in classes if c >= 0]
        assert list(dict.fromkeys(seen)) == [0, 1]
        assert of[None] == -1


BOMBS = ["9^{9^{9^9}}", "99999999!", "10^{999999999}"]


def test_answers_that_take_for_ever_are_unknown_and_cost_one_limit_each() -> None:
    with MathEquivalence(VerifierPool(JUDGE, workers=2, timeout_s=1)) as equivalence:
        begin = time.monotonic()
        classes = equivalence.classes(["5", *BOMBS, "5.0", BOMBS[0], "6"])
        assert time.monotonic() - begin < 20
        assert classes.tolist() == [0, 1, 2, 3, 0, 1, 4]
        assert equivalence.pool.calls == len(BOMBS)
        assert equivalence.pool.replaced == len(BOMBS)
        # against 5: three, among themselves: three, 6 against them: three
        assert equivalence.unknown == 9
        assert equivalence.same(BOMBS[0], "5") is None
        assert equivalence.same(BOMBS[0], BOMBS[0]) is True


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 50_000 + "1" + ")" * 50_000,
        "7" * 100_000,
        r"\frac{" * 20_000,
        "x^" * 50_000,
        "\0",
        "\ud800",
        r"\input{/etc/passwd}",
        "__import__('os').abort()",
    ],
)
def test_hostile_answers_are_equal_to_themselves_only(
    equivalence: MathEquivalence, answer: str
) -> None:
    assert equivalence.classes([answer, "1", answer + " ", "1.0"]).tolist() == [0, 1, 0, 1]


def test_a_pair_that_a_verifier_cannot_settle_stays_apart_and_is_counted(tmp_path: Path) -> None:
    source = tmp_path / "judge.py"
    source.write_text(
        "import os\n"
        "def canonical(a): return 'expression', a, None\n"
        "def equal(a, b): return os._exit(1) if 'x' in a + b else a[0] == b[0]\n"
    )
    with MathEquivalence(VerifierPool(source, workers=1)) as equivalence:
        leaves = leaves_of(["a1", "a2", "x1", "a3", "b1"], groups=1)
        answers = classify(leaves, Whole(), equivalence)
        assert answers.class_N.tolist() == [0, 0, 1, 0, 2]
        assert answers.unknown == 2
        assert equivalence.same("x1", "a1") is None
        calls = equivalence.pool.calls
        assert equivalence.same("a1", "x1") is None
        assert equivalence.pool.calls == calls


def test_an_answer_that_keeps_crashing_the_verifier_is_given_up(tmp_path: Path) -> None:
    source = tmp_path / "judge.py"
    source.write_text(
        "import os\n"
        "def canonical(a): return 'expression', a, None\n"
        "def equal(a, b): return os._exit(1) if 'x' in a + b else False\n"
    )
    with MathEquivalence(VerifierPool(source, workers=1)) as equivalence:
        classes = equivalence.classes(["x", *(f"a{i}" for i in range(10))])
        assert classes.tolist() == list(range(11))
        assert equivalence.pool.replaced == 4
        assert equivalence.unknown == 10


def test_equivalences_are_found_by_name() -> None:
    for name, kind in [("exact", Exact), ("math", MathEquivalence)]:
        equivalence = EQUIVALENCES[name]()
        assert isinstance(equivalence, kind)
        assert equivalence.classes(["2", "2"]).tolist() == [0, 0]
        equivalence.close()


# -- classify


def test_classes_are_numbered_in_each_prompt() -> None:
    leaves = leaves_of(["a", "b", "c", "c", "", "b"], group_N=[0, 0, 2, 2, 2, 2], groups=3)
    answers = classify(leaves, Whole(), Exact())
    assert answers.answer_N == ("a", "b", "c", "c", None, "b")
    assert answers.class_N.tolist() == [0, 1, 0, 0, -1, 1]
    assert answers.unknown == 0
    kept = answers.take(np.array([1, 5], np.int64))
    assert kept.answer_N == ("b", "b")
    assert kept.class_N.tolist() == [1, 1]


def test_a_truncated_leaf_answers_only_with_a_closed_box() -> None:
    finish_N = [TRUNCATED, TRUNCATED, STOPPED]
    leaves = leaves_of([r"\boxed{1} and", r"\boxed{1", r"\boxed{1}"], finish_N=finish_N)
    assert classify(leaves, Boxed(), Exact()).answer_N == ("1", None, "1")
    leaves = leaves_of(["12", "12", "123"], finish_N=finish_N)
    for extractor in (Whole(), LastNumber(), Pattern(r"(\d+)")):
        assert classify(leaves, extractor, Exact()).answer_N == (None, None, "123")
    closed = Pattern(r"<a>(\d+)</a>", needs_end=False)
    leaves = leaves_of(["<a>1</a> x", "<a>1", "<a>2</a>"], finish_N=finish_N)
    assert classify(leaves, closed, Exact()).answer_N == ("1", None, "2")
