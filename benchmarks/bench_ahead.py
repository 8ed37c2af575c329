"""Sampling ahead of the learner, with an engine that is made slow: one table for docs/scale.md.

    OMP_NUM_THREADS=1 python benchmarks/bench_ahead.py

TTRL on the demo. The engine sleeps after each of its steps, as long as the first run says, so that
sampling takes the given shares of the time of scoring and learning; a sleep leaves the processor to
the learner, as a sampler on other hardware does. Idle is the share of a step in which the learner
waits for samples. Medians over the steps after the first two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from pyrl.demo.run import demo_run
from pyrl.engine import Sampled
from pyrl.engine.hf import HFEngine
from pyrl.report import Progress
from pyrl.report.metrics import Row
from pyrl.run.config import Run
from pyrl.train import Trainer

FIRST = 2
"""Steps that are not counted: the first one has nothing ahead of it."""


@dataclass
class Pace:
    """What an engine sleeps after each of its steps, and how many it has made."""

    seconds: float = 0.0
    steps: int = 0


def stepped(run: Run, pace: Pace) -> list[Row]:
    """The rows of the counted steps of a run whose engine has this pace."""
    with Progress(console=Console(file=StringIO())) as progress:
        trainer = Trainer(run, progress)
        engine = trainer.sampler.engine
        assert isinstance(engine, HFEngine)
        sample = engine.step

        def slow() -> Sampled:
            sampled = sample()
            pace.steps += len(sampled.branch_B) > 0
            time.sleep(pace.seconds)
            return sampled

        vars(engine)["step"] = slow
        rows = [trainer.observe(trainer.train_step()) for _ in range(run.steps)]
        trainer.close()
    return rows[FIRST:]


def middle(rows: Sequence[Row], *names: str) -> float:
    """The median over the steps of the sum of these metrics."""
    values: list[Any] = [sum(float(row.get(name) or 0) for name in names) for row in rows]
    return float(median(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8, 1.0, 1.5])
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        base = replace(
            demo_run("ttrl", output=Path(folder) / "run", seed=0), steps=options.steps, save_trees=0
        )
        pace = Pace()
        rows = stepped(base, pace)
        per_step = pace.steps / options.steps
        sampling = middle(rows, "timing/sampling")
        learning = middle(rows, "timing/updating", "timing/scoring")
        print(f"sampling {sampling:.2f} s, scoring and learning {learning:.2f} s a step\n")
        print("| sampling / learning | step (s) | ahead (s) | ratio | idle | idle, ahead |")
        print("|---:|---:|---:|---:|---:|---:|")
        for share in options.shares:
            seconds = max(0.0, share * learning - sampling) / per_step
            alone = stepped(base, Pace(seconds))
            ahead = stepped(replace(base, ahead=True), Pace(seconds))
            times = [middle(found, "step_time") for found in (alone, ahead)]
            idle = median(
                float(row["timing/sampling"] or 0) / float(row["step_time"] or 1) for row in alone
            )
            cells = [
                f"{share:g}",
                *(f"{value:.2f}" for value in (*times, times[0] / times[1])),
                f"{idle:.1%}",
                f"{middle(ahead, 'ahead/idle'):.1%}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
