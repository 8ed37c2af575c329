"""About: what a name stands for, from its docstring and its record: each fact has one place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from pyrl._core.tree import SignalSpec
from pyrl.algorithm import Algorithm
from pyrl.checks import one_of
from pyrl.leaves import needs_of
from pyrl.loss import Loss
from pyrl.methods.fields import (
    changes,
    fields,
    first_sentence,
    is_record,
    meaning,
    stages,
    with_owners,
)
from pyrl.methods.registry import KINDS, Entry, Registry
from pyrl.reward import TrueReward

PASS = "a pass of the learner over the samples (--old-logprobs auto or learner)"
REFERENCE = "the first model in memory, for the distance from it"
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class About:
    """What is known of a method or a choice."""

    entry: Entry
    text: str
    """Its docstring, without the source."""
    paper: str
    """The arXiv id of its source; empty if it names none."""
    parent: str
    """The name of what it is derived from: of the same kind; empty for none."""
    changes: tuple[tuple[str, str, str], ...]
    """(field, value in the parent, own value) of what differs."""
    options: tuple[tuple[str, str, str], ...]
    """Options of the command line, their defaults and what they are."""
    needs: tuple[str, ...]
    """What a run must have."""

    @property
    def first(self) -> str:
        """The first sentence of the text."""
        return first_sentence(self.text)


def about(entry: Entry, registry: Registry) -> About:
    """Make the choice and look at it. ValueError, ForeignError: as `Entry.make`."""
    kind, choice = entry.kind.name, entry.make()
    doc = inspect.getdoc(entry.factory) or ""
    module = inspect.getmodule(entry.factory)
    said = PAPER.search(doc) or PAPER.search((module and module.__doc__) or "")
    parent = parent_of(entry, registry)
    differs = _differs(registry.make(kind, parent), choice) if parent else ()
    return About(
        entry=entry,
        text=_without_source(doc),
        paper=said[1] if said else "",
        parent=parent,
        changes=tuple(change for change in differs if change[0]),  # not only the class
        options=tuple(_options(kind, choice)),
        needs=tuple(needs(choice)),
    )


def known(registry: Registry, kind: str) -> Iterator[tuple[Entry, About | None, str]]:
    """All names of a kind, parents before children, with what others' names failed with."""
    found: list[tuple[Entry, About | None, str]] = []
    for entry in registry.entries(kind):
        try:
            found.append((entry, about(entry, registry), ""))
        except ValueError as error:  # of others: the list shows it in their place
            found.append((entry, None, str(error)))
    yield from _families(found, "")


def named(name: str, registry: Registry) -> list[About]:
    """All that has this name. ValueError tells the nearest name."""
    entries = [entry for kind in KINDS for entry in registry.entries(kind)]
    one_of(name, dict.fromkeys(entry.name for entry in entries), "method or choice")
    return [about(entry, registry) for entry in entries if entry.name == name]


def parent_of(entry: Entry, registry: Registry) -> str:
    """The first function of the same kind that a function calls, or class that a class extends."""
    factory = entry.factory
    others = {
        other.source: other.name
        for other in registry.entries(entry.kind.name)
        if other.name != entry.name and isinstance(other.source, FunctionType | type)
    }
    if isinstance(factory, type):
        before: list[Any] = list(factory.__mro__[1:])
    elif isinstance(factory, FunctionType):
        called = [factory.__globals__.get(name) for name in factory.__code__.co_names]
        before = [one for one in called if isinstance(one, FunctionType)]
    else:
        before = []
    return next((others[one] for one in before if one in others), "")


