"""Even samples: each is a sample of the policy, and together they miss little of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from tiny_run import make_trainer, stepped, tiny, tiny_run
from toy_rollout import prompts, random_toy, rollout

from pyrl import _core
from pyrl.demo.run import ttrl
from pyrl.fork import TopEntropy
from pyrl.leaves import collect
from pyrl.report.tree import first_token_error
from pyrl.rollout import even_seeds


@pytest.mark.parametrize("count", [2, 7, 64])
def test_a_first_number_lies_in_each_part_and_a_trunk_s_own_is_uniform(count: int) -> None:
    zeros = np.zeros(count, np.int64)
    rows = [
        _core.logits.uniforms(np.array(even_seeds(seed, 1, 0, count), np.uint64), zeros)
        for seed in range(300)
    ]
    number_XN = np.array(rows)
    assert (np.sort(number_XN * count, axis=1).astype(int) == np.arange(count)).all()
    for trunk in (0, count - 1):
        assert scipy.stats.kstest(number_XN[:, trunk], "uniform").pvalue > 1e-3
    assert even_seeds(3, 1, 0, count) == even_seeds(3, 1, 0, count)
    assert even_seeds(3, 1, 0, count) != even_seeds(3, 2, 0, count)


def first_tokens(even: bool, seed: int) -> tuple[np.ndarray, float]:
    run = rollout(random_toy(), prompts(2), votes=16, seed=seed, even=even, limit=3)
    leaves = collect(run.run(), lambda rows: ["" for _ in rows])
    return np.array([tokens[0] for tokens in leaves.token_N]), first_token_error(leaves)


def test_the_first_tokens_of_a_question_are_those_that_the_policy_says() -> None:
    toy = random_toy()
    probability_V = np.exp(toy._log_VV[1].double().numpy())
    seen_V = np.zeros(6)
    errors = {True: 0.0, False: 0.0}
    for seed in range(60):
        token_N, error = first_tokens(True, seed)
        below_V = np.array([(token_N <= v).sum() for v in range(6)])
        assert (np.abs(below_V - 16 * np.cumsum(probability_V)) < 1 + 1e-6).all()
        seen_V += np.bincount(token_N, minlength=6)
        errors[True] += error / 60
        errors[False] += first_tokens(False, seed)[1] / 60
    np.testing.assert_allclose(seen_V / seen_V.sum(), probability_V, atol=0.02)
    assert errors[True] < 0.5 * errors[False]


def test_later_tokens_and_forks_are_drawn_as_ever() -> None:
    """Trees of even trunks are whole, and replay."""
    saved = [
        rollout(random_toy(), prompts(2, 3), fork=TopEntropy(), votes=20, even=True).run().save()
        for _ in range(2)
    ]
    assert saved[0] == saved[1]


def test_a_run_tells_what_is_left_of_the_error(tmp_path: Path) -> None:
    algorithm = tiny(ttrl(), votes=8)
    even = replace(algorithm, sample=replace(algorithm.sample, even=True))
    row = stepped(make_trainer(tiny_run(tmp_path, even)))
    assert 0 < row["tree/first_token_error"] < 0.5
    assert row["sampling/sampling_logp_difference/max"] < 1e-3
