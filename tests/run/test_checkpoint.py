"""A checkpoint is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.attention import use_pyrl_attention
from pyrl.models import load_model
from pyrl.run import checkpoint
from pyrl.run.checkpoint import CheckpointError

OPERATIONS = (
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "write_bytes"),
    (Path, "write_text"),
    (checkpoint, "save_file"),
    (checkpoint, "save_arrays"),
    (os, "fsync"),
    (os, "rmdir"),
    (os, "unlink"),
    (shutil, "copytree"),
)
"""What changes files while a checkpoint is written."""


class Crash(BaseException):
    """The process ends here: nothing may catch it."""


class Disk:
    """Counts file operations and stops at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.error, self.done, self.stop_at = error, 0, -1
        for owner, name in OPERATIONS:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.done += 1
            if self.done == self.stop_at:
                raise self.error
            # After a crash nothing is cleaned up any more.
            if isinstance(self.error, Crash) and 0 < self.stop_at < self.done:
                raise self.error
            return operation(*args, **options)

        return counted

    @contextmanager
    def stopping_at(self, operation: int) -> Iterator[None]:
        self.done, self.stop_at = 0, operation
        try:
            yield
        finally:
            self.stop_at = -1


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model, tokenizer = load_model("demo")
    use_pyrl_attention(model)
    return model, tokenizer


def save(directory: Path, step: int, loaded: Loaded, *, keep: int = 2, **record: Any) -> Path:
    """A checkpoint whose tensors depend on its step."""
    model, tokenizer = loaded
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float(step)
    state = {"weight.exp_avg": torch.full((4,), float(step))}, {"weight": float(step)}
    signals, arrays = bytes([step]), {"reward.seen": np.array(step)}
    return checkpoint.save(directory, step, model, tokenizer, state, signals, arrays, record, keep)


def check(directory: Path, step: int) -> None:
    """The newest checkpoint is that of this step, and all its parts are."""
    found = checkpoint.latest(directory)
    assert found is not None
    assert (found.step, found.counts, found.signals()) == (step, {"weight": step}, bytes([step]))
    assert torch.equal(found.optimizer()["weight.exp_avg"], torch.full((4,), float(step)))
    assert found.arrays() == {"reward.seen": step}
    model = load_model(str(found.path))[0]
    assert (model.get_input_embeddings().weight[0] == step).all()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def operations_of_a_save(folder: Path, loaded: Loaded, disk: Disk) -> int:
    save(folder, 1, loaded, keep=1)
    with disk.stopping_at(10**6):
        save(folder, 2, loaded, keep=1)
    return disk.done


def test_a_crash_between_any_two_file_operations_leaves_a_valid_checkpoint(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, Crash())
    total = operations_of_a_save(tmp_path / "counted", loaded, disk)
    assert total > 20
    for operation in range(1, total + 1):
        directory = tmp_path / f"crash{operation}"
        save(directory, 1, loaded, keep=1)
        with disk.stopping_at(operation), pytest.raises(Crash):
            save(directory, 2, loaded, keep=1)
        check(directory, 2 if (directory / "checkpoint-2").exists() else 1)
        save(directory, 3, loaded, keep=1)
        assert names(directory) == ["checkpoint-3"]
        check(directory, 3)
        shutil.rmtree(directory)


def test_a_full_disk_at_any_file_operation_is_said_and_leaves_nothing_half_written(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    disk = Disk(monkeypatch, full)
    saved = save(tmp_path / "counted", 1, loaded)
    total = disk.done
    assert saved.is_dir()
    said = []
    for operation in range(1, total):
        directory = tmp_path / f"full{operation}"
        save(directory, 1, loaded)
        try:
            with disk.stopping_at(operation):
                save(directory, 2, loaded)
        except CheckpointError as error:
            said.append(str(error))
        done = names(directory)
        assert done in (["checkpoint-1"], ["checkpoint-1", "checkpoint-2"])
        check(directory, len(done))
        shutil.rmtree(directory)
    assert len(said) > total / 2
    assert all("checkpoint-2: could not be written" in text for text in said)
    assert all("No space left on device" in text for text in said)


@pytest.mark.parametrize("limit", [100, 10_000, 1_000_000])
def test_a_write_that_the_system_refuses_is_said_whoever_writes(
    limit: int, loaded: Loaded, tmp_path: Path
) -> None:
    """Files may not grow beyond the limit: the configuration, the tokenizer, the weights fail."""
    save(tmp_path, 1, loaded)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"checkpoint-2: could not be written .*too large"
        ):
            save(tmp_path, 2, loaded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["checkpoint-1"]
    check(tmp_path, 1)


def test_a_damaged_file_is_named_and_not_loaded(loaded: Loaded, tmp_path: Path) -> None:
    saved = save(tmp_path, 1, loaded)
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=rf"{path.name}: expected "):
            checkpoint.latest(tmp_path)
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{path.name}: .*(found none|No such file)"):
            checkpoint.latest(tmp_path)
        path.write_bytes(whole)
    check(tmp_path, 1)


