"""Lock: a run's directory belongs to one process at a time, from before its model is loaded."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

LOCK = ".lock"
"""The locked file, which says whose it is; the system unlocks it when that process ends."""


class RunError(ValueError):
    """A run cannot begin or go on; nothing that it has saved is lost."""


class Lock:
    """A context manager that may be entered again; entered while it is held it does nothing.

    The directory is made for it, and removed at the end if the run has put nothing into it.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._release: weakref.finalize[[int, Path, Sequence[Path]], Lock] | None = None

    def __enter__(self) -> Lock:
        """RunError: another process has the directory, or its file system has no locks."""
        if self._release is not None and self._release.alive:
            return self
        if self.output.exists() and not self.output.is_dir():
            raise RunError(f"{self.output}: expected a directory for --output, got a file")
        made = [path for path in (self.output, *self.output.parents) if not path.exists()]
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / LOCK
        file = _locked(path)
        while not _is_at(file, path):  # the process that had it has removed the file meanwhile
            os.close(file)
            file = _locked(path)
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {os.uname().nodename}".encode())
        self._release = weakref.finalize(self, _unlock, file, path, made)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let the next process have the directory; nothing happens where it is not held."""
        if self._release is not None:
            self._release()


def one_process() -> None:
    """RunError under a launcher that starts the command several times, as torchrun does."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise RunError(
            f"expected one process, got WORLD_SIZE={size}: of the commands pyrl train and pyrl "
            f"demo run in several; start this one without torchrun, or with one process"
        )


def _locked(path: Path) -> int:
    """The file, open and locked."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(file, 1000).decode(errors="replace") or "another process"
        os.close(file)
        raise RunError(
            f"{path.parent}: expected a directory that no other process trains in, "
            f"it is in use by {holder}; choose another --output, or wait for its end"
        ) from error
    except OSError as error:
        os.close(file)
        raise RunError(
            f"{path.parent}: expected a file system whose files can be locked for --output: {error}"
        ) from error
    return file


def _is_at(file: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def _unlock(file: int, path: Path, made: Sequence[Path]) -> None:
    with suppress(OSError):  # whoever wants the directory next finds it as it is
        if _is_at(file, path):
            path.unlink()
        for folder in made:
            folder.rmdir()
    os.close(file)
