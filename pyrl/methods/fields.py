"""Fields: the choices of a method, which are records in records, as dotted names and values."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Any


def is_record(value: object) -> bool:
    """Whether it is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def has_stages(value: object) -> bool:
    """Whether it is a tuple of records."""
    return isinstance(value, tuple) and value != () and all(map(is_record, value))


def stages(records: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Names for the records of a tuple: their class, and a number from the second of a kind."""
    seen: Counter[str] = Counter()
    for record in records:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(record).__name__).lower()
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name}_{seen[name]}"), record


def fields(record: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a record is made from."""
    for field in dataclasses.fields(record):
        if field.init:
            yield field.name, vars(record)[field.name]


def leaves(record: Any, prefix: str = "", without: Collection[str] = ()) -> Iterator[Any]:
    """(dotted name, value) of all numbers, names and the like in a record and in those below."""
    for name, value, _ in with_owners(record, prefix, without):
        yield name, value


def with_owners(
    record: Any, prefix: str = "", without: Collection[str] = ()
) -> Iterator[tuple[str, Any, type]]:
    """The same with the class of the record that each is a field of."""
    for field, value in fields(record):
        name = prefix + field
        if field in without:
            continue
        if is_record(value):
            yield from with_owners(value, f"{name}.")
        elif has_stages(value):
            for stage_name, stage in stages(value):
                yield from with_owners(stage, f"{name}.{stage_name}.")
        else:
            yield name, value, type(record)


def meaning(of: type, field: str) -> str:
    """The first sentence below a field of a dataclass; empty where there is none to be read."""
    return next((texts[field] for base in of.__mro__ if field in (texts := _texts(base))), "")


@cache
def _texts(of: type) -> dict[str, str]:
    """The first sentence below each field that a class declares."""
    try:
        (node,) = ast.parse(dedent(inspect.getsource(of))).body
    except (OSError, TypeError):  # a class whose source is no file
        return {}
    assert isinstance(node, ast.ClassDef)
    return {
        ast.unparse(field.target): first_sentence(" ".join(str(text.value.value).split()))
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def first_sentence(text: str) -> str:
    """Up to the first full stop before a space."""
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def classes(record: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, class) of all records below a record."""
    for field, value in fields(record):
        name = prefix + field
        for part, below in stages(value) if has_stages(value) else [("", value)]:
            if is_record(below):
                dotted = f"{name}.{part}" if part else name
                yield dotted, class_name(type(below))
                yield from classes(below, f"{dotted}.")


def class_name(of: type) -> str:
    """A class of the package by its name, another one with its module."""
    inside = of.__module__.startswith("pyrl.")
    return of.__qualname__ if inside else f"{of.__module__}.{of.__qualname__}"


def shown(value: Any) -> str:
    """A choice as a person would write it: without the fields that have their defaults."""
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})" if value else "none"
    if not is_record(value):
        return "none" if value is None else str(value)
    own = [
        f"{field.name}={shown(vars(value)[field.name])}"
        for field in dataclasses.fields(value)
        if field.init and vars(value)[field.name] != _default(field)
    ]
    return type(value).__name__ + (f"({', '.join(own)})" if own else "")


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; a sentinel where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def changes(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, before, after) of what differs between two choices."""
    if not (is_record(before) and type(before) is type(after)):
        if before != after:
            yield prefix.rstrip("."), shown(before), shown(after)
        return
    old = dict(fields(before))
    for name, value in fields(after):
        yield from changes(old[name], value, f"{prefix}{name}.")
