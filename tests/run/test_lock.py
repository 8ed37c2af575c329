"""One process a directory: the others are refused before they load anything."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from pyrl.run import lock
from pyrl.run.lock import LOCK, Lock, RunError, one_process


def test_a_directory_is_one_process_s_until_it_lets_go(tmp_path: Path) -> None:
    taken = f"in use by process {os.getpid()} on .*--output"
    with Lock(tmp_path) as held, held, pytest.raises(RunError, match=taken):
        Lock(tmp_path).__enter__()
    with Lock(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_directory_that_is_made_for_nothing_goes_again(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "one"
    with Lock(output):
        assert output.is_dir()
    assert list(tmp_path.iterdir()) == []
    with Lock(output):
        (output / "run.yaml").write_text("")
    assert [path.name for path in output.iterdir()] == ["run.yaml"]
    output.joinpath("run.yaml").unlink()
    with Lock(output):
        pass
    assert output.is_dir()  # it was there before


def test_a_lock_that_nobody_refers_to_is_let_go(tmp_path: Path) -> None:
    Lock(tmp_path).__enter__()
    with Lock(tmp_path):
        pass


def test_a_lock_file_that_its_holder_removes_meanwhile_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before ends between this one's open and its lock, and takes the file away."""
    locked, ended = fcntl.flock, []

    def late(file: int, operation: int) -> None:
        if not ended:
            ended.append(True)
            (tmp_path / LOCK).unlink()
        locked(file, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with Lock(tmp_path), pytest.raises(RunError, match="in use by"):
        Lock(tmp_path).__enter__()


def test_a_directory_that_was_removed_and_made_anew_is_not_unlocked(tmp_path: Path) -> None:
    with Lock(tmp_path):
        (tmp_path / LOCK).unlink()
        other = Lock(tmp_path).__enter__()
    assert (tmp_path / LOCK).exists()
    with pytest.raises(RunError, match="in use by"):
        Lock(tmp_path).__enter__()
    other.release()


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with pytest.raises(RunError, match="expected a file system whose files can be locked"):
        Lock(tmp_path).__enter__()


@pytest.mark.parametrize(("size", "fits"), [(None, True), ("1", True), ("2", False)])
def test_a_launcher_of_several_processes_is_refused(
    size: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    if fits:
        one_process()
    else:
        with pytest.raises(RunError, match=r"expected one process, got WORLD_SIZE=2: .*torchrun"):
            one_process()
