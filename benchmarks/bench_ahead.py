"""Sampling ahead of the learner, with both made slow: one table for docs/scale.md.

    OMP_NUM_THREADS=1 python benchmarks/bench_ahead.py

`pyrl demo ttrl_unique`, whose update sleeps until it has taken the given seconds, and whose engine
sleeps after each of its steps until it samples in the given shares of them: each stands for its own
hardware, and what is measured is what pyrl adds. Idle is the share of a step in which the learner
has no samples. Medians over the steps after the first two.
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
from pyrl.logits.sampling import Sampling
from pyrl.report import Progress
from pyrl.report.metrics import Row
from pyrl.run.config import Run
from pyrl.train import Trainer

FIRST = 2
"""Steps that are not counted: the first one has nothing ahead of it."""


STEPS = 20
"""Steps of the engine in the trees of a step: tokens of the longest response, about."""


@dataclass
class Pace:
    """Keeps a call from ending before its turn."""

    seconds: float
    """Between two turns."""
    turn: float = 0.0

    def begin(self) -> None:
        self.turn = time.monotonic()

    def wait(self) -> None:
        self.turn += self.seconds
        time.sleep(max(0.0, self.turn - time.monotonic()))


def stepped(run: Run, learning: float, sampling: float) -> list[Row]:
    """The rows of the counted steps of a run that learns and samples in so many seconds."""
    with Progress(console=Console(file=StringIO())) as progress:
        trainer = Trainer(run, progress)
        engine, learner = trainer.sampler.engine, trainer.learner
        start, sample, update = engine.start, engine.step, learner.update
        of_engine, of_learner = Pace(sampling / STEPS), Pace(learning)

        def started(distribution: Sampling) -> None:
            start(distribution)
            of_engine.begin()

        def slow() -> Sampled:
            sampled = sample()
            of_engine.wait()
            return sampled

        def updated(*given: Any, **named: Any) -> dict[str, float]:
            of_learner.begin()
            found = update(*given, **named)
            of_learner.wait()
            return found

        vars(engine).update(start=started, step=slow)
        vars(learner)["update"] = updated
        rows = [trainer.observe(trainer.train_step()) for _ in range(run.steps)]
        trainer.close()
    return rows[FIRST:]


def middle(rows: Sequence[Row], *names: str) -> float:
    """The median over the steps of the sum of these metrics."""
    values: list[Any] = [sum(float(row.get(name) or 0) for name in names) for row in rows]
    return float(median(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--learning", type=float, default=3.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8, 1.0, 1.5])
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        base = replace(
            demo_run("ttrl_unique", output=Path(folder) / "run", seed=0),
            steps=options.steps,
            save_trees=0,
        )
        print("| sampling / learning | step (s) | ahead (s) | ratio | idle | idle, ahead |")
        print("|---:|---:|---:|---:|---:|---:|")
        for share in options.shares:
            seconds = options.learning, share * options.learning
            alone = stepped(base, *seconds)
            ahead = stepped(replace(base, ahead=True), *seconds)
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
