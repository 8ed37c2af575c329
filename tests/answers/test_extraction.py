"""Numbers are read whole or not at all, and an answer behind a tag needs the tag."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pyrl.answers import After, Boxed, Extractor, LastNumber, Whole, extractor_named

CASES = Path(__file__).with_name("cases") / "extraction.jsonl"


@pytest.mark.parametrize("line", CASES.read_text("utf-8").splitlines())
def test_a_case_is_read_as_one_of_its_answers(line: str) -> None:
    case = json.loads(line)
    extractor = extractor_named(case["extractor"])
    assert extractor(case["text"]) in case["expected"]
    assert extractor(f"So it is {case['text']}.") in case["expected"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1.5e3", "1.5e3"),
        ("it is 10^{3}.", "10^{3}"),
        ("10³", "10³"),
        ("1 1/2", "1 1/2"),
        ("\N{EN DASH}5", "-5"),
        ("1 000 000", "1000000"),
        ("1\N{NARROW NO-BREAK SPACE}234", "1234"),
        ("about .5", ".5"),
        ("it is 5, see A1", "5"),
        ("5km", "5"),
        ("$5.00", "5.00"),
        (r"\boxed{5}", "5"),
        (r"\frac{1}{2} = 0.5", "0.5"),
    ],
)
def test_a_number_is_read_whole(text: str, answer: str) -> None:
    assert LastNumber()(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        *("12:30", "3:4", "1,2", "1.2.3", "2x", "5k", "2pi", "0x1F", "1e5x", "1_000", "1½"),
        *("√2", r"\sqrt{2}", r"\frac{1}{2}", "x^2", "12 345", "2024-03-05"),
    ],
)
def test_a_part_of_something_else_is_no_answer(text: str) -> None:
    assert LastNumber()(f"So it is {text}") is None


def test_only_what_follows_the_last_tag_is_read() -> None:
    after = After("</think>", Boxed())
    assert after(r"<think>\boxed{1}</think> so \boxed{2}") == "2"
    assert after(r"</think>\boxed{1}</think>\boxed{3}") == "3"
    assert after(r"<think>perhaps \boxed{1}, but") is None
    assert after(r"\boxed{1}</think> none") is None
    assert not after.needs_end
    assert After("</think>", Whole()).needs_end


@pytest.mark.parametrize("extractor", [LastNumber(), After("</t>", LastNumber())])
@pytest.mark.parametrize(
    "unit", ["7", "1,", "1 ", "x", "x1", ":", "1/", "1-", "</t>", "1 000 ", "√"]
)
def test_reading_takes_linear_time(extractor: Extractor, unit: str) -> None:
    begin = time.perf_counter()
    extractor(unit * (100_000 // len(unit)))
    assert time.perf_counter() - begin < 2
