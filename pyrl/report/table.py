"""The result of a run: scores before and after training beside the sampling that they cost."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

TITLES = {"before": "untrained", "after": "after training"}


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one set of questions."""

    set: str
    """The name that a person gives the set: "trained questions", "held-out", "length 18"."""
    model: Literal["before", "after"]
    metrics: Mapping[str, float]
    """Shares of questions in [0, 1] in the order of the rows: "greedy", "pass@1/T=0.3", "maj@16".

    A slash separates a condition, which the table shows as "pass@1, T=0.3".
    """
    questions: int
    tokens: int
    """Sampled for these scores."""
    seconds: float


@dataclass(frozen=True)
class Report:
    """What a run prints at its end and leaves as report.md and report.json."""

    title: str
    evaluations: tuple[Evaluation, ...]
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    """Beside the scores: tokens that training sampled, seconds, seed, learning rate..."""

    def __rich__(self) -> Group:
        """For the terminal: `rich.print(report)`."""
        table = Table(title=self.title, title_justify="left")
        sets = self._sets()
        table.add_column("")
        for name in sets:
            table.add_column(name, justify="right")
        for model in ("before", "after"):
            rows = self._rows(model)
            if rows:
                table.add_row(TITLES[model], *[""] * len(sets), style="bold")
            for label, *cells in rows:
                table.add_row(f"  {label}", *cells)
            table.add_section()
        return Group(table, Text(self._caption(), style="dim"))

    def markdown(self) -> str:
        """The same as GitHub's Markdown."""
        sets = self._sets()
        lines = [f"# {self.title}", "", f"| | {' | '.join(sets)} |", "|---|" + "---:|" * len(sets)]
        for model in ("before", "after"):
            lines += [f"| {TITLES[model]}: {' | '.join(cells)} |" for cells in self._rows(model)]
        return "\n".join([*lines, "", *self._caption().splitlines(), ""])

    def save(self, output_dir: Path) -> None:
        """Write report.md and report.json, each whole or not at all."""
        record = {
            "title": self.title,
            "facts": dict(self.facts),
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
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

    def _cell(self, model: str, set_name: str, metric: str) -> str:
        evaluation, before = self._find(model, set_name), self._find("before", set_name)
        if evaluation is None or metric not in evaluation.metrics:
            return ""
        value = evaluation.metrics[metric]
        if model == "before" or before is None or metric not in before.metrics:
            return f"{value:.3f}"
        return f"{value:.3f} ({value - before.metrics[metric]:+.3f})"

    def _caption(self) -> str:
        lines = [", ".join(f"{name} {_text(value)}" for name, value in self.facts.items())]
        errors = [
            math.sqrt(p * (1 - p) / e.questions)
            for e in self.evaluations
            for p in e.metrics.values()
        ]
        if errors:
            lines.append(
                f"In brackets: the gain over the untrained model. "
                f"Standard error of a score over questions: up to {max(errors):.3f}."
            )
        return "\n".join(line for line in lines if line)


def _text(value: str | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.4g}"
