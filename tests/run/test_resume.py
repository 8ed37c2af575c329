"""A run that was killed or interrupted goes on and ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import fork_server
from rich.console import Console
from short_run import ECHO, SETTINGS, outcome, write_questions
from tiny_run import make_trainer, tiny, tiny_run

from pyrl import cli
from pyrl.demo.run import ttrl
from pyrl.engine import EngineFailure
from pyrl.methods import METHODS
from pyrl.prompts import repeating_steps, step_prompts
from pyrl.report import Progress
from pyrl.report.metrics import read_metrics
from pyrl.rollout import Rollout
from pyrl.run import checkpoint, results
from pyrl.run.parsing import parse_run
from pyrl.train import Trainer

STEPS = 6
KILLS = 10
"""For each of the two ways to save: twenty in all."""
REACH = {1: 0.5, 3: 0.7}
"""Latest kill, as a share of a whole run: far enough that a run gets beyond its next checkpoint."""


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
        every = ["--save-every", "1", "--eval-every", "2", "--save-trees", "2"]
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
    return fork_server(tmp_path_factory.mktemp("elsewhere"))


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
        while True:
            moment = moments.uniform(0, seconds * REACH[save_every])
            # After the last kill a run is left alone: on a machine that has become slower since
            # the measurement none would ever get from one checkpoint to the next.
            if run_until(processes, given, moment if kills < KILLS else None) is not None:
                break
            kills += 1
            if (output / "run.yaml").exists() and given[-1] != "--resume":
                given.append("--resume")
        assert outcome(output, STEPS) == uninterrupted
    assert runs <= KILLS, "the kills came too late to hit a run at work"


def test_a_second_process_on_the_directory_of_a_run_is_refused_and_the_run_does_not_notice(
    options: Options,
    uninterrupted: dict[str, Any],
    processes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = options(tmp_path / "run")
    here, there = processes.Pipe()
    process = processes.Process(target=attempt, args=(given, there))
    process.start()
    assert here.recv() == "ready"
    os.kill(process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.delattr("pyrl.run.setup.load_model")  # the answer comes before
        for more in ([], ["--resume"]):
            with pytest.raises(SystemExit) as stop:
                cli.main(["train", "echo", *given, *more])
            assert stop.value.code == 2
            assert f"it is in use by process {process.pid} on " in capsys.readouterr().err
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert outcome(tmp_path / "run", STEPS) == uninterrupted


def interrupt_at(
    place: tuple[type, str, int],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals = signal.SIGINT,
) -> None:
    """Press Ctrl-C inside the given call of a method, before it does its work."""
    owner, name, count = place
    method = getattr(owner, name)
    calls = 0

    def pressed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return method(*args, **options)

    monkeypatch.setattr(owner, name, pressed)


@pytest.mark.parametrize(
    ("place", "finished", "number"),
    [
        ((Rollout, "engine_step", 3), 0, signal.SIGINT),
        ((Rollout, "_prune", 3), None, signal.SIGINT),
        ((Rollout, "run", 6), 2, signal.SIGTERM),
        ((torch.optim.AdamW, "step", 9), 3, signal.SIGTERM),
        ((Rollout, "run", 14), 6, signal.SIGINT),
    ],
    ids=["evaluation before", "sampling", "evaluation between", "update", "evaluation after"],
)
def test_ctrl_c_and_sigterm_save_the_last_finished_step_and_the_run_goes_on_from_it(
    place: tuple[type, str, int],
    finished: int | None,
    number: signal.Signals,
    options: Options,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = options(tmp_path / "run", "--save-every", "100")
    with monkeypatch.context() as patch:
        interrupt_at(place, patch, number)
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "echo", *given])
    assert stop.value.code == 130
    assert "--resume to go on" in capsys.readouterr().err
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert finished is None or found.step == finished
    train([*given, "--resume"])
    assert outcome(tmp_path / "run", STEPS) == uninterrupted


def test_an_engine_that_the_same_signal_ends_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler signals all processes of a job: those of vLLM as well."""
    trainer = make_trainer(tiny_run(tmp_path, eval_before=False))

    def ended(rollout: Rollout) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise EngineFailure("the engine has ended")

    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "run", ended)
        with pytest.raises(KeyboardInterrupt, match="--resume to go on"):
            trainer.train()
    found = checkpoint.latest(trainer.run.output)
    assert found is not None
    assert found.step == 0


def test_a_signal_while_the_results_are_written_does_not_stop_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path, steps=1, eval_before=False, eval_after=False)
    interrupt_at((results.Report, "save", 1), monkeypatch, signal.SIGTERM)
    make_trainer(run).train()
    assert (run.output / "curves.png").is_file()


def test_a_run_that_goes_on_for_longer_says_what_that_does_to_the_learning_rate(
    tmp_path: Path,
) -> None:
    rate = {"learning_rate": 1e-6, "schedule": "linear", "eval_before": False, "eval_after": False}
    run = tiny_run(tmp_path, tiny(ttrl(), updates=2), steps=2, **rate)
    make_trainer(run).train()
    longer = make_trainer(replace(run, resume=True, steps=4))
    (said,) = longer.first_words
    assert "Resumed with --steps 4 in the place of 2: the schedule 'linear'" in said
    longer.train()
    third = read_metrics(run.output / "metrics.jsonl")[3]["learning_rate"]
    assert f"step 3 has the learning rate {third:.3g} where 5e-08 would have been next" in said
    assert make_trainer(replace(run, resume=True, steps=4)).first_words == ()


def test_a_constant_rate_has_nothing_to_say(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(ttrl(), updates=2), steps=1, eval_before=False, eval_after=False)
    make_trainer(run).train()
    assert make_trainer(replace(run, resume=True, steps=4)).first_words == ()


def test_questions_that_come_more_than_once_in_a_step_are_said(tmp_path: Path) -> None:
    """Of 4 questions 3 a step: two orders meet in step 2 and in step 3."""
    run = tiny_run(tmp_path, tiny(ttrl(), updates=2), steps=3, prompts_per_step=3)
    trainer = make_trainer(run)
    indices = [
        [prompt.index for prompt in step_prompts(trainer.prompts, step, 3, run.seed)]
        for step in range(3)
    ]
    repeating = sum(len(set(step)) < 3 for step in indices)
    assert repeating
    (said,) = trainer.first_words
    assert said.startswith(f"In {repeating} of 3 steps a question comes more than once")
    assert said.endswith("questions.jsonl has 4 questions, --prompts-per-step is 3.")
    assert repeating_steps(trainer.prompts, 3, 5, 0) == 3
    assert repeating_steps(trainer.prompts, 3, 2, 0) == 0


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
