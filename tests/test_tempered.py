"""Answers at another temperature in the place of rows: which, where, and what trains on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, weights

from pyrl.methods import METHODS
from pyrl.pack import TokenBatch, pack_given
from pyrl.reward import RandomReward
from pyrl.run.directory import claim
from pyrl.tempered import Tempered, mixed


def test_the_temperature_falls_where_the_entropy_is_above_its_target() -> None:
    temper = Tempered(0.25)
    assert [temper.factor(entropy) for entropy in (0.2, 0.75, 0.76)] == [1.2, 1.2, 0.8]
    assert [temper.questions(count) for count in (1, 4, 5, 16)] == [1, 1, 2, 4]
    assert Tempered().questions(16) == 0


def test_right_answers_train_half_of_them_where_the_entropy_is_to_fall() -> None:
    advantage_N = np.array([1.2, 0.05, -1, 0.06, 0, 3, 1])
    assert Tempered().chosen(advantage_N, 0.1).tolist() == [0, 3, 5, 6]
    assert Tempered().chosen(advantage_N, 0.9).tolist() == [0, 3]
    assert Tempered(rows=3).chosen(advantage_N, 0.1).tolist() == [0, 3, 5]
    assert Tempered(rows=3).chosen(advantage_N, 0.9).tolist() == [0]


def rows(*length_N: int, first: int) -> TokenBatch:
    """Responses of these lengths whose tokens count up from `first`."""
    ends = np.cumsum(length_N)
    token_N = np.split(np.arange(first, first + ends[-1]), ends[:-1])
    prompt = np.zeros(2, np.int32)
    return replace(
        pack_given([prompt] * len(length_N), token_N, advantage_T=np.full(ends[-1], float(first))),
        reward_N=np.full(len(length_N), first / 100),
    )


def test_rows_of_a_question_are_replaced_from_the_last_on() -> None:
    own, group_N = rows(1, 2, 3, 1, 2, first=100), np.array([0, 0, 0, 2, 2])
    other = rows(4, 1, 2, 1, 1, first=200)
    batch, replaced = mixed(own, group_N, other, np.array([0, 0, 2, 2, 2]))
    assert replaced == 4  # the fifth finds no place
    starts = [int(batch.label_T[at]) for at in batch.token_offset_N1[:-1]]
    assert starts == [100, 204, 200, 207, 205]
    assert np.diff(batch.token_offset_N1).tolist() == [1, 1, 4, 1, 2]
    assert batch.advantage_T.tolist() == [100.0] + [200.0] * 8
    assert batch.reward_N is not None
    assert batch.reward_N.tolist() == [1, 2, 2, 2, 2]
    assert batch.input_I[batch.input_offset_N1[2] :][:6].tolist() == [0, 0, 200, 201, 202, 203]
    assert mixed(own, group_N, other, np.full(5, 7)) == (own, 0)


def test_a_run_of_aepo_trains_on_them_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    parent = replace(tiny(METHODS["grpo"](), updates=2), reward=RandomReward())
    child = replace(parent, temper=Tempered(1.0, target=9.0))
    run = tiny_run(tmp_path, child, learning_rate=1e-5, resume=True)
    claim(run)
    trainer = make_trainer(run)
    row = stepped(trainer)
    assert row["temper/factor"] == 1.2
    assert 0 < row["temper/rows"] < 12
    assert row["sampling/sampling_logp_difference/max"] < 1e-3
    assert row["num_tokens"] > row["temper/tokens"] > 12
    plain = make_trainer(tiny_run(tmp_path, parent, learning_rate=1e-5, output=tmp_path / "plain"))
    assert stepped(plain)["reward"] == row["reward"]
    assert not same_bits(weights(trainer), weights(plain))
    trainer.save()
    trainer.lock.release()
    again = make_trainer(run)
    rows = [stepped(one) for one in (trainer, again)]
    assert rows[0]["temper/rows"] == rows[1]["temper/rows"]
    assert same_bits(weights(trainer), weights(again))


def test_numbers_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 0 < low <= 1 <= high, got low=1\.1"):
        Tempered(low=1.1)
    with pytest.raises(ValueError, match=r"temper\.share: expected 0 beside fork=WithoutReplac"):
        replace(METHODS["grpo_unique"](), temper=Tempered(0.5))
