"""Intervals: what is certain of a difference that was measured on few seeds and many questions.

A bootstrap of few seeds is too narrow: of three seeds and 300 questions, its 95 % interval excluded
zero in up to 23 % of simulated comparisons of equal methods. Student's t over the means of seeds
alone keeps to 5 % on these questions, but speaks of no others: where methods suit different
questions, it came to 18 % (benchmarks/bench_intervals.py). So seeds get Student's t, questions a
bootstrap of their means, and both distances from the mean add as squares, as those of independent
parts do. The noise of single answers is in both, so that the interval is rather too wide: equal
methods come out different in less than 5 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
NORMAL = 1.959964
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""97.5 % of Student's t with 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """Of the scores of two models, mean over seeds and questions."""

    mean: float
    low: float | None
    """Bounds of the 95 % interval; None with a single seed."""
    high: float | None

    @property
    def verdict(self) -> str:
        """What may be said of the first of both."""
        if self.low is None or self.high is None:
            return "unknown"
        if self.low > 0 or self.high < 0:
            return "better" if self.low > 0 else "worse"
        return "not certain"


def difference(first_SQ: NDArray[np.float64], second_SQ: NDArray[np.float64]) -> Difference:
    """The mean difference of two scores in [0, 1] of the same seeds [S] and questions [Q]."""
    paired_SQ = first_SQ - second_SQ
    mean_S, mean_Q = paired_SQ.mean(1), paired_SQ.mean(0)
    mean = float(paired_SQ.mean())
    seeds, questions = paired_SQ.shape
    if seeds < 2:
        return Difference(mean, None, None)
    of_seeds = student_quantile(seeds - 1) * float(mean_S.std(ddof=1)) / math.sqrt(seeds)
    low, high = np.quantile(_draws(questions) @ mean_Q, [0.025, 0.975])
    # The bounds of two shares' difference are those of any.
    return Difference(
        mean,
        max(-1.0, mean - math.hypot(of_seeds, mean - float(low))),
        min(1.0, mean + math.hypot(of_seeds, float(high) - mean)),
    )


@cache
def _draws(questions: int) -> NDArray[np.float64]:
    """Weights of a mean over questions that were drawn again [DRAWS, Q]; always the same ones, so
    that a table does not depend on the order of its rows."""
    count = np.random.default_rng(0).multinomial(
        questions, np.full(questions, 1 / questions), DRAWS
    )
    return count / questions


def student_quantile(freedom: int) -> float:
    """97.5 % of Student's t; beyond the table by its expansion (Cornish and Fisher)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z, n = NORMAL, freedom
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
