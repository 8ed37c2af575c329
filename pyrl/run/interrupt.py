"""Interrupt: Ctrl-C takes effect between tokens and between steps, never inside an update."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

RESUME = "give the same command with --resume to go on after the last finished step"

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what `kill`, a scheduler or a container sends before it ends a process by force."""


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interrupt:
    """While it is entered Ctrl-C and SIGTERM are only noted; `check` raises where all is whole."""

    def __init__(self) -> None:
        self.noted = False

    def check(self) -> None:
        """KeyboardInterrupt if Ctrl-C was pressed or SIGTERM came."""
        if self.noted:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
