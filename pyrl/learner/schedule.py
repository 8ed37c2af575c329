"""Schedule: the learning rate of a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyrl.run.config import Run


def learning_rate(run: Run, step: int, spent: float | None = None) -> float:
    """The rate of a step (from 0): a linear warm-up, then the schedule down to its end.

    `spent`: the share of its total that a run has spent, and with it the place in the schedule;
    None: the steps after the warm-up say it.
    """
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    done = (step - run.warmup_steps) / max(1, run.steps - run.warmup_steps)
    done = done if spent is None else spent
    rest = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    end = 1.0 if run.schedule == "constant" else run.min_learning_rate
    return run.learning_rate * (end + (1 - end) * rest[run.schedule])
