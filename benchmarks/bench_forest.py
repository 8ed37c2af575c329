"""Speed and size of the forest beside their gates: python benchmarks/bench_forest.py

Times are CPU time, so that other load on the machine counts little; memory is fresh in every round,
page faults included. The C++ figures come from tests/cpp/forest_driver.cpp, compiled here unless
--driver names a built one. --trees 4096 needs 5 GB of memory; fewer give the same bytes per token.
Exit code 1 if a gate is missed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pyrl.forest import Forest

ROOT = Path(__file__).parent.parent
BRANCHES, STEPS, ROUNDS = 1024, 500, 5


def compile_driver(folder: str) -> Path:
    """The driver with the flags of a release build."""
    driver = Path(folder) / "forest_driver"
    sources = [
        *sorted((ROOT / "csrc" / "tree").glob("forest*.cpp")),
        ROOT / "tests/cpp/forest_driver.cpp",
    ]
    flags = ["-std=c++20", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, *map(str, sources), "-o", str(driver)], check=True)
    return driver


def drive(driver: Path, *arguments: object) -> float:
    command = [str(driver), *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def best_ns(make: Callable[[], Callable[[], object]]) -> float:
    """CPU nanoseconds per token of one batched decode step, the best of some fresh rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        step = make()
        begin = time.process_time_ns()
        for _ in range(STEPS):
            step()
        best = min(best, (time.process_time_ns() - begin) / (STEPS * BRANCHES))
    return best


def forest_step() -> Callable[[], None]:
    forest = Forest()
    tree = forest.add_tree(np.array([1, 2, 3], np.int32))
    branch_B = np.array([forest.add_trunk(tree, seed) for seed in range(BRANCHES)])
    token_B, value_B = np.arange(BRANCHES, dtype=np.int32), np.ones(BRANCHES, np.float32)
    return lambda: forest.append(branch_B, token_B, value_B, value_B, value_B)


def list_step() -> Callable[[], None]:
    """The peer: four Python lists per branch."""
    columns: list[tuple[list[float], ...]] = [([], [], [], []) for _ in range(BRANCHES)]
    token_B, value_B = np.arange(BRANCHES, dtype=np.int32), np.ones(BRANCHES, np.float32)

    def step() -> None:
        values = zip(columns, token_B.tolist(), *[value_B.tolist()] * 3, strict=True)
        for (tokens, logprobs, entropies, confidences), token, logprob, entropy, mass in values:
            tokens.append(token)
            logprobs.append(logprob)
            entropies.append(entropy)
            confidences.append(mass)

    return step


def measure(driver: Path, trees: int) -> list[tuple[str, float, float | None]]:
    """Rows of (what, measured, gate)."""
    rows: list[tuple[str, float, float | None]] = [
        ("append, 64 branches, C++ (ns/token)", drive(driver, "append", 64, 1000), None),
        ("append, 1024 branches, C++ (ns/token)", drive(driver, "append", 1024, 1000), 25),
        ("append, 16384 branches, C++ (ns/token)", drive(driver, "append", 16384, 200), None),
        ("append, 1024 branches, Python (ns/token)", best_ns(forest_step), 80),
        ("  four Python lists instead (ns/token)", best_ns(list_step), None),
    ]
    lengths = (10, 1_000, 100_000, 1_000_000)
    rows += [(f"fork of {n:,} tokens, C++ (us)", drive(driver, "fork", n), 2) for n in lengths]
    size = f"{trees} trees x 64 leaves x 1000 tokens"
    rows.append((f"{size} (B/token)", drive(driver, "size", trees, 64, 1000, 0), 20))
    rows.append((f"{size}, forked (B/token)", drive(driver, "size", trees, 64, 1000, 1), 20))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", type=Path, help="a built forest_driver")
    parser.add_argument("--trees", type=int, default=4096)
    options = parser.parse_args()
    print("$ python", shlex.join(sys.argv), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.driver or compile_driver(folder), options.trees)
    missed = False
    print(f"| {'':58} | measured |   gate |    |")
    print(f"|{'-' * 60}|{'-' * 9}:|{'-' * 7}:|{'-' * 4}|")
    for what, value, gate in rows:
        verdict = "" if gate is None else "ok" if value <= gate else "NO"
        missed |= verdict == "NO"
        limit = "" if gate is None else f"<= {gate:g}"
        print(f"| {what:58} | {value:8.2f} | {limit:>6} | {verdict:2} |")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
