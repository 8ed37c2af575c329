"""Leaves made by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyrl._core.tree import Forest
from pyrl.engine import STOPPED
from pyrl.leaves import Leaves
from pyrl.sources import Task


@dataclass(frozen=True)
class Question:
    index: int = 0
    text: str = "What is it?"
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] | None = None
    truth: Mapping[str, Any] = field(default_factory=dict)
    task: Task | None = None


def spell(rows: Sequence[np.ndarray]) -> list[str]:
    """A token is a character."""
    return ["".join(map(chr, row.tolist())) for row in rows]


def leaves_of(
    text_N: Sequence[str],
    *,
    group_N: Sequence[int] | None = None,
    groups: int | None = None,
    trunk_N: Sequence[int] | None = None,
    finish_N: Sequence[int] | None = None,
    weight_N: Sequence[float] | None = None,
    mass_N: Sequence[float] | None = None,
    confidence_N: Sequence[float] | None = None,
    limit: int = 0,
) -> Leaves:
    """One prompt, a trunk for each leaf, all stopped, unless told otherwise."""
    size = len(text_N)
    group = np.array([0] * size if group_N is None else group_N, np.int64)
    return Leaves(
        leaf_N=np.arange(size, dtype=np.int64),
        group_N=group,
        groups=int(group.max()) + 1 if groups is None else groups,
        trunk_N=np.array(range(size) if trunk_N is None else trunk_N, np.int64),
        weight_N=np.array([1.0] * size if weight_N is None else weight_N),
        log_mass_N=np.full(size, np.nan) if mass_N is None else np.log(mass_N),
        length_N=np.array([len(text) for text in text_N], np.int64),
        finish_N=np.array([STOPPED] * size if finish_N is None else finish_N, np.uint8),
        entropy_N=np.full(size, 0.5),
        confidence_N=np.array([0.9] * size if confidence_N is None else confidence_N),
        text_N=tuple(text_N),
        token_N=tuple(np.array([ord(c) for c in text], np.int32) for text in text_N),
        forest=Forest(),
        decode=spell,
        limit=limit,
    )
