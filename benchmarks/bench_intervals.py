"""How often intervals call equal methods different: three ways to make them, for docs/compare.md.

    python benchmarks/bench_intervals.py

Each case is 4000 simulated comparisons. Log-odds of a right answer differ by the question, by the
seed of a run, and by how a method suits a question; their deviations are the columns.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pyrl.compare.intervals import difference, student_quantile

CASES = ((0.3, 0.0, 1), (1.0, 0.0, 1), (0.1, 1.0, 16), (0.3, 1.0, 16))
"""Deviation by seed, by question and method, and samples of each question."""
COMPARISONS, QUESTIONS = 4000, 300
DRAWS = 1000


def scores(
    rng: np.random.Generator, seeds: int, case: tuple[float, float, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of two equal methods [S, Q]."""
    by_seed, by_question, samples = case
    hard_Q = rng.normal(0.5, 2, QUESTIONS)
    found = []
    for _ in range(2):
        odds = rng.normal(0, by_seed, (seeds, 1)) + rng.normal(0, by_question, QUESTIONS) + hard_Q
        found.append(rng.binomial(samples, 1 / (1 + np.exp(-odds))) / samples)
    return found[0], found[1]


@cache
def drawn_again(count: int) -> NDArray[np.float64]:
    """Weights of a mean over seeds or questions [DRAWS, count]."""
    rng = np.random.default_rng(count)
    return rng.multinomial(count, np.full(count, 1 / count), DRAWS) / count


def bootstrap(paired_SQ: NDArray[np.float64]) -> bool:
    """Seeds and questions drawn again: whether its interval excludes zero."""
    seeds, questions = paired_SQ.shape
    of_seeds = drawn_again(seeds) @ paired_SQ
    low, high = np.quantile((of_seeds * drawn_again(questions)).sum(1), [0.025, 0.975])
    return bool(low > 0 or high < 0)


def student(paired_SQ: NDArray[np.float64]) -> bool:
    """Student's t over the means of seeds: whether its interval excludes zero."""
    mean_S = paired_SQ.mean(1)
    half = student_quantile(len(mean_S) - 1) * float(mean_S.std(ddof=1)) / math.sqrt(len(mean_S))
    return abs(float(mean_S.mean())) > half


def main() -> None:
    print("| seeds | by seed | by question | samples | bootstrap | Student's t | pyrl compare |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        for case in CASES:
            told = np.zeros(3)
            for _ in range(COMPARISONS):
                first, second = scores(rng, seeds, case)
                ours = difference(first, second).verdict != "not certain"
                told += [bootstrap(first - second), student(first - second), ours]
            shares = " | ".join(f"{share:.1%}" for share in told / COMPARISONS)
            print(f"| {seeds} | {case[0]} | {case[1]} | {case[2]} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
