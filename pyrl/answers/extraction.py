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
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![)\]])[-+\N{MINUS SIGN}])?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?"
)


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
    """The last integer, decimal or fraction, thousands separators removed: for plain-text tasks."""

    needs_end: ClassVar[bool] = True

    def __call__(self, text: str) -> str | None:
        number = None
        for match in _NUMBER.finditer(text):
            number = match.group()
        if number is None:
            return None
        return number.replace(",", "").replace("\N{MINUS SIGN}", "-").lstrip("+")


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
