"""Thinning: a run of any length as curves of a bounded number of points."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pyrl.report.metrics import Row, step_of

Curve = dict[str, list[float]]
"""Steps `s` and values `v`; where points stand for several steps, also their `lo` and `hi`."""


def curves(rows: Sequence[Row], points: int) -> dict[str, Curve]:
    """The curve of each metric that is a number anywhere, of at most `points` points.

    Neighbouring rows share a point where there are more: the mean of those that have the metric, at
    the step of the last of them, between their smallest value and their largest one.
    """
    size = max(1, -(-len(rows) // points))
    parts = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    found = {name: _curve(parts, name, whole=size == 1) for name in names}
    return {name: curve for name, curve in found.items() if curve["s"]}


def _curve(parts: Sequence[Sequence[Row]], name: str, *, whole: bool) -> Curve:
    curve: Curve = {"s": [], "v": []} if whole else {"s": [], "v": [], "lo": [], "hi": []}
    for part in parts:
        seen = [
            (step_of(row), value)
            for row in part
            if isinstance(value := row.get(name), int | float) and not isinstance(value, bool)
        ]
        if not seen:
            continue
        values = [float(value) for _, value in seen]
        curve["s"].append(seen[-1][0])
        curve["v"].append(digits(fmean(values)))
        if not whole:
            curve["lo"].append(digits(min(values)))
            curve["hi"].append(digits(max(values)))
    return curve


def digits(value: float, count: int = 6) -> float:
    """The number with so many significant digits, a whole one without a point."""
    short = float(f"{value:.{count}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
