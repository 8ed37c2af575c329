"""Replay: which responses of earlier steps train again, and with which advantages."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, weights

from pyrl.methods import METHODS
from pyrl.methods.registry import choose
from pyrl.pack import TokenBatch, pack_given
from pyrl.replay import ROWS, Replay
from pyrl.reward import RandomReward


def step_of(reward: list[list[float]], advantage: list[float], first: int) -> Any:
    """A batch whose responses are numbered from `first`, with their rewards by question."""
    reward_N = np.array([r for group in reward for r in group])
    responses = [np.arange(first + n, 2 * (first + n) + 1) for n in range(len(reward_N))]
    length_N = [len(response) for response in responses]
    batch = pack_given(
        [np.array([1, first + n], np.int32) for n in range(len(reward_N))],
        responses,
        advantage_T=np.repeat(advantage, length_N),
        logprob_T=-np.arange(sum(length_N), dtype=np.float32),
    )
    group_N = np.repeat(np.arange(len(reward)), [len(group) for group in reward])
    return replace(batch, reward_N=reward_N), SimpleNamespace(reward_N=reward_N, group_N=group_N)


def rows(batch: TokenBatch) -> list[tuple[Any, ...]]:
    """What each response consists of."""
    found = []
    for n in range(len(batch)):
        one = batch.take(np.array([n]))
        found.append(tuple(tuple(vars(one)[name].tolist()) for name in (*ROWS, "advantage_T")))
    return found


def test_the_weight_and_the_advantages_are_those_of_the_page() -> None:
    """Step 50 of 200, and rewards against the median of seven prompts' means."""
    replay = Replay(capacity=3, rise=0.5)
    assert replay.weight(50 / 400) == pytest.approx(0.146447, abs=1e-6)
    state = replay.initial()
    batch, scored = step_of([[1.0, 0.3, 0.4]], [1.0, 1.0, 1.0], 5)
    replay.keep(state, batch, scored, 0)
    state["mean_G"] = np.array([0.1, 0.2, 0.25, 0.4, 0.5, 0.75, 1.0])
    again = replay.due(state, 0, 1.0)
    assert again is not None
    assert len(again) == 1
    np.testing.assert_allclose(again.advantage_T, 0.6)
    assert len(state["reward_N"]) == 0
    assert len(state["mean_G"]) == 7


def test_responses_come_back_as_they_were_and_old_ones_do_not() -> None:
    replay = Replay(capacity=4, oldest=1, rise=0.0)
    state, kept = replay.initial(), []
    steps = [([[1.0, 0.0]], [1.0, -1.0]), ([[0.9, 0.0], [0.0, 0.0]], [0.5, -0.5, 0.1, 0.0])]
    steps += [([[0.8, math.nan, 0.7]], [2.0, 0.0, 1.0])]
    for step, (reward, advantage) in enumerate(steps):
        assert replay.due(state, step, 0.5) is None
        batch, scored = step_of(reward, advantage, 3 * step + 2)
        replay.keep(state, batch, scored, step)
        kept += [(step, row) for row, a in zip(rows(batch), advantage, strict=True) if a > 0]
    assert state["step_N"].tolist() == [0, 1, 1, 2, 2]
    np.testing.assert_allclose(state["mean_G"], [0.5, 0.45, 0.0, 0.75])
    again = replay.due(state, 2, 0.5)
    assert again is not None
    median = 0.475
    expected = []
    for step, row in kept:
        reward = row[ROWS.index("reward_N")][0]
        if step >= 1 and reward > median:
            expected.append((*row[:-1], tuple([reward - median] * len(row[-1]))))
    found = rows(again)
    assert [row[:-1] for row in found] == [row[:-1] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row[-1] == pytest.approx(other[-1])
    assert replay.due(state, 3, 0.5) is None


def test_a_replay_without_weight_is_the_parent(tmp_path: Path) -> None:
    found = []
    for name, replay in (("off", Replay()), ("light", Replay(capacity=2, coef=0.0))):
        method = replace(METHODS["spear"](), replay=replay, reward=RandomReward())
        (tmp_path / name).mkdir()
        trainer = make_trainer(tiny_run(tmp_path / name, tiny(method, votes=4)))
        metrics = [stepped(trainer) for _ in range(2)]
        assert ("replay/held" in metrics[-1]) == bool(replay.capacity)
        found.append(weights(trainer))
    assert same_bits(*found)


def test_what_cannot_be_replayed_is_refused() -> None:
    spear = METHODS["spear"]()
    with pytest.raises(ValueError, match=r"replay\.capacity: expected 0 .*, got 2048: NucleusAnch"):
        choose(spear, loss="siren")
    for wrong, message in (
        ({"capacity": -1}, r"Replay\.capacity: expected >= 0, got -1"),
        ({"means": 0}, r"Replay\.means: expected >= 1, got 0"),
        ({"rise": 2.0}, r"Replay\.rise: expected a number in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Replay(**wrong)