def needs(choice: Any, updates: int = 1) -> Iterator[str]:
    """What a run must have for this choice, a phrase each.

    `updates`: how many share the samples of a step.
    """
    if isinstance(choice, Algorithm):
        if choice.replay.capacity:
            yield "responses of earlier steps, which checkpoints keep"
        updates = choice.updates_per_step
        yield f"{updates} update{'s' if updates > 1 else ''} a step (--updates-per-step)"
        trees = (choice.fork, choice.prune, choice.select)
        parts = (choice.reward, *trees, choice.advantage, choice.loss)
        yield from dict.fromkeys(phrase for part in parts for phrase in needs(part, updates))
    elif isinstance(choice, Loss):
        yield from _loss_needs(choice, updates)
    elif isinstance(choice, tuple):
        first = (phrase for stage in choice[:1] for phrase in needs(stage))
        rest = (phrase for stage in choice[1:] for phrase in _reads(stage))
        yield from dict.fromkeys((*first, *rest))
    elif isinstance(choice, TrueReward):
        yield "true answers in the data (--answer-column)"
    elif hasattr(choice, "lower") and choice.lower(SignalSpec()):
        yield "entropy and confidence of each token while it is sampled: every engine has them"
    else:
        if "advantage_T" in needs_of(choice) and not hasattr(choice, "after"):
            yield "a stage before it that reads rewards, such as grpo"
        yield from _reads(choice)


def _reads(choice: Any) -> Iterator[str]:
    """What a stage, a selection or a reward needs beside the samples."""
    if {"old_logprob_T", "prompt_logprob_T"} & {*needs_of(choice)}:
        yield PASS
    if "ref_logprob_T" in needs_of(choice):
        yield REFERENCE
    if hasattr(choice, "initial"):
        yield "what it remembers of earlier steps, which checkpoints keep"


def _differs(before: Any, after: Any) -> Iterator[tuple[str, str, str]]:
    """What differs; of a class that extends its parent's, in the fields that both have."""
    if type(before) is type(after) or not isinstance(after, type(before)):
        yield from changes(before, after)
        return
    new = dict(fields(after))
    for name, old in fields(before) if is_record(before) else ():
        yield from changes(old, new[name], f"{name}.")


def _loss_needs(loss: Loss, updates: int) -> Iterator[str]:
    names = sorted({need.name for need in loss.needs})
    if columns := [name for name in names if not name.startswith("state.")]:
        yield f"columns: {', '.join(columns)}"
    if states := [name.removeprefix("state.") for name in names if name.startswith("state.")]:
        yield f"of earlier steps: {', '.join(states)}"
    if loss.learner_needs or loss.follows_signs:
        yield PASS
    if loss.has_reference:
        yield REFERENCE
    if loss.expert is not None:
        option = "--loss.penalties.expert-leak.expert"
        yield f"a column {loss.expert.expert!r} of the data with an expert's responses ({option})"
    if loss.off_policy_parts and updates == 1:
        parts = " and ".join(dict.fromkeys(loss.off_policy_parts))
        yield f"2 or more updates a step for {parts} to act (--updates-per-step)"


def _options(kind: str, choice: Any) -> Iterator[tuple[str, str, str]]:
    prefix = "" if kind == "method" else f"{kind}."
    parts = [("", choice)]
    if kind == "advantage":
        parts = [*stages(choice if isinstance(choice, tuple) else (choice,))]
    for part, record in parts:
        for name, value, owner in with_owners(record, f"{prefix}{part}." if part else prefix):
            if value != ():  # choices that are left out are no option
                given = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                yield f"--{name.replace('_', '-')}", given, meaning(owner, name.split(".")[-1])


def _families(
    found: list[tuple[Entry, About | None, str]], parent: str
) -> Iterator[tuple[Entry, About | None, str]]:
    """Those with this parent, each before its own children."""
    for row in found:
        entry, known, _ = row
        if (known.parent if known else "") == parent:
            yield row
            if entry.name != parent:
                yield from _families(found, entry.name)


def _without_source(doc: str) -> str:
    """A docstring as one paragraph, without arXiv ids that stand in brackets by themselves."""
    words = " ".join(doc.split())
    for whole, rest in ((r" \({}\)", ""), (r"\({}; ", "("), (r"[;,] {}\)", ")")):
        words = re.sub(whole.format(PAPER.pattern), rest, words)
    return words
