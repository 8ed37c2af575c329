"""Completion: the words that may stand next on a command line, for bash, zsh and fish.

`pyrl --completion SHELL` prints a short script that asks `pyrl --complete WORDS...` at each Tab.
The answer comes from `words.json`, because reading the options of a method imports torch, which
takes seconds; `python tests/tabulate_words.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parent
SHELLS = ("bash", "zsh", "fish")
FIRST = ("--help", "--version", "--completion")
"""What may stand in the place of a command."""
METHODS = ("train", "plan", "compare")
"""Commands that take a method, or several, and the options of `train`."""


@dataclass(frozen=True)
class Words:
    """All words; those of a line of text are separated by spaces."""

    options: dict[str, str]
    """By command; of `train` those that every method has, and of others that take methods what
    they have beside these."""
    methods: dict[str, str]
    """By method its further options."""
    choices: dict[str, str]
    """By kind and name ("loss gspo") the options of a choice."""
    names: dict[str, str]
    """By kind ("method", "loss", ...) the names of the package, and those of the demo's methods."""
    plurals: dict[str, str]
    """By kind of choice the end of its group of entry points."""
    values: dict[str, str]
    """By option what it may be."""
    flags: str
    """Options without a value."""

    def named(self, kind: str) -> list[str]:
        """Names of a kind, also those of other installed packages."""
        names = self.names[kind].split()
        group = f"pyrl.{self.plurals.get(kind, 'methods')}"
        return names if kind == "demo" else [*names, *(p.name for p in entry_points(group=group))]

    def method_options(self, before: Sequence[str]) -> list[str]:
        """Options of `train`, by the first method and the choices that the words before name."""
        chosen = {
            option[2:]: name
            for option, name in pairwise(before)
            if option[2:] in self.plurals and option.startswith("--")
        }
        groups = tuple(f"--{kind}." for kind in chosen)
        method = before[0] if before else ""
        own = [o for o in self.methods.get(method, "").split() if not o.startswith(groups)]
        for kind, names in chosen.items():
            for name in names.split(","):
                own += self.choices.get(f"{kind} {name}", "").split()
        return [*self.options["train"].split(), *own]


def script(shell: str) -> str:
    """What one of these shells runs to complete."""
    return (FOLDER / f"pyrl.{shell}").read_text("utf-8")


def complete(typed: Sequence[str], commands: Iterable[str]) -> list[str]:
    """Words that may stand in the place of the last one typed, and begin as it does.

    None where it may be anything, such as a file. `typed`: what follows `pyrl`; a shell may give
    `--loss=gs` as one word or, as bash does, as three.
    """
    *before, word = typed or [""]
    if word == "=":
        word = ""
    before = [part for part in before if part != "="]
    option, equals, value = word.partition("=")
    if equals and option.startswith("--"):
        start = f"{option}="
        return [start + c for c in complete([*before, option, value], commands)]
    if not before:
        return [c for c in (*commands, *FIRST) if c.startswith(word)]
    known = Words(**json.loads((FOLDER / "words.json").read_text("utf-8")))
    listed, _, last = word.rpartition(",")  # of --advantage grpo,ear
    start = f"{listed}," if listed else ""
    return [start + c for c in _candidates(before, word, known) if c.startswith(last)]


def _candidates(before: Sequence[str], word: str, known: Words) -> list[str]:
    """What may follow the words before, whether or not it begins as the word does."""
    command, *rest = before
    last = rest[-1] if rest else command
    if command == "--completion":
        return list(SHELLS)
    if command not in known.options:
        return []
    if not word.startswith("-"):
        if last.startswith("--") and last not in known.flags.split():
            if last[2:] in known.plurals and command != "methods":
                return known.named(last[2:])
            return known.values.get(last, "").split()
        if command == "demo" and not rest:
            return known.named("demo")
        if command in METHODS and (not rest or (command == "compare" and "-" not in last[:1])):
            return known.named("method")
        if command == "methods":
            shown = [name for kind in known.names for name in known.named(kind)]
            return list(dict.fromkeys(shown)) if rest else ["show"]
        if command == "report":
            return []
    own = known.options[command].split()
    if command == "train":
        return known.method_options(rest)
    return [*own, *known.method_options(rest)] if command in METHODS else own
