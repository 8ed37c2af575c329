"""The demo over methods and seeds, with its controls, as one table for docs/results.md.

    python benchmarks/demo_seeds.py --output runs/seeds

Each run is `pyrl demo METHOD --seed S` in a process of its own; finished ones are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyrl.demo.run import UPDATES

HELD_OUT, LONGER = "held-out", "length 18"
LABEL, RIGHT = "label by mass/T=0.6", "right mass/T=0.6"


def run(method: str, updates: int, seed: int, output: Path) -> dict[str, Any]:
    """The report of one run, made now or found."""
    folder = output / f"{method}-{updates}-{seed}"
    if not (folder / "report.json").is_file():
        command = ["pyrl", "demo", method, "--seed", str(seed), "--output", str(folder)]
        command += ["--updates", str(updates)]
        resume = ["--resume"] if folder.exists() else []
        print("$", shlex.join(command + resume), file=sys.stderr, flush=True)
        subprocess.run(command + resume, check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def score(report: dict[str, Any], set_name: str, model: str, metric: str) -> float:
    (found,) = [
        evaluation["metrics"][metric]
        for evaluation in report["evaluations"]
        if evaluation["set"] == set_name and evaluation["model"] == model
    ]
    return float(found)


def row(method: str, updates: int, seed: int, report: dict[str, Any]) -> str:
    before = (
        score(report, HELD_OUT, "before", "greedy"),
        score(report, HELD_OUT, "before", LABEL),
    )
    after = [score(report, HELD_OUT, "after", m) for m in ("greedy", RIGHT, LABEL)]
    longer = [score(report, LONGER, model, "greedy") for model in ("before", "after")]
    verdict = "yes" if after[0] > before[1] else "no"
    numbers = [*before, *after, *longer]
    tokens = report["facts"]["sampled tokens in training"]
    seconds = report["facts"]["seconds of training"]
    cells = [
        method,
        str(updates),
        str(seed),
        *(f"{n:.3f}" for n in numbers),
        f"{tokens:,}",
        str(seconds),
        verdict,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--methods", nargs="+", default=["ttrl", "ettrl", "echo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, nargs="+", default=[UPDATES])
    options = parser.parse_args()
    print(
        "| method | updates | seed | greedy, untrained | label by mass, untrained | greedy "
        "| right mass | label by mass | length 18, untrained | length 18 | sampled tokens "
        "| seconds | greedy > untrained label |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for method in options.methods:
        for updates in options.updates:
            for seed in options.seeds:
                report = run(method, updates, seed, options.output)
                print(row(method, updates, seed, report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
