"""The demo with other weights: all in bfloat16, or an adapter, as a table for docs/results.md.

    python benchmarks/demo_weights.py

`pyrl demo`'s 80 steps with its method, scored by greedy answers. An adapter gets ten times the
learning rate. Every run has a thread and a directory below --output, and goes on there when it is
started again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_unique import finished, row, table

from pyrl.demo.run import demo_run
from pyrl.models.lora import LoRA

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"weights": "bfloat16"},
    "LoRA 8": {"lora": LoRA(rank=8), "learning_rate": 2e-4},
}


def train(name: str, seed: int, output: Path) -> tuple[list[float], float, float]:
    """Greedy held-out and at length 18, the seconds of training, the parameters that train."""
    folder = output / f"{name.replace(' ', '-')}-{seed}"
    run = demo_run("ttrl_unique", output=folder, seed=seed)
    scores, trainer, rows = finished(replace(run, **VARIANTS[name]))
    count = sum(p.numel() for p in trainer.learner.parameters)
    return scores, sum(r.get("step_time", 0) for r in rows), count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/weights"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    table("weights", "seed", "that train", "held-out", "length 18", "seconds")
    for name in options.variants:
        for seed in options.seeds:
            (score, longer), seconds, count = train(name, seed, options.output)
            row(name, seed, f"{count:,}", f"{score:.3f}", f"{longer:.3f}", f"{seconds:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
