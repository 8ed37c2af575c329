"""Foreign: calls of code that others wrote, with a time limit; what they raise is one sentence."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from types import FrameType, TracebackType

import torch

TIME_LIMIT = 600.0
"""Seconds that a call may take unless a run says otherwise."""
AGAIN = 1.0
"""Seconds after which code that goes on nonetheless is interrupted again."""

_INTERRUPT = signal.SIGVTALRM
"""Not SIGALRM: verifiers such as math-verify set their own alarms with it. Two clocks send it: a
thread, for code that waits, and the system's clock of computing time, for code such as a regular
expression that computes without letting another thread of Python run."""


class ForeignError(ValueError):
    """Code of others failed; the message names it, and what it raised."""


class _Overtime(BaseException):
    """The time is up. Code of others that catches every Exception does not catch it."""


def _late(number: int, frame: FrameType | None) -> None:
    """The signal of a call that has ended."""


class Foreign:
    """`with Foreign("reward f.py:score", 600.0):` turns what the body raises into a ForeignError.

    `what` names the code in the message; with `file` the line of that file is named too, and with
    None the line and the file of whatever ran last. `seconds` is the time limit, which holds in
    the main thread, the only one that Python can interrupt; code that goes on nonetheless is
    interrupted again. Gradients switched off, torch's default type and the working directory are
    afterwards what they were before.
    """

    def __init__(self, what: str, seconds: float, file: str | None = "") -> None:
        self._what, self._seconds, self._file = what, seconds, file
        self._done = threading.Event()
        self._inside = False

    def __enter__(self) -> None:
        self._grad, self._dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        self._folder = os.open(".", os.O_RDONLY)
        self._watched = threading.current_thread() is threading.main_thread()
        if self._watched:
            self._deadline = time.monotonic() + self._seconds
            self._before = signal.signal(_INTERRUPT, self._interrupt)
            signal.setitimer(signal.ITIMER_VIRTUAL, self._seconds, AGAIN)
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        self._inside = True  # The last statement: an interrupt before it would skip __exit__.

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inside = False
        self._done.set()
        if self._watched:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self._watcher.join()
            # The system's default would end the process at a signal that is still on its way.
            signal.signal(_INTERRUPT, self._before if callable(self._before) else _late)
        torch.set_grad_enabled(self._grad)
        torch.set_default_dtype(self._dtype)
        os.chdir(self._folder)
        os.close(self._folder)
        if isinstance(error, _Overtime):
            raise ForeignError(
                f"{self._what}: expected an end within {self._seconds:g} s "
                f"(--call-time-limit), but it was still running{self._line(trace)}"
            ) from error
        if isinstance(error, Exception | SystemExit):
            said = " ".join(str(error).split())
            # A syntax error names its own file and line.
            line = "" if isinstance(error, SyntaxError) else self._line(trace)
            raise ForeignError(
                f"{self._what} raised {type(error).__name__}{line}: {said}"
            ) from error

    def _watch(self) -> None:
        wait = self._seconds
        while not self._done.wait(wait):
            signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)
            wait = AGAIN

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # Python may run this before the first statement of __exit__, which must not be skipped.
        leaving = frame is not None and frame.f_code is Foreign.__exit__.__code__
        if self._inside and not leaving and time.monotonic() >= self._deadline:
            raise _Overtime

    def _line(self, trace: TracebackType | None) -> str:
        """The last line of the named file that was running."""
        frames = traceback.extract_tb(trace)
        if self._file is None:
            return f" in line {frames[-1].lineno} of {frames[-1].filename}"
        lines = [f.lineno for f in frames if f.filename == self._file]
        return f" in line {lines[-1]}" if lines else ""
