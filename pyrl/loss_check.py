"""Checks of the numbers that an axis of a loss is made of."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

ONE_SIDED = frozenset({"low", "high", "cap", "limit", "gamma", "mu"})
"""Fields that may be infinite: no bound on that side."""


def finite(record: object, *names: str) -> None:
    """ValueError unless these fields are finite numbers."""
    for name in names:
        value = vars(record)[name]
        if not np.isfinite(value):
            raise ValueError(f"{type(record).__name__}.{name}: expected a number, got {value}")


def finite_axes(record: Any) -> None:
    """ValueError unless all numbers of the record and of the records in it are finite or bounds."""
    for field in fields(record):
        value = vars(record)[field.name]
        if isinstance(value, float) and not (field.name in ONE_SIDED and not np.isnan(value)):
            finite(record, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part) and not isinstance(part, type):
                finite_axes(part)


def ordered(record: object, low: float, high: float) -> None:
    """ValueError unless low <= high."""
    if not low <= high:
        raise ValueError(f"{type(record).__name__}: expected low <= high, got {low} and {high}")
