"""Which differences are called certain: planted ones, and equal methods as seldom as is said."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from pyrl.compare.intervals import difference, student_quantile

Scores = NDArray[np.float64]


def simulated(
    rng: np.random.Generator,
    seeds: int,
    questions: int,
    *,
    by_seed: float,
    by_question: float,
    samples: int,
    gain: float = 0.0,
) -> tuple[Scores, Scores]:
    """Shares of right samples of two methods whose log-odds differ by the seed, by how each method
    suits a question, and by `gain`."""
    hard_Q = rng.normal(0.5, 2, questions)
    scores = []
    for more in (gain, 0.0):
        odds_SQ = (
            hard_Q
            + more
            + rng.normal(0, by_seed, (seeds, 1))
            + rng.normal(0, by_question, questions)
        )
        scores.append(rng.binomial(samples, 1 / (1 + np.exp(-odds_SQ))) / samples)
    return scores[0], scores[1]


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    ("by_seed", "by_question", "samples"),
    [(0.3, 0.0, 1), (1.0, 0.0, 1), (0.3, 1.0, 16), (0.1, 1.0, 16)],
    ids=["seeds", "wide seeds", "both", "questions"],
)
def test_equal_methods_differ_with_certainty_in_one_of_twenty_comparisons_at_most(
    seeds: int, by_seed: float, by_question: float, samples: int
) -> None:
    rng = np.random.default_rng(1)
    found = [
        difference(
            *simulated(rng, seeds, 100, by_seed=by_seed, by_question=by_question, samples=samples)
        )
        for _ in range(400)
    ]
    assert sum(one.verdict != "not certain" for one in found) <= 20


def test_planted_differences_are_found_and_have_their_sign() -> None:
    rng = np.random.default_rng(2)
    plain = {"by_seed": 0.1, "by_question": 0.3, "samples": 4}
    verdicts = []
    for _ in range(50):
        better, worse = simulated(rng, 5, 300, gain=1.0, **plain)  # 0.1 more are right
        verdicts += [difference(better, worse).verdict, difference(worse, better).verdict]
    assert verdicts[::2].count("better") == verdicts[1::2].count("worse") >= 48


def test_an_interval_is_of_seeds_and_of_questions_together() -> None:
    rng = np.random.default_rng(3)
    mean_Q = rng.normal(0.1, 0.3, 400)
    of_questions = difference(np.tile(mean_Q, (3, 1)), np.zeros((3, 400)))
    assert of_questions.mean == pytest.approx(mean_Q.mean())
    half = 1.96 * mean_Q.std() / 20
    assert of_questions.low == pytest.approx(mean_Q.mean() - half, abs=0.1 * half)
    mean_S = np.array([0.1, 0.2, 0.4])
    of_seeds = difference(np.tile(mean_S[:, None], (1, 400)), np.zeros((3, 400)))
    low, high = stats.t.interval(0.95, 2, mean_S.mean(), stats.sem(mean_S))
    assert (of_seeds.low, of_seeds.high) == pytest.approx((low, high), abs=1e-4)
    both = difference(mean_S[:, None] + mean_Q, np.zeros((3, 400)))
    assert both.high is not None
    assert of_seeds.high is not None
    assert of_questions.high is not None
    wide = np.hypot(of_seeds.high - of_seeds.mean, of_questions.high - of_questions.mean)
    assert both.high - both.mean == pytest.approx(wide)


def test_a_single_seed_has_no_interval() -> None:
    found = difference(np.ones((1, 9)), np.zeros((1, 9)))
    assert (found.mean, found.low, found.high, found.verdict) == (1.0, None, None, "unknown")


def test_the_quantiles_arestudent_quantile_s() -> None:
    assert [student_quantile(n) for n in (*range(1, 40), 1000)] == pytest.approx(
        [stats.t.ppf(0.975, n) for n in (*range(1, 40), 1000)], rel=3e-3
    )
