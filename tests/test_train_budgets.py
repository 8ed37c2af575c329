"""Steps whose sampling is cut short: they train on what there is, and say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_trainer, stepped, tiny, tiny_run, trained

from pyrl.algorithm import Algorithm, Sample
from pyrl.demo.run import echo, ettrl, ttrl
from pyrl.methods import METHODS
from pyrl.report.metrics import MEANING
from pyrl.run.parsing import load_run, parse_run, save_run
from pyrl.select import Dynamic, First, Select


def limited(algorithm: Algorithm, **limits: Any) -> Algorithm:
    return replace(algorithm, sample=replace(algorithm.sample, **limits))


@pytest.mark.parametrize("make", [ttrl, ettrl, echo])
def test_a_step_out_of_tokens_trains_on_fewer_and_cut_answers(make: Any, tmp_path: Path) -> None:
    algorithm = limited(tiny(make(), votes=8), max_tokens_per_prompt=100)
    trainer, (row,) = trained(tiny_run(tmp_path, algorithm, max_rows=8), 1)
    assert 0 < row["tree/out_of_tokens"] <= 1
    assert row["tree/out_of_time"] == 0
    assert row["tree/cut_leaves"] > 0
    assert row["loss"] is not None
    assert {name for name in row if name.startswith("tree/")} <= MEANING.keys()
    assert trainer.observer.tokens <= 2 * 100


@pytest.mark.parametrize("select", [First(), Dynamic()], ids=repr)
def test_a_step_without_time_leaves_a_token_of_each_question(
    select: Select, tmp_path: Path
) -> None:
    algorithm = replace(limited(tiny(ttrl()), max_seconds=1e-9), select=select)
    trainer, (row,) = trained(tiny_run(tmp_path, algorithm), 1)
    assert (row["tree/out_of_time"], row["tree/leaves"], row["num_tokens"]) == (1, 2, 2)
    assert "loss" not in row  # nothing was answered
    assert trainer.step == 1


def test_a_step_stops_questions_that_are_decided(tmp_path: Path) -> None:
    algorithm = limited(tiny(ttrl(), votes=24, train=3), stop_when_decided=True)
    _, (row,) = trained(tiny_run(tmp_path, algorithm, max_rows=8), 1)
    assert row["tree/decided"] > 0
    assert row["tree/leaves"] + row["tree/unneeded"] + row["tree/unopened"] == 48
    assert row["tree/leaves"] < 48
    assert row["loss"] is not None
    assert {name for name in row if name.startswith("tree/")} <= MEANING.keys()


def test_a_run_without_limits_has_no_metrics_of_them(tmp_path: Path) -> None:
    row = stepped(make_trainer(tiny_run(tmp_path)))
    assert not {"tree/out_of_tokens", "tree/out_of_time", "tree/decided"} & row.keys()


def test_the_limits_are_settings(tmp_path: Path) -> None:
    options = ["--model", "demo", "--data", "x.jsonl", "--sample.max-tokens-per-prompt", "9000",
               "--sample.max-seconds", "2.5", "--sample.stop-when-decided"]  # fmt: skip
    run = parse_run(options, "ttrl", METHODS["ttrl"]())
    sample = run.algorithm.sample
    assert sample.stop_when_decided
    assert (sample.allowance().tokens, sample.allowance().seconds) == (9000, 2.5)
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml", METHODS) == run


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_tokens_per_prompt": 63}, "a token for each of the 64 votes, got 63"),
        ({"max_tokens_per_prompt": -1}, "a token for each of the 64 votes, got -1"),
        ({"max_seconds": -0.1}, "sample.max_seconds: expected >= 0"),
        ({"max_seconds": float("nan")}, "sample.max_seconds: expected >= 0"),
        ({"train": 64, "stop_when_decided": True}, "expected train < votes"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sample(**{"votes": 64, "train": 32} | limits)
