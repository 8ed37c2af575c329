"""The result of a comparison: from the directories of its runs to one record, as JSON has it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from pyrl.compare.contestants import Comparison, Contestant
from pyrl.compare.directory import FORMAT
from pyrl.compare.history import history, times
from pyrl.compare.intervals import difference
from pyrl.compare.scores import BySeed, answers, check_same, metrics
from pyrl.compare.transitions import transitions
from pyrl.compare.untrained import before
from pyrl.report.question_scores import read_question_scores
from pyrl.run.evaluation import SCORES
from pyrl.run.lock import RunError

UNTRAINED = "untrained"

Sets = Mapping[str, BySeed]
"""By sets of questions, how a model answers them with each seed."""


def result(comparison: Comparison, more_votes: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the tables, the picture and the page show.

    RunError: a run has not spent the budget. ValueError: a run has left scores that cannot be read,
    of another version, or of other questions.
    """
    untrained = [before(comparison, seed) for seed in comparison.seeds]
    scored: dict[str, Sets] = {
        UNTRAINED: {name: [sets[name] for sets in untrained] for name in untrained[0]}
    }
    for contestant in comparison.contestants:
        scored[contestant.label] = _after(comparison, contestant, scored[UNTRAINED])
    first = comparison.methods[0].run
    return {
        "format": FORMAT,
        "model": first.model,
        "data": first.data,
        "held-out data": first.eval_data,
        "budget": str(comparison.budget),
        "seeds": len(comparison.seeds),
        "methods": [contestant.label for contestant in comparison.methods],
        "controls": [c.label for c in comparison.contestants if c.control],
        "temperature": comparison.scoring.temperature,
        "samples": comparison.scoring.samples,
        "questions": {name: len(by_seed[0]) for name, by_seed in scored[UNTRAINED].items()},
        "scores": [row for label, sets in scored.items() for row in _scores(label, sets)],
        "differences": _differences(comparison, scored),
        "transitions": [
            {"model": c.label, "set": name, "seed": seed, **transitions(old, new)}
            for c in comparison.contestants
            for name, by_seed in scored[c.label].items()
            for seed, (old, new) in enumerate(zip(scored[UNTRAINED][name], by_seed, strict=True))
        ],
        "more votes": dict(more_votes),
        "training": [row for c in comparison.contestants for row in _training(comparison, c)],
        "times": [
            {"model": c.label, "seed": seed, **times(_log(comparison, c, seed))}
            for c in comparison.contestants
            for seed in comparison.seeds
        ],
    }


def sampled_tokens(comparison: Comparison) -> int:
    """What a run of the methods samples in training, in the mean."""
    logs = [_log(comparison, c, seed) for c in comparison.methods for seed in comparison.seeds]
    return round(float(np.mean([history(path)["sampled tokens"] for path in logs])))


def _log(comparison: Comparison, contestant: Contestant, seed: int) -> Any:
    return contestant.of_seed(seed, comparison.settings.output).output / "metrics.jsonl"


def _after(comparison: Comparison, contestant: Contestant, untrained: Sets) -> Sets:
    found = []
    for seed in comparison.seeds if untrained else ():
        output = contestant.of_seed(seed, comparison.settings.output).output
        path = output / SCORES / "after.json"
        if not path.exists():
            raise RunError(
                f"{path}: expected the scores of a finished run, found none; remove {output} and "
                f"go on with --resume"
            )
        found.append(read_question_scores(path))
        for name, of_seeds in untrained.items():
            what = f"{contestant.label} and of the untrained model ({name}, seed {seed})"
            check_same([of_seeds[seed]], [found[-1].get(name, [])], what)
    return {name: [sets[name] for sets in found] for name in untrained}


def _scores(label: str, sets: Sets) -> list[dict[str, Any]]:
    """A row for each set: means of the metrics, those of each seed, and what answers are like."""
    rows = []
    for name, by_seed in sets.items():
        found = metrics(by_seed)
        rows.append(
            {
                "model": label,
                "set": name,
                "metrics": {metric: float(of_SQ.mean()) for metric, of_SQ in found.items()},
                "by seed": {metric: of_SQ.mean(1).tolist() for metric, of_SQ in found.items()},
                "answers": answers(by_seed),
            }
        )
    return rows


def _differences(comparison: Comparison, scored: Mapping[str, Sets]) -> list[dict[str, Any]]:
    """Of each pair of methods, and of each method and what stands beside it."""
    methods = [contestant.label for contestant in comparison.methods]
    beside = [label for label in scored if label not in methods]
    pairs = [*combinations(methods, 2), *((m, other) for m in methods for other in beside)]
    rows = []
    for first, second in pairs:
        for name, by_seed in scored[first].items():
            mine, theirs = metrics(by_seed), metrics(scored[second][name])
            for metric, of_SQ in mine.items():
                found = difference(of_SQ, theirs[metric])
                rows.append(
                    {
                        "first": first,
                        "second": second,
                        "set": name,
                        "metric": metric,
                        "mean": found.mean,
                        "low": found.low,
                        "high": found.high,
                        "verdict": found.verdict,
                    }
                )
    return rows


def _training(comparison: Comparison, contestant: Contestant) -> list[dict[str, Any]]:
    rows = []
    for seed in comparison.seeds:
        found = history(_log(comparison, contestant, seed))
        if found["steps"] >= contestant.run.steps:
            raise RunError(
                f"{contestant.label}, seed {seed}: expected a run that spends {comparison.budget}, "
                f"it ended after its {found['steps']:,} steps with {found['sampled tokens']:,} "
                f"sampled tokens; give more --steps, or none, and another --output"
            )
        rows.append({"model": contestant.label, "seed": seed, **found})
    return rows
