"""Tables: the record of a comparison for reading, on a terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from pyrl.compare.history import COLLAPSES, TIMES
from pyrl.compare.scores import shown
from pyrl.compare.transitions import KINDS, with_ratio
from pyrl.report.metrics import short

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """One table as texts; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What the columns mean."""

    def __rich__(self) -> RichTable:
        table = RichTable(
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            show_edge=False,
        )
        for place, name in enumerate(self.columns):
            table.add_column(name, justify="right" if place else "left", no_wrap=not place)
        for row in self.rows:
            table.add_row(*row)
        table.caption, table.caption_justify = self.note or None, "left"
        return table

    def markdown(self) -> str:
        """As GitHub shows it."""
        head = [f"| {' | '.join(self.columns)} |", f"|---|{'---:|' * (len(self.columns) - 1)}"]
        rows = [f"| {' | '.join(row)} |" for row in self.rows]
        note = ["", self.note] if self.note else []
        return "\n".join([f"**{self.title}**", "", *head, *rows, *note, ""])

    def html(self) -> str:
        """A heading and a table."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows
        )
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return f"<h2>{escape(self.title)}</h2><table><tr>{head}</tr>{rows}</table>{note}"


def tables(record: Record) -> list[Table]:
    """All that there is: what needs true answers is left out where there are none."""
    found = []
    for name in record["questions"]:
        metrics = shown(list(_rows(record, "scores", name)[0]["metrics"]))
        found += [_scores(record, name, metrics), _answers(record, name)]
        found += [_differences(record, name, metric) for metric in metrics]
        found.append(_transitions(record, name))
    if found:
        found.append(_more_votes(record))
    return [*found, _training(record, COURSE), _training(record, COST)]


def brief(record: Record) -> list[Table]:
    """What a terminal shows: of the last set, which is the held-out one if there is one."""
    found = []
    if sets := list(record["questions"]):
        names = list(_rows(record, "scores", sets[-1])[0]["metrics"])
        found = [
            _scores(record, sets[-1], list(dict.fromkeys([*names[:3], names[-1]]))),
            _differences(record, sets[-1], "pass@1"),
            _transitions(record, sets[-1]),
            _more_votes(record),
        ]
    return [*found, _training(record, COURSE), _training(record, COST)]


def title(record: Record) -> str:
    """What was compared."""
    return f"{', '.join(record['methods'])} on {record['model']}, {record['data']}"


def facts(record: Record) -> str:
    """How it was compared, and what is missing."""
    seeds = record["seeds"]
    said = [f"{record['budget']} a run, {seeds} {'seeds' if seeds > 1 else 'seed'}"]
    counts = [f"{count:,} {name}" for name, count in record["questions"].items()]
    if counts:
        said.append(
            f"scored on {' and '.join(counts)} by greedy answers and {record['samples']} samples "
            f"at T={record['temperature']:g}"
        )
    else:
        said.append("no question has a true answer, so that there are no scores")
    if seeds < 2:
        said.append("no intervals: how much a method varies with its seed is not seen in one")
    if record["held-out data"] is None:
        said.append("no held-out questions: --eval-data gives them")
    return "; ".join(said) + "."


def _rows(record: Record, part: str, name: str) -> list[Record]:
    return [row for row in record[part] if row["set"] == name]


def _scores(record: Record, name: str, metrics: Sequence[str]) -> Table:
    return Table(
        f"Scores on {record['questions'][name]:,} {name}",
        ["", *metrics],
        [
            [row["model"], *(_spread(row["by seed"][metric]) for metric in metrics)]
            for row in _rows(record, "scores", name)
        ],
        f"{_seeds(record)}. pass@k of fewer samples than there are is without bias.",
    )


def _answers(record: Record, name: str) -> Table:
    rows = _rows(record, "scores", name)
    return Table(
        f"Answers to {name}",
        ["", *rows[0]["answers"]],
        [[row["model"], *(short(value) for value in row["answers"].values())] for row in rows],
        f"Means over {record['samples']} samples of each question: different ones among them, "
        f"entropy of a token (nats), tokens.",
    )


