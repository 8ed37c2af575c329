"""Several processes of one run end as one process does, whichever of them is killed when."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranked_runs import ROUNDING, STEPS, Job, assert_same, flat
from short_run import SETTINGS, outcome, write_questions
from tiny_run import tiny_run

from pyrl.ranks import Ranks, RanksError
from pyrl.ranks.joining import joined
from pyrl.run.lock import RunError
from pyrl.run.sameness import check_ranks
from pyrl.train import Trainer

Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def two(
    start: Callable[..., Job], options: Options, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `pyrl train --processes 2` leaves, which starts the second process."""
    output = tmp_path_factory.mktemp("two") / "run"
    job = start(options(output, "--processes", "2"))
    assert job.end() == [0], job.said[0].read_text()
    return outcome(output, STEPS)


def test_two_processes_end_as_one(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["model"] != two["model"]  # sums have another order
    assert_same(two, one)


def test_two_processes_train_an_adapter_as_one(
    start: Callable[..., Job], options: Options, tmp_path: Path
) -> None:
    found = []
    for count, more in ((1, []), (2, []), (2, ["--shard"])):
        output = tmp_path / str(len(found))
        command = options(output, "--lora.rank", "4", "--no-eval-before", "--no-eval-after", *more)
        assert start(*[[*command, "--steps", "2"]] * count).end() == [0] * count
        found.append(flat((output / "checkpoint-2" / "adapter_model.safetensors").read_bytes()))
    for other in found[1:]:
        assert np.linalg.norm(other - found[0]) <= ROUNDING * np.linalg.norm(found[0])


def test_whichever_process_is_killed_all_end_and_a_resumed_run_has_the_same_bits(
    start: Callable[..., Job], options: Options, two: dict[str, Any], tmp_path: Path
) -> None:
    output, dice = tmp_path / "run", random.Random(0)
    for killed, step in ((1, dice.randint(1, 2)), (0, dice.randint(3, 4))):
        more = ["--resume"] if output.exists() else []
        job = start(*[options(output, *more)] * 2)
        job.wait_for(output / f"checkpoint-{step}")
        time.sleep(dice.uniform(0, 0.1))
        job.ranks[killed].kill()
        codes = job.end()
        assert codes[killed] == -signal.SIGKILL
        assert codes[1 - killed] == 3
        if killed:  # the leader says what happened
            said = job.said[0].read_text()
            assert "at least one has ended; the same command with --resume" in said
    assert start(*[options(output, "--resume")] * 2).end() == [0, 0]
    assert outcome(output, STEPS) == two


def test_ctrl_c_reaches_all_and_one_process_goes_on(
    start: Callable[..., Job], options: Options, two: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    job = start(*[options(output)] * 2)
    job.wait_for(output / "checkpoint-1")
    for rank in job.ranks:
        os.kill(rank.pid, signal.SIGINT)
    assert job.end() == [130, 3]
    assert "--resume to go on after the last finished step" in job.said[0].read_text()
    assert start(options(output, "--resume")).end() == [0]
    assert_same(outcome(output, STEPS), two)


def test_other_settings_in_one_process_are_named(
    start: Callable[..., Job], options: Options, tmp_path: Path
) -> None:
    job = start(*[options(tmp_path / "run", "--seed", seed) for seed in "01"])
    assert job.end() == [2, 3]
    assert job.said[0].read_text().splitlines()[-1] == (
        "pyrl: process 1: expected the same settings as in process 0, these differ: "
        "seed (there 1, in process 0 0)"
    )
    assert not (tmp_path / "run").exists()


def test_other_data_in_one_process_are_named(start: Callable[..., Job], tmp_path: Path) -> None:
    """The same name, but not the same questions: each machine has a file of its own."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for place, folder in enumerate(folders):
        folder.mkdir()
        write_questions(folder / "questions.jsonl", answers=not place)
    command = ["train", "ttrl", *SETTINGS, "--data", "questions.jsonl"]
    job = start(command, command, folders=folders)
    assert job.end()[0] == 2
    said = job.said[0].read_text().splitlines()[-1]
    assert said.startswith("pyrl: process 1: expected the same data and weights as in process 0")
    assert "digest of the questions (there " in said
    assert "bits" not in said


def test_too_many_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, prompts_per_step=2)
    with pytest.raises(RanksError, match=r"prompts_per_step: .* for each of 3 processes, got 2"):
        check_ranks(run, Ranks(size=3))
    with pytest.raises(RanksError, match="engine: expected 'hf' for 2 processes, got 'vllm'"):
        check_ranks(replace(run, engine="vllm"), Ranks(size=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Ranks(0, 2, 0).device(torch.device("cuda")) == torch.device("cuda:0")
    with pytest.raises(RanksError, match="device: expected a GPU for each process, got 1"):
        Ranks(1, 2, 1).device(torch.device("cuda"))


def test_other_numbers_of_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = r"processes: expected as many as torchrun has started, 2 .* got 3"
    with pytest.raises(RanksError, match=said), joined([], 3):
        raise AssertionError
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RunError, match="processes: expected 1 for a Trainer that Python makes"):
        Trainer(tiny_run(tmp_path, processes=2))
