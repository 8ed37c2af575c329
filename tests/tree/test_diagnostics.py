"""Diagnostics of a step: numbers by hand, plain forwards, and runs that they do not change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from advantage_reference import flat, scored_of
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, weights

from pyrl.advantage import GroupBaseline
from pyrl.demo.run import ttrl
from pyrl.diagnostics.attention import row_entropy
from pyrl.diagnostics.cliff import advantage_flips
from pyrl.diagnostics.off_policy import estimate
from pyrl.report.metrics import MEANING
from pyrl.reward import RandomReward

MEAN = (GroupBaseline(scale="none"),)


@pytest.mark.parametrize(
    ("rewards", "flipped", "vanished"),
    [
        ([1, 0, 0, 0], 0, 3 / 12),  # without the 1 the others are equal
        ([0, 1.1, 3], 1 / 6, 0),  # 1.1 is below the mean, and above that of 0 and 1.1
        ([1, 1, 1], 0, 0),
        ([1, 0, math.nan], 0, 2 / 4),
    ],
)
def test_signs_of_advantages_without_one_of_the_rewards(
    rewards: list[float], flipped: float, vanished: float
) -> None:
    found = advantage_flips(MEAN, [None], scored_of(flat(rewards)))
    assert found == pytest.approx(
        {"diagnostics/flipped": flipped, "diagnostics/vanished": vanished}
    )


def test_groups_of_other_sizes_are_left_out_side_by_side() -> None:
    both = advantage_flips(MEAN, [None], scored_of(flat([1, 0, 0, 0], [0, 1.1, 3])))
    assert both["diagnostics/flipped"] == pytest.approx(1 / (12 + 6))
    assert both["diagnostics/vanished"] == pytest.approx(3 / (12 + 6))


def test_the_control_variate_of_the_page() -> None:
    value_KN, weight_N = np.array([[1.0, 2, 3, 4], [5, 5, 5, 5]]), np.array([0.8, 1.3, 0.9, 1.4])
    found = estimate(value_KN, weight_N)
    assert (value_KN[0] * weight_N).mean() == pytest.approx(2.925)
    np.testing.assert_allclose(found.mean_K, [2.378846, 5], atol=1e-6)  # a constant is exact
    np.testing.assert_allclose(found.error_K[1], 0, atol=1e-12)
    assert found.samples == pytest.approx(4.4**2 / (0.64 + 1.69 + 0.81 + 1.96))
    even = estimate(value_KN, np.ones(4))
    assert even.mean_K.tolist() == [2.5, 5]
    assert even.samples == 4
    assert even.error_K[0] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)


def test_the_estimate_is_right_within_its_errors_and_better_than_plain_weights() -> None:
    """Of a policy of three answers, from samples of another."""
    rng, old, new = np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
    reward = np.array([2.0, 3.0, 4.0])
    means, errors, plain = [], [], []
    for _ in range(400):
        answer_N = rng.choice(3, 60, p=old)
        weight_N = (new / old)[answer_N]
        found = estimate(reward[answer_N][None], weight_N)
        means.append(found.mean_K[0])
        errors.append(found.error_K[0])
        plain.append((reward[answer_N] * weight_N).mean())
    assert np.mean(means) == pytest.approx(new @ reward, abs=0.01)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.15)
    assert np.std(means) < 0.3 * np.std(plain)


def test_a_head_that_sees_all_keys_alike_has_an_entropy_of_1_and_one_that_sees_one_has_0() -> None:
    even_QK = torch.ones(5, 5).tril() / torch.arange(1.0, 6)[:, None]
    found_HQ = row_entropy(torch.stack([even_QK, torch.eye(5)]))
    torch.testing.assert_close(found_HQ, torch.tensor([[1.0] * 4, [0.0] * 4]).double())


def test_a_run_with_all_diagnostics_trains_as_without(tmp_path: Path) -> None:
    algorithm = replace(tiny(ttrl()), reward=RandomReward(), updates_per_step=2)
    names = ("advantage_flips", "attention_entropy", "off_policy")
    run = tiny_run(tmp_path, algorithm, learning_rate=1e-5, diagnostics=names)
    asked, plain = (
        make_trainer(run),
        make_trainer(replace(run, diagnostics=(), output=tmp_path / "plain")),
    )
    row, other = stepped(asked), stepped(plain)
    assert same_bits(weights(asked), weights(plain))
    assert len({stepped(one)["pack/tokens"] for one in (asked, plain)}) == 1
    told = {name: value for name, value in row.items() if name not in other}
    heads = {name for name in told if name.startswith("attention_entropy/")}
    config = asked.model.config
    assert len(heads) == config.num_hidden_layers * config.num_attention_heads
    errors = {"off_policy/reward_error", "off_policy/entropy_error", "off_policy/kl_error"}
    assert errors < set(told) - heads < set(MEANING) | errors
    assert all(0 < told[name] < 1 for name in heads)
    mean = np.mean([told[name] for name in heads])
    assert told["diagnostics/attention_entropy"] == pytest.approx(mean)
    assert abs(told["off_policy/reward"] - row["reward"]) < 0.2
    assert 0 < told["off_policy/samples"] < 12
    assert told["off_policy/kl"] > 0
