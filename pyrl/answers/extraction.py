"""From the text of a response to its answer: the first step of a vote.

An extractor returns None where there is no answer, never the empty string. `needs_end` says that
a text cut off by the length limit holds no answer whatever is found in it: a truncated number
reads like a number. A closed box is complete wherever the text ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_THIN = "\u00a0\u2009\u202f"
"""Spaces that only separate thousands; a plain one may as well separate two numbers."""
_NUMBER = re.compile(
    r"(?<!\w)\d+(?:-\d+){2,}|\\(?:[dtc]?frac\s*\{[^{}]*\}|sqrt)\s*\{[^{}]*\}"
    r"|(?<![\w.^√])(?P<number>(?>(?:(?<![)\]}])[-+\N{MINUS SIGN}\N{EN DASH}])?"
    r"(?:\d+ \d+/\d+|"
    rf"(?:(?:\d{{1,3}}(?:[, {_THIN}]\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+|\s?\^\s?(?:\{[-+]?\d+\}|[-+]?\d+)|[⁺⁻]?[⁰¹²³⁴-⁹]+)?(?:/\d+)?)))"
    r"(?![.,:/]?\d|\^|(?!(?!pi\b)[A-Za-z]{2,}\b)\w)"
    r"|(?P<name>(?<!\w)[A-Za-z_]\w*+(?!\^))"
    r"|(?<!\w)√?\w*\d[\w.,:^/]*"
)
"""A number, or (without the group) what has digits and is none: part of it is no answer."""


class Extractor(Protocol):
    """Finds the answer in the text of one response, or returns None."""

    @property
    def needs_end(self) -> bool:
        """A text without its end of sequence has no answer."""

    def __call__(self, text: str) -> str | None: ...


@dataclass(frozen=True)
class Boxed:
    r"""The content of the last complete `\boxed{...}`, braces matched (arXiv:2504.16084).

    Of nested boxes the innermost; a box that is never closed does not count, one with nothing in
    it is no answer. One pass: time linear in the text.
    """

    needs_end: ClassVar[bool] = False

    def __call__(self, text: str) -> str | None:
        open_at: list[tuple[bool, int]] = []
        start = end = -1
        for match in _BRACES.finditer(text):
            token = match.group()
            if token == "{" or token.startswith(r"\boxed"):
                open_at.append((token != "{", match.end()))
            elif token == "}" and open_at:
                boxed, content = open_at.pop()
                if boxed and content > start:
                    start, end = content, match.start()
        return text[start:end].strip() or None if start >= 0 else None


@dataclass(frozen=True)
class Whole:
    """The whole text without surrounding white space."""

    needs_end: ClassVar[bool] = True

    def __call__(self, text: str) -> str | None:
        return text.strip() or None


@dataclass(frozen=True)
class LastNumber:
    """The last number of a text, for plain-text tasks: whole, or no answer.

    Integers, decimals, fractions, mixed numbers, and powers such as 1.5e3 and 10^3; separators of
    thousands are removed. Where the last digits belong to something else (12:30, 2x, a date, two
    numbers side by side that may be one) there is no answer.
    """

    needs_end: ClassVar[bool] = True

    def __call__(self, text: str) -> str | None:
        last = None
        for match in _NUMBER.finditer(text):
            if not match["name"]:
                last = match
        if last is None or not last["number"]:
            return None
        number = re.sub(rf"[,{_THIN}]| (?=0\d\d)", "", last["number"])
        if re.search(r"\d \d{3}(?!/)", number):
            return None
        return re.sub("[\N{MINUS SIGN}\N{EN DASH}]", "-", number).lstrip("+")


@dataclass(frozen=True)
class After:
    """What another extractor reads behind the last `tag`; without the tag there is no answer.

    For models that reason first: a box inside reasoning that never ended is no answer.
    """

    tag: str
    extractor: Extractor

    @property
    def needs_end(self) -> bool:
        return self.extractor.needs_end

    def __call__(self, text: str) -> str | None:
        _, tag, answer = text.rpartition(self.tag)
        return self.extractor(answer) if tag else None


@dataclass(frozen=True)
class Until:
    """The answer that another extractor finds before the first place of a text, or in all of it.

    A response ends with the text that stopped it, which is no part of a whole answer.
    """

    text: str
    extractor: Extractor

    @property
    def needs_end(self) -> bool:
        return self.extractor.needs_end

    def __call__(self, text: str) -> str | None:
        return self.extractor(text.partition(self.text)[0])


@dataclass(frozen=True)
class Pattern:
    """The first group of the last match of a regular expression of Python; dot matches newline."""

    regex: str
    needs_end: bool = True
    """Set to False for a pattern that only a complete answer can match."""

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.regex, re.DOTALL).groups
        except re.error as error:
            raise ValueError(f"regex: {self.regex!r} does not compile: {error}") from error
        if groups < 1:
            raise ValueError(f"regex: expected a group (...) for the answer, got {self.regex!r}")

    def __call__(self, text: str) -> str | None:
        answer = None
        for match in re.finditer(self.regex, text, re.DOTALL):
            answer = match.group(1)
        return (answer or "").strip() or None


EXTRACTORS: Mapping[str, Extractor] = {
    "boxed": Boxed(),
    "whole": Whole(),
    "number": LastNumber(),
}


def extractor_named(name: str) -> Extractor:
    """Look up a configured extractor: a key of EXTRACTORS, or "regex:" and a pattern.

    Raises ValueError for any other name and for a pattern without a group.
    """
    if name.startswith("regex:"):
        return Pattern(name.removeprefix("regex:"))
    if name not in EXTRACTORS:
        known = ", ".join([*EXTRACTORS, "regex:PATTERN"])
        raise ValueError(f"extractor: expected one of {known}, got {name!r}")
    return EXTRACTORS[name]
