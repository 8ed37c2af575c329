"""A pool of processes that run verifiers on what a model wrote, with limits that hold.

Why own code: `concurrent.futures` cannot kill a worker that hangs; pools built on
`multiprocessing` (pebble among them) either fork, which is unsafe beside torch's threads, or
import the parent's `__main__` again, which runs a training script without a guard a second time.
Here a worker is a plain subprocess that imports one file. POSIX only (resource limits).
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Self

_WORKER = Path(__file__).with_name("worker.py")
_START_S = 120.0
"""For imports on a busy machine; not part of any call's time."""


class Status(Enum):
    """Whether a call came back, ran out of time or took its process along."""

    DONE = "done"
    TIMEOUT = "timeout"
    CRASHED = "crashed"


@dataclass(frozen=True)
class Outcome:
    """How one call ended."""

    status: Status
    value: Any = None
    """What the function returned (JSON types); None unless DONE."""
    reason: str = ""
    """Why the result is unknown; empty if DONE."""


class VerifierError(RuntimeError):
    """The source of the verifiers cannot be loaded: no call will ever succeed."""


class _Worker:
    """One subprocess and the pipe to it. Used by one thread at a time."""

    def __init__(self, source: Path, memory_mb: int, timeout_s: float) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            limits = [str(memory_mb << 20), str(math.ceil(timeout_s) + 1)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), str(descriptor), str(source), *limits],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent; killpg also gets grandchildren
            )

    def wait_until_ready(self, source: Path) -> None:
        outcome = self._receive(_START_S)
        if outcome.status is not Status.DONE:
            self.kill()
            raise VerifierError(f"verifiers in {source} did not load: {outcome.reason}")

    def call(self, message: bytes, timeout_s: float) -> Outcome:
        try:
            self._pipe.send_bytes(message)
        except OSError:  # died since its last call
            return self._obituary()
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Outcome:
        if not self._pipe.poll(timeout_s):
            return Outcome(Status.TIMEOUT, reason=f"no result within {timeout_s:g} s")
        try:
            reply = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            return self._obituary()
        if "error" in reply:
            return Outcome(Status.CRASHED, reason=reply["error"])
        return Outcome(Status.DONE, reply.get("value"))

    def _obituary(self) -> Outcome:
        """The pipe is closed at the other end: let the process finish dying, to tell its code."""
        waiting = os.WEXITED | os.WNOWAIT | os.WNOHANG
        deadline = time.monotonic() + 1
        while os.waitid(os.P_PID, self._process.pid, waiting) is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        code = self.kill()
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return Outcome(Status.CRASHED, reason=reason)

    def kill(self) -> int:
        """End the process and whatever it started; its exit code, negative for a signal."""
        self._pipe.close()
        if self._process.returncode is None:  # not reaped, so the group is certainly still ours
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


class _Slots:
    """The workers that exist, and those that are idle; shared with the finalizer of the pool."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[_Worker] = []

    def kill(self) -> None:
        with self.lock:
            idle, self.idle = self.idle, []
        for worker in idle:
            worker.kill()


class VerifierPool:
    """Calls functions of one Python file in other processes; a call that misbehaves is killed.

    `source` is a file that is run on its own (it must not import pyrl, or every worker would load
    torch). Functions take strings and return JSON types. Nothing starts before the first call.
    Usable from any thread. Raises VerifierError, from the result of a call, only if the file
    itself cannot be loaded; a call that hangs, crashes, raises or takes too much memory gives an
    Outcome, and its worker is replaced.
    """

    def __init__(
        self, source: Path, *, workers: int = 2, timeout_s: float = 10.0, memory_mb: int = 1024
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected >= 1, got {workers}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected > 0, got {timeout_s}")
        if memory_mb < 64:
            raise ValueError(f"memory_mb: expected >= 64 (an interpreter), got {memory_mb}")
        if not source.is_file():
            raise ValueError(f"source: expected a Python file, got {source}")
        self.source = source
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.calls = 0
        self.replaced = 0
        """Workers that were killed or died in a call."""
        self._slots = _Slots()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._finalizer = weakref.finalize(self, self._slots.kill)

    def submit(self, function: str, *arguments: str) -> Future[Outcome]:
        """Queue one call. Raises RuntimeError after close."""
        return self._threads.submit(self._call, json.dumps([function, *arguments]).encode())

    def map(self, function: str, calls: Iterable[Sequence[str]]) -> list[Outcome]:
        """Outcomes in the order of the calls, whichever ends first."""
        futures = [self.submit(function, *arguments) for arguments in calls]
        return [future.result() for future in futures]

    def _call(self, message: bytes) -> Outcome:
        with self._slots.lock:
            self.calls += 1
            worker = self._slots.idle.pop() if self._slots.idle else None
        if worker is None:
            worker = _Worker(self.source, self.memory_mb, self.timeout_s)
            worker.wait_until_ready(self.source)
        outcome = worker.call(message, self.timeout_s)
        if outcome.status is Status.DONE:
            with self._slots.lock:
                self._slots.idle.append(worker)
            return outcome
        worker.kill()
        with self._slots.lock:
            self.replaced += 1
        return outcome

    def close(self) -> None:
        """Drop queued calls, wait for running ones (at most `timeout_s`), end all processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
