"""The untrained model: what every gain is measured from, and what it says by more votes alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyrl.compare.contestants import Comparison
from pyrl.report import Progress
from pyrl.report.question_scores import (
    QuestionScore,
    read_question_scores,
    save_question_scores,
)
from pyrl.run.evaluation import SCORES
from pyrl.train import Trainer

HELD_OUT = "held-out questions"


def eval_sets(comparison: Comparison) -> dict[str, str]:
    """Sources of questions beside the trained ones, by the names of their sets."""
    source = comparison.methods[0].run.eval_data
    return {HELD_OUT: source} if source else {}


def before(comparison: Comparison, seed: int) -> dict[str, list[QuestionScore]]:
    """How the model of a seed answers before training, by sets; none without true answers."""
    return read_question_scores(before_path(comparison, seed))


def score_before(comparison: Comparison, seed: int, progress: Progress) -> None:
    """Score the model that all runs of a seed begin with."""
    path = before_path(comparison, seed)
    with _untrained(comparison, path.parents[1], seed, progress) as trainer:
        trainer.evaluations.score("before", 0)
    if not path.exists():
        save_question_scores(path, {})  # no question has a true answer


def more_votes(comparison: Comparison, spent: int, progress: Progress) -> dict[str, Any]:
    """The untrained model at each temperature, and its vote for the tokens of a whole run.

    `spent`: tokens that a run samples in training. Each training question gets its share of them;
    held-out ones get as many votes. The metrics by set and temperature.
    """
    path = comparison.settings.output / "untrained" / "more-votes.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if found["spent"] == spent:
            return found
    how = comparison.scoring
    lengths = [score.length for of in before(comparison, 0).values() for score in of]
    rows: list[dict[str, Any]] = []
    votes = how.samples
    with _untrained(comparison, path.with_suffix(""), 0, progress) as trainer:
        if lengths:
            share = spent / len(trainer.prompts) / float(np.mean(lengths))
            votes = max(votes, round(share))
        for temperature in sorted({*comparison.settings.temperatures, how.temperature}):
            own = replace(how, temperature=temperature)
            if temperature == how.temperature:
                own = replace(own, votes=votes)
            for name in trainer.evaluations.sets:
                if prompts := trainer.evaluations.asked(name):
                    progress.phase(f"evaluating {name} at T={temperature:g}")
                    score = trainer.evaluations.evaluator(name, "before", prompts, own)
                    metrics = {k.partition("/")[0]: v for k, v in score.metrics.items()}
                    rows.append({"set": name, "temperature": temperature, "metrics": metrics})
    found = {"spent": spent, "votes": votes, "rows": rows}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found), "utf-8")
    os.replace(part, path)
    return found


@contextmanager
def _untrained(
    comparison: Comparison, folder: Path, seed: int, progress: Progress
) -> Iterator[Trainer]:
    """A run that has not begun; what an earlier attempt left in its folder goes."""
    shutil.rmtree(folder, ignore_errors=True)
    run = replace(comparison.methods[0].run, seed=seed, output=folder)
    trainer = Trainer(run, progress, scoring=comparison.scoring, eval_sets=eval_sets(comparison))
    # The lock makes the folder, which goes with it if nothing is in it.
    with trainer.lock:
        yield trainer
    trainer.close()


def before_path(comparison: Comparison, seed: int) -> Path:
    """The file of these scores."""
    folder = comparison.settings.output / "untrained" / f"seed-{seed}"
    return folder / SCORES / "before.json"