def _differences(record: Record, name: str, metric: str) -> Table:
    rows = [row for row in _rows(record, "differences", name) if row["metric"] == metric]
    return Table(
        f"Differences in {metric} on {name}",
        ["", "mean", "95 % interval", ""],
        [
            [
                f"{row['first']} less {row['second']}",
                f"{row['mean']:+.3f}",
                "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}",
                row["verdict"],
            ]
            for row in rows
        ],
        "Paired by seed and question. Better and worse: the interval excludes zero, as it does for "
        "equal methods in one of twenty comparisons at most.",
    )


def _transitions(record: Record, name: str) -> Table:
    rows = _rows(record, "transitions", name)
    names = [*KINDS, "learned / corrupted"]
    cells = []
    for model, own in _by_model(rows):
        mean = with_ratio({kind: fmean(row[kind] for row in own) for kind in KINDS})
        cells.append([model, *(_number(mean[kind]) for kind in names)])
    return Table(
        f"Labels of the {name} by training",
        ["", *names],
        cells,
        f"Questions, mean over seeds. {'; '.join(f'{k}: {v}' for k, v in KINDS.items())}.",
    )


def _more_votes(record: Record) -> Table:
    more = record["more votes"]
    names = list(dict.fromkeys(metric for row in more["rows"] for metric in row["metrics"]))
    return Table(
        "The untrained model",
        ["", *names],
        [
            [
                f"{row['set']}, T={row['temperature']:g}",
                *(_share(row["metrics"].get(metric)) for metric in names),
            ]
            for row in more["rows"]
        ],
        f"Its vote of {more['votes']} is what the {more['spent']:,} tokens of a run pay for on the "
        f"training questions, and {record['samples']} at least. Seed 0.",
    )


COURSE = ("label accuracy", "reward accuracy", "vote share", "entropy", "length")
"""Curves of which the training's last steps are told."""
COST = ("steps", "sampled tokens", "computed tokens", "trained tokens")


def _training(record: Record, columns: Sequence[str]) -> Table:
    """The end of the curves with the step of a collapse, or the cost with the times."""
    cost = columns == COST
    times = {(row["model"], row["seed"]): row for row in record["times"]}
    cells = []
    for model, own in _by_model(record["training"]):
        if cost:
            spent = [times[model, row["seed"]] for row in own]
            values = [_mean(row[name] for row in own) for name in columns]
            values += [_mean(row[name] for row in spent) for name in TIMES]
            cells.append([model, *map(_number, values)])
        else:
            steps = [row["collapse step"] for row in own if row["collapse step"] is not None]
            values = [_mean(_last(row, name) for row in own) for name in columns]
            cells.append([model, *map(_number, values), ", ".join(map(str, steps)) or "none"])
    if cost:
        return Table(
            "What training took",
            ["", *columns, *TIMES],
            cells,
            "Means over seeds. Computed tokens: read by the learner's passes, a shared beginning "
            "once. Trained: those of each response that had an advantage other than zero.",
        )
    return Table(
        "The end of training",
        ["", *columns, "collapse"],
        cells,
        f"The last tenth of the steps. Collapse: the step, of each seed that has one, from which "
        f"on {COLLAPSES} stay below half of their best.",
    )


def _last(row: Record, curve: str) -> float | None:
    values = row["curves"].get(curve)
    return fmean(values[-max(1, len(values) // 10) :]) if values else None


def _by_model(rows: Sequence[Record]) -> Iterable[tuple[str, list[Record]]]:
    for model in dict.fromkeys(row["model"] for row in rows):
        yield model, [row for row in rows if row["model"] == model]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _seeds(record: Record) -> str:
    seeds = record["seeds"]
    return f"Mean of {seeds} seeds ± their deviation" if seeds > 1 else "One seed"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else short(value)
