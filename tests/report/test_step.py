"""Metrics of a step: they come from its record, whatever the method's choices report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tiny_run import make_trainer, stepped, tiny, tiny_run

from pyrl.demo.run import ttrl
from pyrl.leaves import Scored
from pyrl.report.step import reward_metrics
from pyrl.reward import RandomReward


@dataclass(frozen=True)
class Rewards:
    """The rewards themselves: a first stage that reports nothing."""

    def __call__(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.nan_to_num(scored.reward_N)[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: NDArray[np.float64]) -> dict[str, float]:
        return {}


def test_rewards_are_reported_whatever_stage_comes_first(tmp_path: Path) -> None:
    algorithm = replace(tiny(ttrl()), advantage=(Rewards(),), reward=RandomReward(p=1))
    row = stepped(make_trainer(tiny_run(tmp_path, algorithm)))
    assert row["frac_reward_zero_std"] == 1
    assert row["advantage/reward_unknown"] == 0
    assert row["reward"] == 1


def test_sampled_tokens_add_up_over_the_steps_of_a_run(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_run(tmp_path))
    rows, sampled = [], []
    for _ in range(2):
        step = trainer.train_step()
        sampled.append(step.rollout.counts.sampled_tokens)
        rows.append(trainer.observe(step))
    assert [row["num_tokens"] for row in rows] == [sampled[0], sum(sampled)]
    assert trainer.observer.state_dict()["tokens"] == sum(sampled)


def test_unknown_rewards_take_no_part_in_the_metrics() -> None:
    nan = np.nan
    metrics = reward_metrics(
        np.array([0, 0, 0, 1, 1, 2, 3]), np.array([0.0, 1.0, nan, 1.0, nan, nan, 2.0])
    )
    assert metrics == {
        "advantage/reward_unknown": 3 / 7,
        "frac_reward_zero_std": 3 / 4,
        "reward": 1.0,
        "reward_std": 0.5 / 3,
    }


def test_a_step_without_leaves_that_train_has_no_mean_reward() -> None:
    nothing = np.zeros(0)
    assert reward_metrics(nothing.astype(np.int64), nothing) == {
        "advantage/reward_unknown": 0.0,
        "frac_reward_zero_std": 1.0,
    }
