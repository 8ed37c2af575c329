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

from pyrl.answers.pool import Outcome, Status, VerifierPool

_T = TypeVar("_T")
_V = TypeVar("_V")

_JUDGE = Path(__file__).with_name("math_judge.py")
_LONGEST = 512
"""Characters; a longer answer is compared as text."""
_STRIKES = 4
"""Unknown comparisons after which an answer is not sent to a verifier again for this prompt."""
_CLOSE = 1e-5
"""How near two values are the same; math-verify compares numbers to six decimals."""
_MEMORY = 1_000_000
"""Remembered answers and verdicts, each; the oldest are forgotten first."""

_DECIMAL = r"(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?"
_NUMBER = re.compile(rf"\\?\$?([-+]?){_DECIMAL}(?:/(\d+))?(\s*\\?%)?\$?")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;: !]|~|\{,\})(?=\d{3}(?!\d))")
_FULL_STOP = re.compile(r"(?<=[\w\]})%$])\.$")
_WORD = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]{3,}|^[A-Za-z]{2,}$|:"
    r"|\d(?:\s|\\[,;: !]|~)+\d|\d_\d"
    r"|^\d+(?P<dash>[-/])\d+(?P=dash)\d+$|^\d{3,}-\d{4}$"
)
r"""Not mathematics: a word (as LaTeX a product of letters, equal to its anagrams), a time, numbers
side by side (as LaTeX a sum, or a product), a date or a telephone number (as LaTeX differences).
`\sqrt` and the like are commands, not words."""
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}\\]*)\}")


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


def _number(answer: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction or percentage in plain notation."""
    fraction = _FRACTION.fullmatch(answer)
    match = _NUMBER.fullmatch(fraction.expand(r"\1\2/\3") if fraction else answer)
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, decimals, below, percent = match.groups()
    below = int(below or 1) * (100 if percent else 1)
    if below == 0:
        return None
    return Fraction(f"{sign}{(whole or '0').replace(',', '')}{decimals or ''}") / below


def _float(number: Fraction) -> float | None:
    try:
        return float(number)
    except OverflowError:
        return None


def _tidy(answer: str) -> str:
    """Without what separates thousands, and without a full stop behind it."""
    return _FULL_STOP.sub("", _THOUSANDS.sub("", answer.strip()))


def _plain_form(answer: str) -> _Form | None:
    """The form of a tidy answer that needs no parser; None for the others."""
    if len(answer) > _LONGEST:
        return _Form("text", answer, answer)
    number = _number(answer)
    if number is not None:
        return _Form("number", number, answer, _float(number))
    text = _TEXT.sub(r"\1", answer) if _TEXT.fullmatch(answer) else answer
    if _WORD.search(_TEXT.sub("", text)):
        return _Form("text", " ".join(text.casefold().rstrip(".").split()), answer)
    return None


class MathEquivalence:
    r"""Mathematical equality by math-verify, in processes with hard limits.

    Numbers are equal if their exact values are (0.5 = 1/2 = 50\%, but 0.333 is not 1/3), words if
    they are spelled alike up to case, expressions if math-verify can show it. An answer joins the
    first class, in the order of the answers, whose first member it equals; the result depends on
    that order alone, except that a comparison that runs into the time limit is unknown. Nothing
    is judged twice. Not for several threads at once; the pool is.
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
                return begin + found
        return None

    def _parse(self, answers: list[str]) -> dict[str, _Form]:
        """The form of each answer, remembered."""
        distinct = dict.fromkeys(answers)
        form_of = {a: self._form.get(a) or _plain_form(_tidy(a)) for a in distinct}
        hard = [answer for answer, form in form_of.items() if form is None]
        outcomes = self.pool.map("canonical", [(_tidy(answer),) for answer in hard])
        known = {answer: form for answer, form in form_of.items() if form is not None}
        for answer, outcome in zip(hard, outcomes, strict=True):
            known[answer] = _parsed_form(_tidy(answer), outcome)
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


def _parsed_form(answer: str, outcome: Outcome) -> _Form:
    if outcome.status is not Status.DONE:
        return _Form("unknown", answer, answer)
    if outcome.value is None:
        return _Form("text", " ".join(answer.split()), answer)
    kind, key, parts = outcome.value
    value = None if parts is None else complex(*parts)
    return _Form(kind, Fraction(key) if kind == "number" else key, answer, value)


def _compare_forms(a: _Form, b: _Form) -> bool | None:
    """The verdict where no verifier is needed, else None."""
    if a == b:
        return True
    kinds = {a.kind, b.kind}
    if "unknown" in kinds:
        return None
    if "text" in kinds or "expression" not in kinds:
        return False
    if a.value is None or b.value is None:
        return None
    return None if cmath.isclose(a.value, b.value, rel_tol=_CLOSE, abs_tol=_CLOSE) else False


def _remember(memory: dict[_T, _V], key: _T, value: _V) -> None:
    if key not in memory and len(memory) >= _MEMORY:
        del memory[next(iter(memory))]
    memory[key] = value


EQUIVALENCES: Mapping[str, Callable[[], Equivalence]] = {"exact": Exact, "math": MathEquivalence}
