r"""When two answers are the same: one relation for the vote and for the reward.

With two relations (a string for the vote, a grader for the reward, as in the code of
arXiv:2504.16084) an answer that did not vote for the label can still be rewarded.
"""

from __future__ import annotations

import cmath
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyrl.answers.notation import Reading, read
from pyrl.answers.pool import Outcome, Status, VerifierPool

_T = TypeVar("_T")
_V = TypeVar("_V")

_JUDGE = Path(__file__).with_name("math_judge.py")
_LONGEST = 512
"""Characters; a longer answer is compared as text."""
_STRIKES = 4
"""Unknown comparisons after which an answer is not sent to a verifier again for this prompt."""
_CLOSE = 1e-9
"""Relative distance of values above which expressions need no verifier to be told apart."""
_NOTHING = 1e-100
"""Likewise for a value of 0, which is computed to about 125 digits."""
_MEMORY = 1_000_000
"""Remembered answers and verdicts, each; the oldest are forgotten first."""

_DECIMAL = r"(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?"
_POWER = r"(?:\s*\\(?:times|cdot)\s*10\s*\^\s*\{([-+]?\d{1,3})\})?"
_NUMBER = re.compile(rf"([-+]?)\s*{_DECIMAL}{_POWER}(?:\s*/\s*(\d+))?(\s*\\?%)?")
_FRACTION = re.compile(r"([-+]?)\\[dtc]?frac\{(\d+)\}\{(\d+)\}")
_CHOICE = re.compile(r"([A-Ja-d])|\(([A-Ja-d])\)")
_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(:\d{2})?(?: ?([ap])\.? ?m\b\.?)?", re.IGNORECASE)
_BASE = re.compile(r"\(?(\b\w+)\)?_ ?\{? ?(\d+) ?\}?")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}\\]*)\}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}(?:\{[lcr|]+\})?")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!and\b)[A-Za-z]{3,}")
_FACTOR_BEFORE = re.compile(r"(?:(?<!\\)\{|[\d}^*+]) ?$")
_FACTOR_BEHIND = re.compile(r" ?(?:[}^*+_]|[-/] ?[\d(])")
_NOT_MATHEMATICS = re.compile(
    r"^[A-Za-z]{2,}$|[:–'#]|\\prime|\d(?:\s|\\[,;: !]|~)+\d|[\d)]_|\d\.\d+\.\d"
    r"|^\d+(?P<dash>[-/])\d+(?P=dash)\d+$|^\d{3,}-\d{4}$"
)
"""A word, a time, a range, a derivative (math-verify drops its sign), numbers side by side (as
LaTeX a sum, or a product), a number in a base (its digits are read as decimal ones), a date or a
telephone number (as LaTeX differences)."""


class Equivalence(Protocol):
    """Says which answers to one prompt are the same."""

    @property
    def unknown(self) -> int:
        """Comparisons so far that no verdict was reached on; they count as different."""

    def classes(self, answer_N: Sequence[str | None]) -> NDArray[np.int64]:
        """Class of each answer, numbered in the order of first appearance; -1 for None."""

    def same(self, a: str, b: str) -> bool | None:
        """None if the verifier ran out of time or crashed."""

    def close(self) -> None:
        """Give processes back; harmless if there are none."""


def _number_classes(
    item_N: Sequence[_T | None], find: Callable[[_T, list[_T]], int | None]
) -> NDArray[np.int64]:
    """Give each item the class of the representative (first member) that `find` picks."""
    representatives: list[_T] = []
    class_of: dict[_T | None, int] = {None: -1}
    for item in item_N:
        if item is None or item in class_of:
            continue
        found = find(item, representatives)
        class_of[item] = len(representatives) if found is None else found
        if found is None:
            representatives.append(item)
    return np.array([class_of[item] for item in item_N], np.int64)


@dataclass(frozen=True)
class Exact:
    """Equal strings, up to white space at both ends."""

    unknown: int = 0

    def classes(self, answer_N: Sequence[str | None]) -> NDArray[np.int64]:
        stripped_N = [None if answer is None else answer.strip() for answer in answer_N]
        return _number_classes(stripped_N, lambda answer, representatives: None)

    def same(self, a: str, b: str) -> bool:
        return a.strip() == b.strip()

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class _Form:
    """What an answer is. Equal forms are equal answers; a verifier compares expressions further."""

    kind: str
    """"number", "text", "expression", or "unknown": equal to itself only."""
    key: str | Fraction
    text: str = field(compare=False)
    """The answer, for the verifier."""
    value: complex | None = field(compare=False, default=None)
    """At a fixed point of its variables, where it has one. Equal forms have close values."""
    unit: str = ""
    """Empty: a bare value, which equals the same value in any unit."""


