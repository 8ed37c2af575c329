"""Checkpoint: a directory that resumes a run bit for bit and that transformers can load."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.models.loading import quiet_progress

STATE = "pyrl.json"
OPTIMIZER = "optimizer.safetensors"
SIGNALS = "signals.bin"
STATES = "states.safetensors"
SAMPLER = "sampler.safetensors"
FORMAT = 2
"""What the record of a checkpoint has in it; 1 had no states of choices, and no number."""
SEAL = "sha256"
"""Where the record of a checkpoint has the digest of all else in it."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    """Finished training steps."""
    record: Mapping[str, Any]
    """Counters of the run: sampled tokens, seconds, labels seen."""
    counts: Mapping[str, float]
    """Optimizer steps by parameter."""

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / OPTIMIZER)

    def signals(self) -> bytes:
        """The sketches of fork and prune thresholds; empty for a method without them."""
        return (self.path / SIGNALS).read_bytes()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that choices of the method remember, by their places."""
        return load_arrays(self.path / STATES)

    def sampler(self) -> dict[str, Tensor]:
        """The trained weights that sample the step after this one; none of a run that does not
        sample ahead."""
        path = self.path / SAMPLER
        return load_file(path) if path.exists() else {}


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"checkpoint-{step}"


def save(
    directory: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: tuple[Mapping[str, Tensor], Mapping[str, float]],
    signals: bytes,
    arrays: Mapping[str, NDArray[Any]],
    record: Mapping[str, Any],
    keep: int,
    weights: Mapping[str, Tensor] | None = None,
    sampler: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `directory/checkpoint-STEP` whole or not at all; only the newest `keep` stay.

    A run repeats its steps exactly, so one of the same step that is already there keeps its
    weights and gets the new record. `weights`: those of the model, which has parts of them. Raises
    CheckpointError; earlier checkpoints stay valid.
    """
    target = place(directory, step)
    state = {"format": FORMAT, "step": step, "record": record, "counts": optimizer[1]}
    if target.exists():
        files = json.loads((target / STATE).read_text())["files"]
        with _explained(target):
            _replace_text(target / STATE, _sealed({**state, "files": files}))
        return target
    with replacing(target) as folder:
        write_model(folder, model, tokenizer, weights)
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in optimizer[0].items()}, folder / OPTIMIZER
        )
        (folder / SIGNALS).write_bytes(signals)
        save_arrays(dict(arrays), folder / STATES)
        if sampler:
            save_file(dict(sampler), folder / SAMPLER)
        files = {name: _digest(path) for name, path in _files(folder).items()}
        (folder / STATE).write_text(_sealed({**state, "files": files}))
    for old in _checkpoints(directory)[:-keep]:
        # Under its own name it would count as a checkpoint until its last file is gone.
        shutil.rmtree(old.rename(_partial(old)))
    for left in directory.glob(".checkpoint-*.partial"):
        shutil.rmtree(left)
    return target


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """What `AutoModelForCausalLM.from_pretrained(folder)` and its tokenizer need.

    `weights`: all of them by name, where the model has parts of them; None: as it has them.
    """
    # The attention that pyrl registers is not part of the model: a reader need not have pyrl.
    implementation = model.config._attn_implementation
    model.config._attn_implementation = None
    try:
        with quiet_progress():
            if model.device.type == "meta":  # its weights are on a server
                model.config.save_pretrained(folder)
            else:
                model.save_pretrained(folder, state_dict=weights)
    finally:
        model.config._attn_implementation = implementation
    # tokenizers reports a failed write by a bare Exception, a copy by an OSError.
    with tempfile.TemporaryDirectory() as staging:
        tokenizer.save_pretrained(staging)
        shutil.copytree(staging, folder, dirs_exist_ok=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` if the block succeeds and vanishes if it does not."""
    folder = _partial(target)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            yield folder
            for path in [*folder.rglob("*"), folder]:
                _sync(path)
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: could not be written ({error}); earlier checkpoints are unchanged"
        ) from error


def _replace_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, verified, or None where there is none."""
    found = _checkpoints(directory)
    return read(found[-1]) if found else None


def read(path: Path) -> Checkpoint:
    """Verify the record and every file; CheckpointError names the one that differs."""
    state = _unsealed(path / STATE)
    if (written := state.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT}, got format {written}: another "
            f"version of pyrl wrote it and can go on from it; its weights load as any model"
        )
    found = _files(path)
    for name, expected in state["files"].items():
        if name not in found:
            raise CheckpointError(f"{path / name}: expected a file of the checkpoint, found none")
        if (digest := _digest(found[name])) != expected:
            raise _damaged(path / name, expected, digest)
    if more := found.keys() - state["files"].keys() - {STATE}:
        # transformers would read some of them, such as the index of other weights.
        raise CheckpointError(
            f"{path / min(more)}: expected only the files that the checkpoint was saved with; "
            f"move this one elsewhere"
        )
    if path.name != f"checkpoint-{state['step']}":
        raise CheckpointError(
            f"{path}: expected the name checkpoint-{state['step']}, which it was saved under"
        )
    return Checkpoint(path, state["step"], state["record"], state["counts"])


def _sealed(state: Mapping[str, Any]) -> str:
    """The record of a checkpoint with a digest of itself: a changed count is a changed run."""
    plain = json.loads(json.dumps(state))
    return json.dumps({**plain, SEAL: _seal(plain)}, indent=1)


def _unsealed(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        expected = state.pop(SEAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected the record of a checkpoint, got {type(error).__name__}: {error}"
        ) from error
    if (digest := _seal(state)) != expected:
        raise _damaged(path, expected, digest)
    return state


def _seal(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, expected: object, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected sha256 {str(expected)[:12]}, got {found[:12]}: the file is damaged; "
        f"remove {path.parent} to resume from an earlier checkpoint"
    )


def _checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    found = [
        p for p in directory.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def _files(folder: Path) -> dict[str, Path]:
    """All files, those in folders included: transformers puts further chat templates into one.

    Hidden ones are those of a file system or a desktop.
    """
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path for name, path in sorted(files.items()) if "/." not in f"/{name}"}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
