"""Resume: what a checkpoint remembers of a run beside weights, optimizer and sketches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pyrl.learner.schedule import learning_rate
from pyrl.loss.old_policy import Memory
from pyrl.prompts import Prompt, repeating_steps
from pyrl.report import Completion, Evaluation
from pyrl.report.step import StepObserver, Unlogged
from pyrl.run import log
from pyrl.run.checkpoint import Checkpoint
from pyrl.run.config import Run
from pyrl.run.evaluation import Evaluations
from pyrl.run.spending import has_total
from pyrl.run.states import States


def record_of(
    run: Run,
    step: int,
    observer: StepObserver,
    evaluations: Evaluations,
    memory: Memory,
    states: States,
    unlogged: Unlogged | None,
    base: int | None,
    remote: str | None,
) -> dict[str, Any]:
    """The record of the last finished step, as JSON has it; `unlogged` is not yet in the log.

    `base`: the digest of the frozen weights below an adapter. `remote`: where a server has the
    weights and the optimizer.
    """
    return observer.state_dict() | {
        "loss": memory.state_dict(),
        "states": states.state_dict(),
        "evaluations": [evaluation.record() for evaluation in evaluations.taken],
        "unlogged": asdict(unlogged) if unlogged else None,
        "steps": run.steps,
        "base": base,
        "remote": remote,
        "log": log.digests(run.output, step + (unlogged is None)),
    }


def restore(
    record: Mapping[str, Any], observer: StepObserver, evaluations: Evaluations
) -> Unlogged | None:
    """Take over a record; what its step still has to log."""
    observer.load_state_dict(record)
    evaluations.taken = [Evaluation(**row) for row in record["evaluations"]]
    if (row := record["unlogged"]) is None:
        return None
    completions = tuple(Completion(**text) for text in row["completions"])
    return Unlogged(row["metrics"], completions)


def first_words(
    run: Run,
    start: Checkpoint | None,
    prompts: Sequence[Prompt],
    evaluations: Evaluations,
    idle: Sequence[str],
) -> Iterator[str]:
    """What a person should know before the run begins or goes on, a sentence each.

    `idle`: fields of the loss that can do nothing.
    """
    if idle:
        yield (
            f"{' and '.join(idle)} can never act: one update takes all samples of a step, so "
            f"that the policy that learns is the one that sampled. --updates-per-step 2 or "
            f"more lets it move away."
        )
    repeating = repeating_steps(prompts, run.steps, run.prompts_per_step, run.seed)
    if repeating:
        yield (
            f"In {repeating} of {run.steps} steps a question comes more than once, each time with "
            f"a vote of its own: {run.data} has {len(prompts)} questions, --prompts-per-step is "
            f"{run.prompts_per_step}."
        )
    if evaluations.sets and not any(map(evaluations.asked, evaluations.sets)):
        yield (
            "There is no evaluation: one question would cost more than a tenth of what training "
            "samples; --eval-limit N scores N questions of each set."
        )
    if start is None:
        return
    for name in log.lost(run.output, start.record["log"]):
        yield f"{run.output / name} is gone: the log goes on without the rows of finished steps."
    before = start.record["steps"]
    was, rate = (learning_rate(replace(run, steps=n), start.step) for n in (before, run.steps))
    if rate != was and start.step < run.steps and not has_total(run):
        yield (
            f"Resumed with --steps {run.steps} in the place of {before}: the schedule "
            f"{run.schedule!r} spreads over all steps, so that step {start.step + 1} has the "
            f"learning rate {rate:.3g} where {was:.3g} would have been next."
        )
