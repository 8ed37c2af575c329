"""What the tests of a run's report tell it, and read from it."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def history(steps: int, **metrics: Any) -> list[dict[str, Any]]:
    """Rows 1..steps; a metric is a number or a function of the step; `__` stands for `/`."""
    return [
        {"step": step}
        | {
            name.replace("__", "/"): value(step) if callable(value) else value
            for name, value in metrics.items()
        }
        for step in range(1, steps + 1)
    ]
