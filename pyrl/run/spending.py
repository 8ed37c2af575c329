"""Spending: what all steps of a run may cost together, and how much of that is gone."""

from __future__ import annotations

from pyrl.report.step import StepObserver
from pyrl.run.config import Run
from pyrl.run.lock import RunError


class Spent(Exception):
    """The sampled step would exceed the run's tokens: it is dropped, and the run ends before it."""


def check_tokens(run: Run, before: int, step: int) -> None:
    """Spent if `step` tokens more than those `before` are too many; RunError in the first step."""
    if run.total_tokens is None or before + step <= run.total_tokens:
        return
    if not before:
        raise RunError(
            f"total_tokens: expected the tokens of one step at least, got {run.total_tokens:,}: "
            f"the first step samples {step:,}"
        )
    raise Spent


def has_total(run: Run) -> bool:
    """The run ends by what it spends; its steps are one more limit."""
    return (run.total_tokens, run.total_trained_tokens, run.total_seconds) != (None, None, None)


def all_spent(run: Run, so_far: StepObserver) -> bool:
    """No step begins any more after these trained tokens, or seconds."""
    trained, seconds = run.total_trained_tokens, run.total_seconds
    return (trained is not None and so_far.trained >= trained) or (
        seconds is not None and so_far.seconds >= seconds
    )


def share_spent(run: Run, so_far: StepObserver) -> float | None:
    """The share of its total that a run has spent, in [0, 1]; None if it has no total."""
    spent_of = (
        (so_far.tokens, run.total_tokens),
        (so_far.trained, run.total_trained_tokens),
        (so_far.seconds, run.total_seconds),
    )
    return max((min(1.0, spent / total) for spent, total in spent_of if total), default=None)
