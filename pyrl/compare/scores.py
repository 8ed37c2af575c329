"""Scores: the arrays that are compared, from how each question was answered."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pyrl.report.question_scores import QuestionScore

BySeed = Sequence[Sequence[QuestionScore]]
"""How one model, or its likes of several seeds, answered one set of questions."""


def metrics(by_seed: BySeed) -> dict[str, NDArray[np.float64]]:
    """[S, Q] of each metric: greedy, pass@1, and maj@k and pass@k for k = 4, 8... up to n samples
    (pass@2 too: a majority of two is the first of them).

    ValueError: the questions of two seeds differ.
    """
    check_same(by_seed, [by_seed[0]] * len(by_seed), "two seeds")
    right = np.array([[q.right for q in scores] for scores in by_seed], np.int64)
    n, right_SQ = right.shape[2], right.sum(2)
    powers = [2**power for power in range(1, n.bit_length()) if 2**power < n]
    found = {
        "greedy": _of(by_seed, [[q.greedy for q in scores] for scores in by_seed]),
        "pass@1": right_SQ / n,
    }
    for k in powers[1:]:
        found[f"maj@{k}"] = np.array([[majority_at(k, q) for q in scores] for scores in by_seed])
    found[f"maj@{n}"] = _of(by_seed, [[q.label_right for q in scores] for scores in by_seed])
    for k in dict.fromkeys([*powers, n]):
        found[f"pass@{k}"] = pass_at(k, n)[right_SQ]
    return found


def _of(by_seed: BySeed, values: Sequence[Sequence[bool]]) -> NDArray[np.float64]:
    return np.array(values, np.float64).reshape(len(by_seed), -1)


def pass_at(k: int, n: int) -> NDArray[np.float64]:
    """Without bias, whether k samples have a right one, if c of n are right [c = 0..n]
    (arXiv:2107.03374)."""
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])


def majority_at(k: int, score: QuestionScore) -> float:
    """Without bias, whether the majority of k of the n samples is right."""
    marked = [*zip(score.classes, score.right, strict=True)]
    wrong = Counter(kind for kind, right in marked if not right and kind >= 0)
    unread = score.classes.count(-1)
    return _majority_right(k, sum(score.right), tuple(sorted(wrong.values())), unread)


@cache
def _majority_right(k: int, right: int, wrong: tuple[int, ...], unread: int) -> float:
    """The share of all draws of k samples in which the right ones are the most.

    `wrong`: how many samples have each wrong answer; `unread`: how many have none, and no vote. The
    first answer of a tie is the label: of a tie with t others right in one of t + 1 orders.
    """
    won = 0.0
    for drawn in range(1, min(k, right) + 1):
        # Draws of the wrong answers, none more often than the right one, by size and ties.
        ways = {(0, 0): 1}
        for count in wrong:
            longer: dict[tuple[int, int], int] = defaultdict(int)
            for (size, ties), many in ways.items():
                for more in range(min(count, drawn, k - drawn - size) + 1):
                    longer[size + more, ties + (more == drawn)] += many * math.comb(count, more)
            ways = longer
        won += math.comb(right, drawn) * sum(
            many * math.comb(unread, k - drawn - size) / (ties + 1)
            for (size, ties), many in ways.items()
        )
    return won / math.comb(right + sum(wrong) + unread, k)


def shown(names: Sequence[str]) -> list[str]:
    """The metrics that tables show: of maj@k the last one, of pass@k the middle one too."""
    majorities = [name for name in names if name.startswith("maj@")]
    several = [name for name in names if name.startswith("pass@") and name != "pass@1"]
    kept = (majorities[-1], several[(len(several) - 1) // 2], several[-1]) if several else names
    return [name for name in names if name not in (*majorities, *several) or name in kept]


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
