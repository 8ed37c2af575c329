"""Resume: what a checkpoint remembers of a run beside weights, optimizer and sketches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pyrl.loss.old_policy import Memory
from pyrl.report import Completion, Evaluation
from pyrl.report.step import StepObserver, Unlogged
from pyrl.run.evaluation import Evaluations


def record_of(
    observer: StepObserver, evaluations: Evaluations, memory: Memory, unlogged: Unlogged | None
) -> dict[str, Any]:
    """The record of the last finished step, as JSON has it; `unlogged` is not yet in the log."""
    return observer.state_dict() | {
        "loss": memory.state_dict(),
        "evaluations": [asdict(evaluation) for evaluation in evaluations.taken],
        "unlogged": asdict(unlogged) if unlogged else None,
    }


def restore(
    record: Mapping[str, Any], observer: StepObserver, evaluations: Evaluations, memory: Memory
) -> Unlogged | None:
    """Take over a record; what its step still has to log."""
    observer.load_state_dict(record)
    memory.load_state_dict(record["loss"])
    evaluations.taken = [Evaluation(**row) for row in record["evaluations"]]
    if (row := record["unlogged"]) is None:
        return None
    completions = tuple(Completion(**text) for text in row["completions"])
    return Unlogged(row["metrics"], completions)