def mutated(whole: bytes, dice: random.Random) -> bytes:
    """The bytes with one of them changed, lost or added, or cut short."""
    at = dice.randrange(len(whole))
    change = dice.randrange(4)
    if change == 0:
        return whole[:at] + bytes([whole[at] ^ (1 << dice.randrange(8))]) + whole[at + 1 :]
    if change == 1:
        return whole[:at] + bytes([dice.randrange(256)]) + whole[at:]
    return whole[:at] + (whole[at + 1 :] if change == 2 else b"")


def test_any_change_of_any_file_is_refused_by_a_sentence_or_changes_nothing(
    loaded: Loaded, tmp_path: Path
) -> None:
    dice, refused, harmless = random.Random(15), [], 0
    saved = save(tmp_path, 1, loaded, tokens=4321, seconds=1.5, labels={"0": "12", "7": "3"})
    as_saved = checkpoint.latest(tmp_path)
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        for _ in range(200 if path.name == checkpoint.STATE else 6):
            path.write_bytes(mutated(whole, dice))
            try:
                found = checkpoint.latest(tmp_path)
            except CheckpointError as error:
                refused.append(str(path) in str(error) and "\n" not in str(error))
            else:  # such as a space between two values of the record
                harmless += 1
                assert path.name == checkpoint.STATE or path.read_bytes() == whole
                assert found == as_saved
        path.write_bytes(whole)
    assert all(refused)
    assert len(refused) > 180
    assert harmless < 60


@pytest.mark.parametrize("digit", ["counts", "tokens", "step"])
def test_a_record_with_another_digit_is_damaged(digit: str, loaded: Loaded, tmp_path: Path) -> None:
    """Adam's count of steps scales the next update: a changed digit is a changed run."""
    path = save(tmp_path, 1, loaded, tokens=1) / checkpoint.STATE
    record = json.loads(path.read_text())
    match digit:
        case "counts":
            record["counts"]["weight"] = 9.0
        case "tokens":
            record["record"]["tokens"] = 9
        case "step":
            record["step"] = 9
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"pyrl\.json: expected sha256 .*damaged; remove"):
        checkpoint.latest(tmp_path)


def test_a_file_that_was_added_or_another_name_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    """transformers would read the weights that such an index names."""
    saved = save(tmp_path, 1, loaded)
    (saved / ".DS_Store").write_text("of a desktop")
    check(tmp_path, 1)
    index = saved / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{index.name}: expected only the files that"):
        checkpoint.latest(tmp_path)
    index.unlink()
    saved.rename(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="checkpoint-2: expected the name checkpoint-1"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("record", [None, "", "[]", "{}", '{"step": 1'])
def test_a_checkpoint_without_its_record_is_refused(
    record: str | None, loaded: Loaded, tmp_path: Path
) -> None:
    path = save(tmp_path, 1, loaded) / checkpoint.STATE
    path.unlink()
    if record is not None:
        path.write_text(record)
    with pytest.raises(CheckpointError, match=r"pyrl\.json: expected the record of a checkpoint"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("numbered", [True, False])
def test_a_checkpoint_of_another_format_is_refused(
    numbered: bool, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first format had no number and no states of choices."""
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    path = save(tmp_path, 1, loaded) / checkpoint.STATE
    check(tmp_path, 1)
    monkeypatch.undo()
    if not numbered:
        record = json.loads(path.read_text())
        del record["format"], record[checkpoint.SEAL]
        path.write_text(checkpoint._sealed(record))
    with pytest.raises(CheckpointError, match=r"checkpoint-1: expected .* format 2, got format 1"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_checkpoints_stay(keep: int, loaded: Loaded, tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):  # 10 comes after 9, though not in the alphabet
        save(tmp_path, step, loaded, keep=keep)
    assert set(names(tmp_path)) == {f"checkpoint-{step}" for step in range(12 - keep, 12)}
    check(tmp_path, 11)


def test_a_tokenizer_with_several_chat_templates_is_saved_too(
    loaded: Loaded, tmp_path: Path
) -> None:
    """transformers writes the further ones into a folder of their own."""
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    saved = save(tmp_path, 1, (loaded[0], tokenizer))
    (further,) = [path for path in saved.rglob("*.jinja") if path.parent != saved]
    check(tmp_path, 1)
    further.write_text("{{ other }}")
    with pytest.raises(CheckpointError, match=f"{further.name}: expected sha256"):
        checkpoint.latest(tmp_path)


def test_saving_a_step_again_renews_its_record_alone(loaded: Loaded, tmp_path: Path) -> None:
    saved = save(tmp_path, 1, loaded, scores=[])
    before = (saved / "model.safetensors").stat()
    save(tmp_path, 1, loaded, scores=[0.5])
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.record == {"scores": [0.5]}
    assert (saved / "model.safetensors").stat().st_ino == before.st_ino
    check(tmp_path, 1)


def test_a_directory_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / ".checkpoint-3.partial").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_transformers_loads_a_checkpoint_without_pyrl(loaded: Loaded, tmp_path: Path) -> None:
    saved = save(tmp_path, 1, loaded)
    assert loaded[0].config._attn_implementation == "pyrl"
    assert "pyrl" not in (saved / "config.json").read_text()
    program = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('31=', return_tensors='pt')['input_ids']\n"
        "print(tuple(model(ids).logits.shape), 'pyrl' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", program, str(saved)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split("\n")[0] == "(1, 3, 31) False"
