"""The picture of a comparison: its curves over sampled tokens, and the scores seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "label accuracy": "labels that are right",
    "reward accuracy": "rewards that are right",
    "distinct labels": "distinct labels / questions",
    "entropy": "entropy (nats)",
    "length": "response length (tokens)",
}
"""Curves of training that are drawn, and their titles."""

POINTS = 100
"""Of a curve."""


def save_picture(record: Mapping[str, Any], path: Path, title: str) -> None:
    """Draw the record as a PNG; ImportError says how to get matplotlib.

    A line is the mean over seeds of running means over a tenth of the run, the band their range.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture of a comparison needs matplotlib") from error
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left", wrap=True)
    *curves, scores = figure.subplots(2, 3).flat
    for axes, (curve, heading) in zip(curves, PANELS.items(), strict=True):
        _plain(axes, heading)
        _curves(axes, record, curve)
    _plain(scores, "pass@1 after training, by seed")
    _scores(scores, record)
    drawn = next((axes for axes in curves if axes.get_legend_handles_labels()[1]), None)
    if drawn is not None:
        drawn.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, format="png")


def _plain(axes: Axes, heading: str) -> None:
    axes.set_title(heading, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(labelsize=8)


def _curves(axes: Axes, record: Mapping[str, Any], curve: str) -> None:
    labels = [*record["methods"], *record["controls"]]
    axes.set_xlabel("sampled tokens", fontsize=8)
    for order, label in enumerate(labels):
        rows = [r for r in record["training"] if r["model"] == label and curve in r["curves"]]
        if not rows:
            continue
        end = min(row["tokens by step"][-1] for row in rows)
        grid = np.linspace(0, end, POINTS)
        lines = np.array(
            [np.interp(grid, row["tokens by step"], _smooth(row["curves"][curve])) for row in rows]
        )
        style = "-" if label in record["methods"] else ":"
        axes.plot(grid, lines.mean(0), style, color=f"C{order}", label=label, linewidth=1.8)
        axes.fill_between(grid, lines.min(0), lines.max(0), color=f"C{order}", alpha=0.15)
    axes.set_ylim(bottom=0)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)


def _scores(axes: Axes, record: Mapping[str, Any]) -> None:
    """Of the last set, which is the held-out one if there is one."""
    sets = list(record["questions"])
    if not sets:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    rows = [row for row in record["scores"] if row["set"] == sets[-1]]
    rows.sort(key=lambda row: row["model"] not in record["methods"])
    for place, row in enumerate(rows):
        values = row["by seed"]["pass@1"]
        axes.plot(values, [place] * len(values), "o", color="0.4", markersize=4, alpha=0.6)
        axes.plot(row["metrics"]["pass@1"], place, "|", color="C3", markersize=16)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(sets[-1], fontsize=8)


def _smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """The mean of each value and those before it, over a tenth of the run."""
    window = max(1, len(values) // 10)
    total = np.cumsum([0.0, *values])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    mean: NDArray[np.float64] = (total[end] - total[start]) / (end - start)
    return mean
