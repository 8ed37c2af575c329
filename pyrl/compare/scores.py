"""Scores: the arrays that are compared, from how each question was answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pyrl.report.question_scores import QuestionScore

BySeed = Sequence[Sequence[QuestionScore]]
"""How one model, or its likes of several seeds, answered one set of questions."""


def metrics(by_seed: BySeed) -> dict[str, NDArray[np.float64]]:
    """[S, Q] of each metric: greedy, pass@1, maj@n, and pass@k for k = 2, 4, 8... up to n samples.

    ValueError: the questions of two seeds differ.
    """
    check_same(by_seed, [by_seed[0]] * len(by_seed), "two seeds")
    right = np.array([[q.right for q in scores] for scores in by_seed], np.int64)
    n, right_SQ = right.shape[2], right.sum(2)
    powers = [2**power for power in range(1, n.bit_length()) if 2**power < n]
    found = {
        "greedy": _of(by_seed, [[q.greedy for q in scores] for scores in by_seed]),
        "pass@1": right_SQ / n,
        f"maj@{n}": _of(by_seed, [[q.label_right for q in scores] for scores in by_seed]),
    }
    for k in dict.fromkeys([*powers, n]):
        found[f"pass@{k}"] = pass_at(k, n)[right_SQ]
    return found


def _of(by_seed: BySeed, values: Sequence[Sequence[bool]]) -> NDArray[np.float64]:
    return np.array(values, np.float64).reshape(len(by_seed), -1)


def pass_at(k: int, n: int) -> NDArray[np.float64]:
    """Without bias, whether k samples have a right one, if c of n are right [c = 0..n]
    (arXiv:2107.03374)."""
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])


def shown(names: Sequence[str]) -> list[str]:
    """The metrics that tables show: of pass@k the middle and the last one."""
    several = [name for name in names if name.startswith("pass@") and name != "pass@1"]
    middle = several[(len(several) - 1) // 2 :]
    return [name for name in names if name not in several or name in (middle[0], several[-1])]


def check_same(first: BySeed, second: BySeed, what: str) -> None:
    """ValueError unless both are about the same questions."""
    for one, other in zip(first, second, strict=True):
        mine, theirs = ([(q.question, q.text) for q in scores] for scores in (one, other))
        if mine != theirs:
            different = next((a for a, b in zip(mine, theirs, strict=False) if a != b), None)
            raise ValueError(
                f"expected the same questions of {what}, got {len(mine)} and {len(theirs)}"
                + (f", of which {different} is the first that differs" if different else "")
            )


def answers(by_seed: BySeed) -> Mapping[str, float]:
    """Means over seeds and questions of the samples: distinct answers, entropy, length."""
    every = [question for scores in by_seed for question in scores]
    return {
        "distinct answers": float(np.mean([question.distinct for question in every])),
        "entropy": float(np.mean([question.entropy for question in every])),
        "length": float(np.mean([question.length for question in every])),
    }
