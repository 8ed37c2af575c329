"""Interrupt: Ctrl-C takes effect between tokens and between steps, never inside an update."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

RESUME = "give the same command with --resume to go on after the last finished step"


class Interrupt:
    """While it is entered Ctrl-C is only noted; `check` raises it where nothing is half done."""

    def __init__(self) -> None:
        self.noted = False

    def check(self) -> None:
        """KeyboardInterrupt if Ctrl-C was pressed."""
        if self.noted:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
