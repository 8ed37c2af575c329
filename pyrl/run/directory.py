"""Run directory: whose it is, with which settings, and where its run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pyrl._core.tree import Forest
from pyrl.engine import EngineFailure
from pyrl.prompts import Prompt
from pyrl.run import checkpoint, log
from pyrl.run.checkpoint import Checkpoint
from pyrl.run.config import Run
from pyrl.run.lock import LOCK, RunError
from pyrl.run.names import KEYS
from pyrl.run.parsing import CHOICES, save_run

SETTINGS = "run.yaml"

FREE = frozenset(
    {
        "resume",
        "output",
        "steps",
        "device",
        "threads",
        "processes",
        "shard",
        "max_rows",
        "tokens_per_pass",
        "gradient_checkpointing",
        "save_every",
        "keep_checkpoints",
        "eval_every",
        "eval_before",
        "eval_after",
        "eval_data",
        "eval_samples",
        "save_trees",
        "loggers",
        "diagnostics",
        "call_time_limit",
        "vllm",
        "tinker",
        "remote",
        "lora.merge",
        "plugin",
        # A name gives classes and numbers, and these are compared.
        *(f"{kind}.name" for kind in KEYS),
    }
)
"""What a resumed run may change: how long, where and how it is watched, not what it learns."""


def find_start(run: Run) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a run that begins; nothing is written.

    RunError if the directory holds another run, or nothing to resume, or if its log is not the one
    that the run has written; CheckpointError if its newest checkpoint is damaged.
    """
    settings = run.output / SETTINGS
    if not run.resume:
        if run.output.exists() and {path.name for path in run.output.iterdir()} - {LOCK}:
            raise RunError(
                f"{run.output}: expected a new or empty directory, it holds a run already; "
                f"choose another --output, or go on with --resume"
            )
        return None
    if not settings.is_file():
        raise RunError(f"{run.output}: nothing to resume, there is no {SETTINGS}")
    _check_same(run, settings)
    found = checkpoint.latest(run.output)
    if found and found.step > run.steps:
        raise RunError(f"{found.path}: expected at most --steps {run.steps}, it has {found.step}")
    if found:
        log.check(run.output, found.record["log"])
    return found


def claim(run: Run) -> None:
    """Write the settings: from now on the directory is this run's.

    They are those of the run, however this process came to it: `resume` is not among them.
    """
    run.output.mkdir(parents=True, exist_ok=True)
    save_run(replace(run, resume=False), run.output / SETTINGS)


def _check_same(run: Run, path: Path) -> None:
    """RunError naming the settings in which the run in the directory is another one."""
    with TemporaryDirectory() as folder:
        save_run(run, Path(folder) / SETTINGS)
        given = _read(Path(folder) / SETTINGS)
    before = _read(path)
    if not any(name.startswith(f"{CHOICES}.") for name in before):
        # A run that began before classes were recorded: its numbers are compared.
        given = {name: value for name, value in given.items() if not name.startswith(CHOICES)}
    different = [
        f"{name} (was {before.get(name)!r}, is {given.get(name)!r})"
        for name in {**before, **given}
        if not {name, name.partition(".")[0]} & FREE and before.get(name) != given.get(name)
    ]
    if different:
        raise RunError(
            f"{path}: expected the settings that the run began with, these differ: "
            f"{', '.join(different)}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:  # no UTF-8, or a date such as 2020-99-99
        raise RunError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected the settings of a run, got {content!r}")
    return dict(_flatten(content))


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@contextmanager
def naming(what: str, prompts: Sequence[Prompt], shown: int = 3) -> Iterator[None]:
    """Say where numbers that are not finite came up, and on which questions."""
    try:
        yield
    except FloatingPointError as error:
        texts = ", ".join(repr(prompt.text) for prompt in prompts[:shown])
        more = f" and {len(prompts) - shown} more" if len(prompts) > shown else ""
        raise RunError(f"{what}: {error}. Its questions: {texts}{more}") from error


@contextmanager
def keeping_forest(output: Path, forest: Forest, step: int) -> Iterator[None]:
    """Save the forest that grows in the block if the engine fails for good, and say where."""
    path = output / "forest_in_flight"
    try:
        yield
    except EngineFailure as failure:
        path.write_bytes(forest.save())
        raise EngineFailure(
            f"step {step}: {failure}. What had grown is in {path}; the same command "
            "with --resume goes on after the last checkpoint"
        ) from failure
    path.unlink(missing_ok=True)
