"""Spending: what all steps of a run may cost together, and how much of that is gone."""

from __future__ import annotations

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


def out_of_time(run: Run, seconds: float) -> bool:
    """No step begins any more after these seconds of training."""
    return run.total_seconds is not None and seconds >= run.total_seconds


def share_spent(run: Run, tokens: int, seconds: float) -> float | None:
    """The share of its total that a run has spent, in [0, 1]; None if it has no total."""
    shares = [] if run.total_tokens is None else [tokens / run.total_tokens]
    if run.total_seconds is not None:
        shares.append(min(1.0, seconds / run.total_seconds))
    return max(shares, default=None)
