"""History: what the log of a run tells of its course: curves, cost, and the step of a collapse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyrl.report import read_metrics
from pyrl.report.metrics import Row, step_of

CURVES = {
    "label accuracy": "vote/label_accuracy",
    "reward accuracy": "vote/reward_accuracy",
    "right samples": "vote/ground_truth_reward",
    "distinct labels": "vote/distinct_labels",
    "vote share": "vote/majority_ratio",
    "entropy": "entropy",
    "length": "completions/mean_length",
}
"""By step; those that need true answers are absent where there are none."""

COLLAPSES = "right samples (without true answers: distinct labels)"

TIMES = {"wall seconds": "step_time", "processor seconds": "cpu_time"}

WINDOW = 5
"""Steps of the running mean by which a collapse is told from noise."""


def history(path: Path) -> dict[str, Any]:
    """Steps, sampled tokens after each, curves and tokens of a run, from its metrics.jsonl.

    "computed tokens" are those that the learner's passes read, a shared beginning once; "trained
    tokens" those of responses that had an advantage other than zero.
    """
    rows = [row for row in read_metrics(path) if step_of(row) > 0]
    curves = {label: _numbers(rows, name) for label, name in CURVES.items()}
    unique = np.array(_numbers(rows, "pack/unique", 0.0))
    again = np.array(_numbers(rows, "pack/repeated", 0.0))
    sampled = [int(tokens) for tokens in _numbers(rows, "num_tokens", 0.0)]
    return {
        "steps": len(rows),
        "sampled tokens": sampled[-1] if sampled else 0,
        "computed tokens": round(float((unique * (1 + again)).sum())),
        "trained tokens": round(sum(_numbers(rows, "pack/trained", 0.0))),
        "collapse step": collapse(curves["right samples"] or curves["distinct labels"]),
        "tokens by step": sampled,
        "curves": {label: values for label, values in curves.items() if values},
    }


def times(path: Path) -> dict[str, float]:
    """Seconds of all steps of a run, and the processor's."""
    rows = read_metrics(path)
    return {label: round(sum(_numbers(rows, name, 0.0)), 1) for label, name in TIMES.items()}


def collapse(values: Sequence[float]) -> int | None:
    """The first step from which on the running mean stays below half of the best before it.

    `values`: what collapses, by step: right samples, or distinct labels where nobody knows which
    are right. None: it does not. arXiv:2603.08660 compares methods by this step.
    """
    if len(values) < 2 * WINDOW:
        return None
    mean = np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")
    low = mean < np.maximum.accumulate(mean) / 2
    if not low[-1]:
        return None
    return len(low) - int(np.argmin(low[::-1])) + WINDOW


def _numbers(rows: Sequence[Row], name: str, missing: float | None = None) -> list[float]:
    """The values of all rows; none if a row has none, unless `missing` takes its place."""
    values = [v if isinstance(v := row.get(name), int | float) else missing for row in rows]
    return [] if None in values else [float(v) for v in values if v is not None]
