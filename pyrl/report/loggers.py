"""Loggers beside metrics.jsonl: TensorBoard, and the services Weights & Biases and trackio."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

Logger = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class Started:
    """What a logger is told of a run as it begins or goes on."""

    output: Path
    settings: Mapping[str, Any]
    """Nested, as in run.yaml."""
    resume_at: int | None
    """The first step that is written; None: the run begins."""
    sent: int
    """The last step that was written before."""

    @property
    def project(self) -> str:
        """Named by the variable WANDB_PROJECT."""
        return os.environ.get("WANDB_PROJECT") or "pyrl"

    @property
    def name(self) -> str:
        """Named by the variable WANDB_NAME, or as the output directory."""
        return os.environ.get("WANDB_NAME") or self.output.name


class Sink(Protocol):
    """A logger of one run."""

    def write(self, step: int, row: Mapping[str, float]) -> None: ...
    def write_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run: Started) -> None:
        tensorboard = _import("torch.utils.tensorboard", "tensorboard")
        # TensorBoard hides what an earlier process wrote for the steps that now come again.
        self._writer = tensorboard.SummaryWriter(
            str(run.output / "tensorboard"), purge_step=run.resume_at
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """None: TensorBoard has no tables."""

    def close(self) -> None:
        self._writer.close()


class _Service:
    """Weights & Biases, and what is called as it is: a table of completions beside the numbers."""

    def __init__(self, run: Started, module: ModuleType, log: Callable[..., None]) -> None:
        self._sent, self._module, self._log = run.sent, module, log

    # A resumed run repeats its steps exactly: what was sent before is not sent again.
    def write(self, step: int, row: Mapping[str, float]) -> None:
        if step > self._sent:
            self._log(dict(row), step=step)

    def write_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if step > self._sent:
            from pandas import DataFrame

            table = self._module.Table(dataframe=DataFrame(list(rows), dtype=object))
            self._log({"completions": table}, step=step)


class _Wandb(_Service):
    def __init__(self, run: Started) -> None:
        wandb = _import("wandb", "wandb")
        id_path = run.output / "wandb_id.txt"
        if run.resume_at is None or not id_path.exists():
            id_path.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            config=dict(run.settings),
            dir=str(run.output),
            id=id_path.read_text(),
            resume="allow",
        )
        super().__init__(run, wandb, self._run.log)

    def close(self) -> None:
        self._run.finish()


class _Trackio(_Service):
    def __init__(self, run: Started) -> None:
        trackio = _import("trackio", "trackio")
        trackio.init(
            project=run.project,
            name=run.name,
            config=dict(run.settings),
            resume="never" if run.resume_at is None else "allow",
        )
        super().__init__(run, trackio, trackio.log)

    def close(self) -> None:
        self._module.finish()


def _import(module: str, package: Logger) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the logger {package!r} needs the package {package}: "
            f"`pip install {package}`, or leave it out of --loggers"
        ) from error


LOGGERS: dict[str, Callable[[Started], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
