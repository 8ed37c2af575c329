"""The result of a run: scores before and after training, and how its steps began and ended."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pyrl.report.metrics import Row, short, step_of
from pyrl.report.question_scores import QuestionScore

TITLES = {"before": "untrained", "after": "after training", "given": ""}
"""Headings of the scores of each model; one that was only scored needs none."""

IN_TRAINING = {
    "vote share": "vote/majority_ratio",
    "answered": "vote/answered",
    "distinct labels": "vote/distinct_labels",
    "entropy": "entropy",
    "response length": "completions/mean_length",
    "reward": "reward",
}
"""What every run has, with and without true answers."""

STEPS = 5
"""Steps whose mean is the beginning or the end of a run."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one set of questions."""

    set: str
    """The name that a person gives the set: "trained questions", "held-out", "length 18"."""
    model: Literal["before", "after", "given"]
    """Of a run before or after training, or one that `pyrl eval` was given."""
    metrics: Mapping[str, float]
    """Shares of questions in [0, 1] in the order of the rows: "greedy", "pass@1/T=0.3", "maj@16".

    A slash separates a condition, which the table shows as "pass@1, T=0.3".
    """
    questions: int
    tokens: int
    """Sampled for these scores."""
    seconds: float
    by_question: tuple[QuestionScore, ...] = ()
    """The same question by question; none of an evaluation that was read from a record."""

    def record(self) -> dict[str, Any]:
        """As JSON has it, without the scores by question."""
        fields = asdict(replace(self, by_question=()))
        del fields["by_question"]
        return fields


def first_and_last(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Means over the first and the last steps of a run, at most `STEPS` and half of them each."""
    rows = [row for row in rows if step_of(row) > 0]
    count = max(1, min(STEPS, len(rows) // 2))
    parts = {"first": rows[:count], "last": rows[-count:]}
    if len(rows) < 2:
        parts = {"only": rows} if rows else {}
    name = f"{count} steps" if count > 1 else "step"
    return {f"{which} {name}": _means(part) for which, part in parts.items()}


def _means(rows: Sequence[Row]) -> dict[str, float]:
    values = {
        label: [value for row in rows if isinstance(value := row.get(name), int | float)]
        for label, name in IN_TRAINING.items()
    }
    return {label: fmean(found) for label, found in values.items() if found}


@dataclass(frozen=True)
class Report:
    """What a run prints at its end and leaves as report.md and report.json."""

    title: str
    evaluations: tuple[Evaluation, ...]
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    """Beside the scores: tokens that training sampled, seconds, seed, learning rate..."""
    training: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Numbers of the steps, by part of the run: `first_and_last`."""

    def __rich__(self) -> Group:
        """For the terminal: `rich.print(report)`."""
        # Not a title of the table, which would break it at the table's width.
        parts: list[Text | Table] = [Text(self.title, style="bold", overflow="fold")]
        if self.evaluations:
            parts.append(self._scores())
        if self.training:
            table = _table(self.training)
            for row in self._changes():
                table.add_row(*row)
            parts.append(table)
        return Group(*parts, Text(self._caption(), style="dim"))

    def _scores(self) -> Table:
        sets = self._sets()
        table = _table(sets)
        for model, title in TITLES.items():
            rows = self._rows(model)
            if rows and title:
                table.add_row(title, *[""] * len(sets), style="bold")
            for label, *cells in rows:
                table.add_row(f"  {label}" if title else label, *cells)
            table.add_section()
        return table

    def markdown(self) -> str:
        """The same as GitHub's Markdown."""
        lines = [f"# {self.title}", ""]
        if self.evaluations:
            lines += _markdown_head(self._sets())
            for model, title in TITLES.items():
                start = f"| {title}: " if title else "| "
                lines += [f"{start}{' | '.join(cells)} |" for cells in self._rows(model)]
            lines.append("")
        if self.training:
            lines += _markdown_head([*self.training])
            lines += [f"| {' | '.join(cells)} |" for cells in self._changes()]
            lines.append("")
        return "\n".join([*lines, *self._caption().splitlines(), ""])

    def save(self, output_dir: Path) -> None:
        """Write report.md and report.json, each whole or not at all."""
        output_dir.mkdir(parents=True, exist_ok=True)
        record = {
            "title": self.title,
            "facts": dict(self.facts),
            "evaluations": [evaluation.record() for evaluation in self.evaluations],
            "training": {part: dict(means) for part, means in self.training.items()},
        }
        for name, text in (
            ("report.md", self.markdown()),
            ("report.json", json.dumps(record, indent=2) + "\n"),
        ):
            part = output_dir / f"{name}.part"
            part.write_text(text, "utf-8")
            os.replace(part, output_dir / name)

    def _sets(self) -> list[str]:
        return list(dict.fromkeys(evaluation.set for evaluation in self.evaluations))

    def _find(self, model: str, set_name: str) -> Evaluation | None:
        found = [e for e in self.evaluations if (e.model, e.set) == (model, set_name)]
        return found[-1] if found else None

    def _rows(self, model: str) -> list[list[str]]:
        """Label and one cell per set; scores after training with their gain."""
        names = list(
            dict.fromkeys(m for e in self.evaluations if e.model == model for m in e.metrics)
        )
        rows = [
            [name.replace("/", ", "), *(self._cell(model, s, name) for s in self._sets())]
            for name in names
        ]
        if names:
            tokens = [self._find(model, s) for s in self._sets()]
            rows.append(["sampled tokens", *(f"{e.tokens:,}" if e else "" for e in tokens)])
        return rows

    def _changes(self) -> list[list[str]]:
        """Label and one cell per part of the run."""
        parts = self.training.values()
        names = [name for name in IN_TRAINING if any(name in means for means in parts)]
        return [
            [name, *(short(means[name]) if name in means else "" for means in parts)]
            for name in names
        ]

    def _cell(self, model: str, set_name: str, metric: str) -> str:
        evaluation = self._find(model, set_name)
        if evaluation is None or metric not in evaluation.metrics:
            return ""
        value, before = evaluation.metrics[metric], self._before(evaluation, metric)
        return f"{value:.3f}" if before is None else f"{value:.3f} ({value - before:+.3f})"

    def _before(self, evaluation: Evaluation, metric: str) -> float | None:
        """The same score before training, of one after it."""
        before = self._find("before", evaluation.set)
        return before.metrics.get(metric) if before and evaluation.model == "after" else None

    def _caption(self) -> str:
        lines = [", ".join(f"{name} {_text(value)}" for name, value in self.facts.items())]
        errors = [
            math.sqrt(p * (1 - p) / e.questions)
            for e in self.evaluations
            for p in e.metrics.values()
        ]
        if errors:
            gains = any(self._before(e, m) is not None for e in self.evaluations for m in e.metrics)
            brackets = "In brackets: the gain over the untrained model. " if gains else ""
            lines.append(
                f"{brackets}Standard error of a score over questions: up to {max(errors):.3f}."
            )
        return "\n".join(line for line in lines if line)


def _table(columns: Iterable[str]) -> Table:
    table = Table()
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _markdown_head(columns: Sequence[str]) -> list[str]:
    return [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]


def _text(value: str | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.4g}"
