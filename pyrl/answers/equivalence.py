r"""When two answers are the same: one relation for the vote and for the reward.

With two relations (a string for the vote, a grader for the reward, as in the code of
arXiv:2504.16084) an answer that did not vote for the label can still be rewarded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pyrl.answers.pool import Status, VerifierPool

_JUDGE = Path(__file__).with_name("math_judge.py")
_LONGEST = 512
"""Characters; a longer answer is compared as text."""
_STRIKES = 4
"""Unknown comparisons after which an answer is not sent to a verifier again for this prompt."""
_MEMORY = 1_000_000
"""Remembered answers and verdicts, each; the oldest are forgotten first."""

_DECIMAL = r"(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?"
_NUMBER = re.compile(rf"\\?\$?([-+]?){_DECIMAL}(?:/(\d+))?(\\?%)?\$?")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|^[A-Za-z]{2,}$|:|\d\s+\d")
r"""Not mathematics: a word (as LaTeX a product of letters, equal to its anagrams), a time, or
numbers side by side (as LaTeX a sum). `\sqrt` and the like are commands, not words."""
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
    answer_N: Sequence[str | None], find: Callable[[str, list[str]], int | None]
) -> NDArray[np.int64]:
    """Give each answer the class of the representative (first member) that `find` picks."""
    representatives: list[str] = []
    class_of: dict[str | None, int] = {None: -1}
    for answer in answer_N:
        if answer is None or answer in class_of:
            continue
        found = find(answer, representatives)
        class_of[answer] = len(representatives) if found is None else found
        if found is None:
            representatives.append(answer)
    return np.array([class_of[answer] for answer in answer_N], np.int64)


@dataclass(frozen=True)
class Exact:
    """Equal strings, up to white space at both ends."""

    unknown: int = 0

    def classes(self, answer_N: Sequence[str | None]) -> NDArray[np.int64]:
        stripped_N = [None if answer is None else answer.strip() for answer in answer_N]
        return _number_classes(stripped_N, lambda answer, others: None)

    def same(self, a: str, b: str) -> bool:
        return a.strip() == b.strip()

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class _Form:
    """What an answer is, once: numbers and texts are compared here, expressions by a verifier."""

    kind: str
    """"number", "text", "expression", or "unknown": equal to itself only."""
    key: str | Fraction


def _number(answer: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction or percentage in plain notation."""
    match = _NUMBER.fullmatch(answer)
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, decimals, below, percent = match.groups()
    below = int(below or 1) * (100 if percent else 1)
    if below == 0:
        return None
    return Fraction(f"{sign}{(whole or '0').replace(',', '')}{decimals or ''}") / below


def _plain_form(answer: str) -> _Form | None:
    """The form of an answer that needs no parser; None for the others."""
    answer = answer.strip()
    if len(answer) > _LONGEST:
        return _Form("text", answer)
    number = _number(answer)
    if number is not None:
        return _Form("number", number)
    text = _TEXT.sub(r"\1", answer) if _TEXT.fullmatch(answer) else answer
    if _WORD.search(_TEXT.sub("", text)):
        return _Form("text", " ".join(text.casefold().rstrip(".").split()))
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
        self._verdict: dict[tuple[str, str], bool | None] = {}
        self._strikes: Counter[str] = Counter()

    @property
    def unknown(self) -> int:
        return self._unknown

    def classes(self, answer_N: Sequence[str | None]) -> NDArray[np.int64]:
        self._strikes.clear()
        self._parse([answer for answer in answer_N if answer is not None])
        return _number_classes(answer_N, self._find)

    def same(self, a: str, b: str) -> bool | None:
        self._strikes.clear()
        self._parse([a, b])
        return self._compare(a, [b])[0]

    def close(self) -> None:
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, answer: str, representatives: list[str]) -> int | None:
        """Ordinal of the first representative that equals the answer."""
        others = iter(enumerate(representatives))
        while chunk := list(islice(others, self.pool.workers)):
            verdicts = self._compare(answer, [other for _, other in chunk])
            for (ordinal, _), verdict in zip(chunk, verdicts, strict=True):
                if verdict:
                    return ordinal
        return None

    def _parse(self, answers: list[str]) -> None:
        """Remember the form of each new answer."""
        hard = []
        for answer in dict.fromkeys(answers):
            if answer not in self._form:
                form = _plain_form(answer)
                if form is None:
                    hard.append(answer)
                else:
                    _remember(self._form, answer, form)
        outcomes = self.pool.map("canonical", [(answer.strip(),) for answer in hard])
        for answer, outcome in zip(hard, outcomes, strict=True):
            if outcome.status is not Status.DONE:
                form = _Form("unknown", answer.strip())
            elif outcome.value is None:
                form = _Form("text", " ".join(answer.split()))
            else:
                kind, key = outcome.value
                form = _Form(kind, Fraction(key) if kind == "number" else key)
            _remember(self._form, answer, form)

    def _compare(self, answer: str, others: list[str]) -> list[bool | None]:
        """Verdicts on the answer against each other one, those that need a verifier at once."""
        verdicts = [self._compare_forms(answer, other) for other in others]
        open_calls = {
            _pair(answer, other): None
            for other, verdict in zip(others, verdicts, strict=True)
            if verdict is None and self._can_be_judged(answer, other)
        }
        outcomes = self.pool.map("equal", open_calls)
        for pair, outcome in zip(open_calls, outcomes, strict=True):
            known = outcome.status is Status.DONE
            _remember(self._verdict, pair, outcome.value if known else None)
            if not known:
                self._strikes.update(pair)
        verdicts = [
            self._verdict.get(_pair(answer, other)) if verdict is None else verdict
            for other, verdict in zip(others, verdicts, strict=True)
        ]
        self._unknown += verdicts.count(None)
        return verdicts

    def _compare_forms(self, a: str, b: str) -> bool | None:
        """The verdict where no verifier is needed, else None."""
        left, right = self._form[a], self._form[b]
        if left == right:
            return True
        kinds = {left.kind, right.kind}
        if "unknown" in kinds:
            return None
        return None if "expression" in kinds and "text" not in kinds else False

    def _can_be_judged(self, a: str, b: str) -> bool:
        return (
            "unknown" not in (self._form[a].kind, self._form[b].kind)
            and _pair(a, b) not in self._verdict
            and max(self._strikes[a], self._strikes[b]) < _STRIKES
        )


def _pair(a: str, b: str) -> tuple[str, str]:
    a, b = a.strip(), b.strip()
    return (a, b) if a <= b else (b, a)


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= _MEMORY:
        del memory[next(iter(memory))]
    memory[key] = value


EQUIVALENCES: Mapping[str, Callable[[], Equivalence]] = {"exact": Exact, "math": MathEquivalence}
