"""Several processes of one run end as one process does, whichever of them is killed when."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked_runs import fork_server
from numpy.typing import NDArray
from safetensors.numpy import load
from short_run import ECHO, SETTINGS, outcome, write_questions
from tiny_run import tiny_run

from pyrl import cli
from pyrl.ranks import Ranks, RanksError
from pyrl.ranks.joining import joined
from pyrl.run.lock import RunError
from pyrl.run.sameness import check_ranks
from pyrl.train import Trainer

STEPS = 5
ROUNDING = 1e-6
"""Of float32 weights after these steps: gradients are sums in another order."""

Options = Callable[..., list[str]]


@dataclass
class Job:
    """The ranks of a run, as torchrun starts them."""

    ranks: list[Any]
    said: list[Path]

    def end(self) -> list[int]:
        """Wait for all of them; their exit codes."""
        for rank in self.ranks:
            rank.join(60)
        return [rank.exitcode for rank in self.ranks]


def rank_main(command: list[str], place: dict[str, str], said: Path, folder: Path) -> None:
    os.environ.update(place)
    os.chdir(folder)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        cli.main(command)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    context = fork_server(tmp_path_factory.mktemp("elsewhere"))

    def started(*commands: list[str], folders: Sequence[Path] = ()) -> Job:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        size, folder = str(len(commands)), tmp_path_factory.mktemp("said")
        sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        job = Job([], [folder / str(rank) for rank in range(len(commands))])
        for rank, command in enumerate(commands):
            place = address | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            where = (job.said[rank], folders[rank] if folders else folder)
            process = context.Process(target=rank_main, args=(command, place, *where))
            process.start()
            job.ranks.append(process)
        return job

    return started


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    questions = write_questions(tmp_path_factory.mktemp("data") / "questions.jsonl")

    def given(output: Path, *more: str) -> list[str]:
        where = ["--data", str(questions), "--output", str(output), "--steps", str(STEPS)]
        # A distance from the first model, which reads it, and two updates a step.
        loss = ["--loss.kl.coef", "0.1", "--updates-per-step", "2"]
        return ["train", "echo", *SETTINGS, *ECHO, *where, *loss, "--save-every", "1", *more]

    return given


@pytest.fixture(scope="module")
def two(
    start: Callable[..., Job], options: Options, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `pyrl train --processes 2` leaves, which starts the second process."""
    output = tmp_path_factory.mktemp("two") / "run"
    job = start(options(output, "--processes", "2"))
    assert job.end() == [0], job.said[0].read_text()
    return outcome(output, STEPS)


def weights(found: dict[str, Any]) -> NDArray[np.float64]:
    tensors = load(found["model.safetensors"])
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


def numbers(row: dict[str, float | None]) -> dict[str, float]:
    """Of a step, without that of tokens that passes read again: there are more passes."""
    found = {name: math.nan if value is None else value for name, value in row.items()}
    return found | {"pack/repeated": 0.0}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights and all numbers of two runs are the same, up to rounding."""
    distance = np.linalg.norm(weights(found) - weights(expected))
    assert distance <= ROUNDING * np.linalg.norm(weights(expected))
    for row, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-4, abs=1e-5, nan_ok=True)
    assert found["completions"] == expected["completions"]
    assert found["report"]["evaluations"] == expected["report"]["evaluations"]


def test_two_processes_end_as_one(
    start: Callable[..., Job], options: Options, two: dict[str, Any], tmp_path: Path
) -> None:
    assert start(options(tmp_path / "run")).end() == [0]
    one = outcome(tmp_path / "run", STEPS)
    assert one["model"] != two["model"]  # sums have another order
    assert_same(two, one)


def test_two_processes_train_an_adapter_as_one(
    start: Callable[..., Job], options: Options, tmp_path: Path
) -> None:
    found = []
    for count in (1, 2):
        output = tmp_path / str(count)
        command = options(output, "--lora.rank", "4", "--no-eval-before", "--no-eval-after")
        assert start(*[[*command, "--steps", "2"]] * count).end() == [0] * count
        tensors = load((output / "checkpoint-2" / "adapter_model.safetensors").read_bytes())
        found.append(np.concatenate([tensors[name].ravel() for name in sorted(tensors)]))
    assert np.linalg.norm(found[0] - found[1]) <= ROUNDING * np.linalg.norm(found[0])


def test_whichever_process_is_killed_all_end_and_a_resumed_run_has_the_same_bits(
    start: Callable[..., Job], options: Options, two: dict[str, Any], tmp_path: Path
) -> None:
    output, dice = tmp_path / "run", random.Random(0)
    for killed, step in ((1, dice.randint(1, 2)), (0, dice.randint(3, 4))):
        more = ["--resume"] if output.exists() else []
        job = start(*[options(output, *more)] * 2)
        wait_for(output / f"checkpoint-{step}", job)
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
    wait_for(output / "checkpoint-1", job)
    for rank in job.ranks:
        os.kill(rank.pid, signal.SIGINT)
    assert job.end() == [130, 3]
    assert "--resume to go on after the last finished step" in job.said[0].read_text()
    assert start(options(output, "--resume")).end() == [0]
    assert_same(outcome(output, STEPS), two)


def wait_for(path: Path, job: Job) -> None:
    """Until the run has written it."""
    while not path.exists():
        assert job.ranks[0].is_alive(), job.said[0].read_text()
        time.sleep(0.005)


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
