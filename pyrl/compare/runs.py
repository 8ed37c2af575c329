"""Runs: all that a comparison trains, one after the other or several at the same time."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from rich.console import Console

from pyrl.compare.contestants import Comparison, Contestant, parse_compare
from pyrl.compare.untrained import before_path, eval_sets, score_before
from pyrl.engine import EngineError, EngineFailure
from pyrl.report import Progress
from pyrl.run.interrupt import RESUME, sigterm_as_ctrl_c
from pyrl.run.lock import RunError
from pyrl.train import Trainer

FAILURES = (ValueError, OSError, ImportError, FloatingPointError, EngineError, EngineFailure)
"""What ends a run with a sentence."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A run, or the scores of the untrained model, of one seed."""

    contestant: int | None
    """Its place among the contestants; None: the untrained model."""
    seed: int

    def name(self, comparison: Comparison) -> str:
        """For the eyes."""
        who = "untrained" if self.contestant is None else self._of(comparison).label
        return f"{who}, seed {self.seed}"

    def _log(self, comparison: Comparison) -> Path:
        """Where what a run says on a terminal goes."""
        who = "untrained" if self.contestant is None else self._of(comparison).folder
        return comparison.settings.output / "log" / f"{who}-seed-{self.seed}.txt"

    def done(self, comparison: Comparison) -> bool:
        """It has left what it should: a run its report, which is the last but a picture."""
        if self.contestant is None:
            return before_path(comparison, self.seed).exists()
        run = self._of(comparison).of_seed(self.seed, comparison.settings.output)
        return (run.output / "report.json").exists()

    def __call__(self, comparison: Comparison) -> None:
        """Do it, or what is missing of it."""
        log = self._log(comparison)
        log.parent.mkdir(exist_ok=True)
        with (
            log.open("a", encoding="utf-8") as file,
            Progress(console=Console(file=file)) as progress,
        ):
            if self.contestant is None:
                score_before(comparison, self.seed, progress)
                return
            run = self._of(comparison).of_seed(self.seed, comparison.settings.output)
            trainer = Trainer(
                run, progress, scoring=comparison.scoring, eval_sets=eval_sets(comparison)
            )
            try:
                trainer.train()
            finally:
                trainer.close()

    def _of(self, comparison: Comparison) -> Contestant:
        assert self.contestant is not None
        return comparison.contestants[self.contestant]


def do_all(comparison: Comparison, tasks: Sequence[Task], say: Say) -> None:
    """Do the tasks that are not done, as many at the same time as there are workers.

    A failure ends the others, which go on where they were when the comparison is resumed.
    """
    tasks = [task for task in tasks if not task.done(comparison)]
    total = len(tasks)
    if comparison.settings.workers == 1:
        for number, task in enumerate(tasks, 1):
            say(f"{number} of {total}: {task.name(comparison)}")
            task(comparison)
        return
    waiting = list(enumerate(tasks, 1))
    working: dict[int, _Worker] = {}
    try:
        while waiting or working:
            while waiting and len(working) < comparison.settings.workers:
                number, task = waiting.pop(0)
                say(f"{number} of {total}: {task.name(comparison)}")
                worker = _Worker(comparison, task)
                working[worker.process.sentinel] = worker
            for sentinel in wait(list(working)):
                assert isinstance(sentinel, int)
                working.pop(sentinel).check(comparison)
    finally:
        for worker in working.values():
            worker.process.terminate()  # it saves its last finished step
        for worker in working.values():
            worker.process.join()


class _Worker:
    """A process with one task. It reads the command line again: a plugin's classes do not travel
    from one process to another."""

    def __init__(self, comparison: Comparison, task: Task) -> None:
        self.task = task
        self.says, theirs = multiprocessing.Pipe(duplex=False)
        self.process: SpawnProcess = multiprocessing.get_context("spawn").Process(
            target=_work, args=(comparison.argv, task, theirs)
        )
        self.process.start()
        theirs.close()

    def check(self, comparison: Comparison) -> None:
        """RunError, or the interruption, that has ended it."""
        self.process.join()
        code, name = self.process.exitcode, self.task.name(comparison)
        if code == 130:
            raise KeyboardInterrupt(RESUME)
        if code:
            said = self.says.recv() if self.says.poll() else f"its process ended with {code}"
            raise RunError(f"{name}: {said}")


def _work(argv: Sequence[str], task: Task, say: Connection[str, str]) -> None:
    """What a worker's process does."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with sigterm_as_ctrl_c():
            task(parse_compare(argv))
    except FAILURES as error:
        say.send(str(error))
        os._exit(2)
    except KeyboardInterrupt:
        os._exit(130)


def _end_with_parent() -> None:
    """A killed comparison leaves no process at work behind; its runs resume after any kill."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
