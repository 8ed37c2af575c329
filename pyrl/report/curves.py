"""The picture of a run: six small plots from its metrics, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyrl.report.metrics import Row, matching, read_metrics, step_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0b6e99", "#d9730d", "#4d8b31", "#8a5fbf", "#c4453c")


@dataclass(frozen=True)
class Panel:
    """One small plot: the metrics that share an axis."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(label, metric); "eval/*/NAME" draws one line for each set in the last evaluation."""
    share: bool = False
    """Values in [0, 1]: the axis shows all of it."""


PANELS = (
    Panel(
        "reward and labels",
        (
            ("reward", "reward"),
            ("labels right", "vote/label_accuracy"),
            ("true reward", "vote/ground_truth_reward"),
        ),
        share=True,
    ),
    Panel("evaluation", (("", "eval/*/greedy"), ("", "eval/*/maj@*")), share=True),
    Panel("entropy (nats)", (("entropy", "entropy"),)),
    Panel(
        "votes",
        (
            ("majority ratio", "vote/majority_ratio"),
            ("answered", "vote/answered"),
            ("distinct labels", "vote/distinct_labels"),
        ),
        share=True,
    ),
    Panel("response length (tokens)", (("length", "completions/mean_length"),)),
    Panel("gradient norm", (("before clipping", "grad_norm"),)),
)


def save_curves(metrics_path: Path, picture_path: Path, title: str) -> None:
    """Draw metrics.jsonl; ImportError says how to get matplotlib, ValueError that there is no row.

    A thin line is the step's value, the thick one its running mean; evaluations are dots.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "curves need matplotlib: `pip install matplotlib` (the extra pyrl[demo] has it)"
        ) from error
    rows = read_metrics(metrics_path)
    if not rows:
        raise ValueError(f"{metrics_path}: expected at least one step, got none")
    # A Figure of its own keeps pyplot's global state and the user's backend out of it.
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left", wrap=True)
    last_step = max(1, *(step_of(row) for row in rows))
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
        _draw(axes, panel, rows)
    figure.savefig(picture_path, dpi=130, format="png")


def _draw(axes: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    seen = {n: v for row in rows for n, v in row.items() if not n.startswith("eval/")}
    seen |= next((row for row in reversed(rows) if matching("eval/*", row)), {})
    for index, (label, pattern) in enumerate(panel.lines):
        for order, name in enumerate(matching(pattern, seen)):
            points = [(r["step"], v) for r in rows if isinstance(v := r.get(name), int | float)]
            if points and pattern == name:
                _step_line(axes, points, label, COLORS[index])
            elif points:
                _, evaluated_set, score = name.split("/", 2)
                axes.plot(
                    *zip(*points, strict=True),
                    ("-o", ":o")[index],
                    markersize=4,
                    color=COLORS[order % len(COLORS)],
                    label=f"{evaluated_set}, {score}",
                )
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel("step", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(labelsize=8)
    drawn = axes.get_legend_handles_labels()[1]
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
    elif drawn:
        axes.set_ylim(bottom=0)
    if not drawn:
        axes.text(0.5, 0.5, "not measured in this run", ha="center", transform=axes.transAxes)
    elif len(panel.lines) > 1:
        axes.legend(fontsize=8, frameon=False)


def _step_line(axes: Axes, points: Sequence[tuple[object, float]], label: str, color: str) -> None:
    step, value = zip(*points, strict=True)
    axes.plot(step, value, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(step, _smooth(value), color=color, linewidth=1.8, label=label)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twelfth of the run, without a lag at its start."""
    keep = 1 - 1 / max(1.0, len(values) / 12)
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth
