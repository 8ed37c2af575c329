"""Runs of several processes that more than one file compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked_runs import fork_server
from ranked_runs import STEPS, Job, start_job
from short_run import ECHO, SETTINGS, outcome, write_questions


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fork_server(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def start(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    def started(*commands: list[str], folders: Sequence[Path] = ()) -> Job:
        return start_job(context, tmp_path_factory.mktemp("said"), commands, folders)

    return started


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    questions = write_questions(tmp_path_factory.mktemp("data") / "questions.jsonl")

    def given(output: Path, *more: str) -> list[str]:
        where = ["--data", str(questions), "--output", str(output), "--steps", str(STEPS)]
        # A distance from the first model, which reads it, and two updates a step.
        loss = ["--loss.kl.coef", "0.1", "--updates-per-step", "2"]
        return ["train", "echo", *SETTINGS, *ECHO, *where, *loss, "--save-every", "1", *more]

    return given


@pytest.fixture(scope="session")
def one(
    start: Callable[..., Job],
    options: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the run leaves that is one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    job = start(options(output))
    assert job.end() == [0], job.said[0].read_text()
    return outcome(output, STEPS)
