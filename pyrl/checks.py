"""Checks of the numbers, names and parts that the choices of a method are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import numpy as np

ONE_SIDED = frozenset({"low", "high", "cap", "limit", "gamma", "mu"})
"""Fields that may be infinite: no bound on that side."""
SHARES = frozenset({"share", "max_share", "quantile"})
"""Fields in [0, 1]."""


def finite(record: object, *names: str) -> None:
    """ValueError unless these fields are finite numbers."""
    for name in names:
        value = vars(record)[name]
        if not np.isfinite(value):
            raise ValueError(f"{type(record).__name__}.{name}: expected a number, got {value}")


def at_least(least: int, record: object, *names: str) -> None:
    """ValueError unless these fields are numbers of at least `least`, or None."""
    for name in names:
        value = vars(record)[name]
        if value is not None and not value >= least:
            raise ValueError(f"{type(record).__name__}.{name}: expected >= {least}, got {value}")


def shares(record: object, *names: str) -> None:
    """ValueError unless these fields are in [0, 1]."""
    for name in names:
        value = vars(record)[name]
        if not 0 <= value <= 1:
            where = f"{type(record).__name__}.{name}"
            raise ValueError(f"{where}: expected a number in [0, 1], got {value}")


def ordered(record: object, low: float, high: float) -> None:
    """ValueError unless low <= high."""
    if not low <= high:
        raise ValueError(f"{type(record).__name__}: expected low <= high, got {low} and {high}")


@runtime_checkable
class Checked(Protocol):
    """A choice that reads a file."""

    def check(self) -> None:
        """ValueError names what cannot be used; asked before a run begins."""


def one_of(name: str, names: Iterable[str], kind: str) -> str:
    """The name; ValueError tells the nearest one unless it is among these names of a kind."""
    names = list(names)
    if name in names:
        return name
    near = get_close_matches(name, names, n=1, cutoff=0)[0]
    raise ValueError(
        f"there is no {kind} {name!r}; the nearest is {near!r} (of {', '.join(names)})"
    )


def described(value: object) -> str:
    """What an argument of a wrong type is, as messages name it."""
    if isinstance(value, np.ndarray):
        return f"a numpy array {value.dtype}{list(value.shape)}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    shown = repr(value)
    kind = "" if value is None or isinstance(value, str) else f"{type(value).__name__} "
    return kind + (shown if len(shown) <= 60 else f"{shown[:57]}...")


def check_axes(record: Any) -> None:
    """ValueError unless the record and those in it hold what their fields are declared to hold.

    Numbers are finite or bounds, shares in [0, 1], names among those that there are, and axes
    instances of their classes. Of axes from outside the package only the numbers are checked.
    """
    of_class: Any = type(record)
    for name, kinds in _kinds(of_class).items():
        value = vars(record)[name]
        where = f"{type(record).__name__}.{name}"
        for part in value if isinstance(value, tuple) else (value,):
            _check(where, name, part, kinds)
            if is_dataclass(part) and not isinstance(part, type):
                check_axes(part)


def _check(where: str, name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    if isinstance(value, float | int):
        if np.isnan(value) or (np.isinf(value) and name not in ONE_SIDED):
            raise ValueError(f"{where}: expected a number, got {value}")
        if name in SHARES and not 0 <= value <= 1:
            raise ValueError(f"{where}: expected a number in [0, 1], got {value}")
    names = [choice for kind in kinds for choice in get_args(kind)]
    if names and value not in names:
        raise ValueError(f"{where}: expected one of {', '.join(names)}, got {value!r}")
    protocols = [k for k in kinds if isinstance(k, type) and Protocol in k.__bases__]
    records: list[Any] = [kind for kind in kinds if is_dataclass(kind)]
    if not (protocols or records) or (value is None and NoneType in kinds):
        return
    own = protocols and callable(value) and not isinstance(value, type)
    if not (own or isinstance(value, tuple(records))):
        expected = ", ".join(kind.__name__ for kind in (*records, *protocols))
        raise ValueError(f"{where}: expected an instance of {expected}, got {value!r}")


@cache
def _kinds(record: Any) -> dict[str, tuple[Any, ...]]:
    """What each field, or each entry of a tuple, may be: classes, and Literals of names."""
    if not record.__module__.startswith("pyrl."):
        return {field.name: () for field in fields(record)}
    return {name: _members(hint) for name, hint in get_type_hints(record).items()}


def _members(hint: Any) -> tuple[Any, ...]:
    origin = get_origin(hint)
    if origin in (Union, UnionType, tuple):
        return tuple(kind for part in get_args(hint) if part is not ... for kind in _members(part))
    return (hint,) if origin is Literal or isinstance(hint, type) else ()
