"""A run that was killed or interrupted goes on and ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from short_run import ECHO, SETTINGS, outcome, write_questions

from pyrl import cli
from pyrl.methods import METHODS
from pyrl.report import Progress
from pyrl.rollout import Rollout
from pyrl.run import checkpoint
from pyrl.run.config import parse_run
from pyrl.train import Trainer

STEPS = 6
KILLS = 10
"""For each of the two ways to save: twenty in all."""
REACH = {1: 0.5, 3: 0.7}
"""Latest kill, as a share of a whole run: far enough that a run gets beyond its next checkpoint."""

PRELOAD = [
    "pyrl.train",
    "pyrl.methods",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rich.console",
]
"""What a run imports, so that a process for it starts in a moment."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared: sums in another order are other bits."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data") / "questions.jsonl")


Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def options(questions: Path) -> Options:
    def given(output: Path, *more: str) -> list[str]:
        data = ["--data", str(questions), "--output", str(output), "--steps", str(STEPS)]
        every = ["--save-every", "1", "--eval-every", "2"]
        return [*SETTINGS, *ECHO, *data, *every, *more]

    return given


@pytest.fixture(scope="module")
def uninterrupted(options: Options, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("whole") / "run"
    train(options(output))
    return outcome(output, STEPS)


def train(options: list[str], ready: Callable[[], None] = lambda: None) -> None:
    run = parse_run(options, "echo", METHODS["echo"]())
    with Progress(console=Console(file=StringIO())) as progress:
        trainer = Trainer(run, progress)
        ready()
        trainer.train()


def attempt(options: list[str], connection: Connection) -> None:
    train(options, ready=lambda: connection.send("ready"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Children are forked off a server that has imported everything once.

    The server looks for modules in its working directory first: it starts away from the source
    tree, whose pyrl/ has no compiled part after an install from a wheel.
    """
    before, directory = os.environ.get("OMP_NUM_THREADS"), Path.cwd()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    first = context.Process(target=int)
    first.start()
    first.join()
    os.chdir(directory)
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


def run_until(processes: Any, options: list[str], kill_after: float | None) -> float | None:
    """Run in a process of its own: the seconds that it took, or None if it was killed before."""
    here, there = processes.Pipe()
    process = processes.Process(target=attempt, args=(options, there))
    process.start()
    there.close()
    assert here.recv() == "ready"
    started = time.monotonic()
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return None if process.exitcode else time.monotonic() - started


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_run_killed_at_random_moments_again_and_again_ends_with_the_same_bits(
    save_every: int,
    options: Options,
    uninterrupted: dict[str, Any],
    processes: Any,
    tmp_path: Path,
) -> None:
    seconds = run_until(processes, options(tmp_path / "timed"), None)
    assert seconds is not None
    moments = random.Random(save_every)
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        output = tmp_path / f"run{runs}"
        given = options(output, "--save-every", str(save_every))
        while run_until(processes, given, moments.uniform(0, seconds * REACH[save_every])) is None:
            kills += 1
            if (output / "run.yaml").exists() and given[-1] != "--resume":
                given.append("--resume")
        assert outcome(output, STEPS) == uninterrupted
    assert runs <= KILLS, "the kills came too late to hit a run at work"


def interrupt_at(place: tuple[type, str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C inside the given call of a method, before it does its work."""
    owner, name, count = place
    method = getattr(owner, name)
    calls = 0

    def pressed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGINT)
        return method(*args, **options)

    monkeypatch.setattr(owner, name, pressed)


@pytest.mark.parametrize(
    ("place", "finished"),
    [
        ((Rollout, "engine_step", 3), 0),
        ((Rollout, "_prune", 3), None),
        ((Rollout, "run", 6), 2),
        ((torch.optim.AdamW, "step", 3), 3),
        ((Rollout, "run", 14), 6),
    ],
    ids=["evaluation before", "sampling", "evaluation between", "update", "evaluation after"],
)
def test_ctrl_c_saves_the_last_finished_step_and_the_run_goes_on_from_it(
    place: tuple[type, str, int],
    finished: int | None,
    options: Options,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = options(tmp_path / "run", "--save-every", "100")
    with monkeypatch.context() as patch:
        interrupt_at(place, patch)
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "echo", *given])
    assert stop.value.code == 130
    assert "--resume to go on" in capsys.readouterr().err
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert finished is None or found.step == finished
    train([*given, "--resume"])
    assert outcome(tmp_path / "run", STEPS) == uninterrupted


def test_resuming_a_finished_run_only_reports(
    options: Options, uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(options(tmp_path / "run"))
    (tmp_path / "run" / "report.md").unlink()
    monkeypatch.delattr(Rollout, "run")
    train(options(tmp_path / "run", "--resume"))
    assert (tmp_path / "run" / "report.md").is_file()
    assert outcome(tmp_path / "run", STEPS) == uninterrupted


def test_a_run_that_is_resumed_with_fewer_steps_is_evaluated_at_its_end(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at((torch.optim.AdamW, "step", 3), patch)
        with pytest.raises(KeyboardInterrupt):
            train(options(tmp_path / "run"))
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found.step < STEPS
    train([*options(tmp_path / "run"), "--resume", "--steps", str(found.step)])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {row["model"] for row in report["evaluations"]} == {"before", "after"}