def _number(answer: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction or percentage in plain notation."""
    fraction = _FRACTION.fullmatch(answer)
    match = _NUMBER.fullmatch(fraction.expand(r"\1\2/\3") if fraction else answer)
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, decimals, power, below, percent = match.groups()
    below = int(below or 1) * (100 if percent else 1)
    if below == 0:
        return None
    value = Fraction(f"{sign}{(whole or '0').replace(',', '')}{decimals or ''}")
    return value * Fraction(10) ** int(power or 0) / below


def _float(number: Fraction) -> float | None:
    try:
        return float(number)
    except OverflowError:
        return None


def _plain_form(answer: str) -> _Form | None:
    """The form of an answer that needs no parser; None for the others."""
    if len(answer) > _LONGEST:
        return _Form("text", answer.strip(), answer)
    reading = read(answer)
    body, unit = reading.body, reading.unit
    number = _number(body)
    if number is not None:
        return _Form("number", number, body, _float(number), unit)
    choice = _CHOICE.fullmatch(body)
    if choice is not None:
        return _Form("text", choice[choice.lastindex or 0].lower(), body)
    return _text_form(body, unit) if _is_words(body) else None


def _is_words(body: str) -> bool:
    """Whether an answer is no mathematics: as LaTeX a word equals its anagrams.

    Three letters and more are a product only beside what multiplies, adds or groups them, as in
    `xyz+2` and `2abc`.
    """
    bare = _ENVIRONMENT.sub("", _TEXT.sub("", body))
    return _NOT_MATHEMATICS.search(bare) is not None or any(
        not _FACTOR_BEFORE.search(bare, max(0, word.start() - 2), word.start())
        and not _FACTOR_BEHIND.match(bare, word.end())
        for word in _WORD.finditer(bare)
    )


def is_text(answer: str) -> bool:
    """Whether an answer is compared as text, and not as mathematics."""
    form = _plain_form(answer)
    return form is not None and form.kind == "text"


def _text_form(body: str, unit: str) -> _Form:
    """Words: alike up to case and white space; formulas and short words keep their case."""
    text = _BASE.sub(r"\1_\2", _clock(_TEXT.sub(r" \1 ", body).rstrip(". ")))
    if text.casefold() == "no" or (len(text) > 2 and not re.search(r"[\\^_=]", text)):
        text = text.casefold()
    return _Form("text", re.sub(r"(?<=\W) | (?=\W)", "", " ".join(text.split())), body, None, unit)


def _clock(text: str) -> str:
    """A time of day in 24 hours, if it says which half of the day it means."""
    match = _TIME.fullmatch(text.strip())
    if match is None or not (match[2] or match[4]):
        return text
    hour = int(match[1])
    if match[4]:
        hour = hour % 12 + (12 if match[4] in "pP" else 0)
    return f"{hour}:{match[2] or '00'}{match[3] or ''}"


class MathEquivalence:
    r"""Mathematical equality by math-verify, in processes with hard limits.

    Numbers are equal if their exact values are (0.5 = 1/2 = 50\%, but 0.333 is not 1/3), words if
    they are spelled alike up to case, expressions if math-verify can show it. A bare number equals
    the same number with a unit; two units equal only each other. An answer joins the first class,
    in the order of the answers, whose first member it equals, in the unit of the first member that
    has one; the result depends on that order alone, except that a comparison that runs into the
    time limit is unknown. Nothing is judged twice. Not for several threads at once; the pool is.
    """

    def __init__(self, pool: VerifierPool | None = None) -> None:
        self.pool = VerifierPool(_JUDGE) if pool is None else pool
        self._unknown = 0
        self._form: dict[str, _Form] = {}
        self._verdict: dict[frozenset[_Form], bool | None] = {}
        self._strikes: Counter[_Form] = Counter()

    @property
    def unknown(self) -> int:
        return self._unknown

    def classes(self, answer_N: Sequence[str | None]) -> NDArray[np.int64]:
        form_of = self._parse([answer for answer in answer_N if answer is not None])
        self._strikes.clear()
        form_N = [None if answer is None else form_of[answer] for answer in answer_N]
        return _number_classes(form_N, self._find)

    def same(self, a: str, b: str) -> bool | None:
        form_of = self._parse([a, b])
        self._strikes.clear()
        verdict = self._compare(form_of[a], [form_of[b]])[0]
        self._unknown += verdict is None
        return verdict

    def close(self) -> None:
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, form: _Form, representatives: list[_Form]) -> int | None:
        """Ordinal of the first representative that equals the form."""
        for begin in range(0, len(representatives), self.pool.workers):
            verdicts = self._compare(form, representatives[begin : begin + self.pool.workers])
            found = verdicts.index(True) if True in verdicts else None
            self._unknown += verdicts[:found].count(None)
            if found is not None:
                found += begin
                if not representatives[found].unit:
                    representatives[found] = form if form.unit else representatives[found]
                return found
        return None

    def _parse(self, answers: list[str]) -> dict[str, _Form]:
        """The form of each answer, remembered."""
        distinct = dict.fromkeys(answers)
        form_of = {answer: self._form.get(answer) or _plain_form(answer) for answer in distinct}
        known = {answer: form for answer, form in form_of.items() if form is not None}
        hard = {answer: read(answer) for answer, form in form_of.items() if form is None}
        outcomes = self.pool.map("canonical", [(reading.body,) for reading in hard.values()])
        for (answer, reading), outcome in zip(hard.items(), outcomes, strict=True):
            known[answer] = _parsed_form(reading, outcome)
        for answer, form in known.items():
            _remember(self._form, answer, form)
        return known

    def _compare(self, form: _Form, others: list[_Form]) -> list[bool | None]:
        """Verdicts on the form against each other one, those that need a verifier at once."""
        verdicts = [_compare_forms(form, other) for other in others]
        asked = [
            other
            for other, verdict in zip(others, verdicts, strict=True)
            if verdict is None and self._can_be_judged(form, other)
        ]
        calls = [sorted((form.text, other.text)) for other in asked]
        for other, outcome in zip(asked, self.pool.map("equal", calls), strict=True):
            known = outcome.status is Status.DONE
            _remember(self._verdict, frozenset((form, other)), outcome.value if known else None)
            if not known:
                self._strikes.update((form, other))
        return [
            self._verdict.get(frozenset((form, other))) if verdict is None else verdict
            for other, verdict in zip(others, verdicts, strict=True)
        ]

    def _can_be_judged(self, a: _Form, b: _Form) -> bool:
        return (
            "unknown" not in (a.kind, b.kind)
            and frozenset((a, b)) not in self._verdict
            and max(self._strikes[a], self._strikes[b]) < _STRIKES
        )


def _parsed_form(reading: Reading, outcome: Outcome) -> _Form:
    body, unit = reading.body, reading.unit
    if outcome.status is not Status.DONE:
        return _Form("unknown", body, body, None, unit)
    if outcome.value is None:
        return _text_form(body, unit)
    kind, key, parts = outcome.value
    value = None if parts is None else complex(*parts)
    return _Form(kind, Fraction(key) if kind == "number" else key, body, value, unit)


def _compare_forms(a: _Form, b: _Form) -> bool | None:
    """The verdict where no verifier is needed, else None."""
    if a.unit and b.unit and a.unit != b.unit:
        return False
    if (a.kind, a.key) == (b.kind, b.key):
        return True
    kinds = {a.kind, b.kind}
    if "unknown" in kinds:
        return None
    if "text" in kinds or "expression" not in kinds:
        return False
    if a.value is None or b.value is None:
        return None
    return None if cmath.isclose(a.value, b.value, rel_tol=_CLOSE, abs_tol=_NOTHING) else False


def _remember(memory: dict[_T, _V], key: _T, value: _V) -> None:
    if key not in memory and len(memory) >= _MEMORY:
        del memory[next(iter(memory))]
    memory[key] = value


EQUIVALENCES: Mapping[str, Callable[[], Equivalence]] = {"exact": Exact, "math": MathEquivalence}
