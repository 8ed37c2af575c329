"""Channel: a ring of frames that carries the numbers of sampled tokens to the process that asked.

It has one writer and one reader. The ring does not announce a frame: the reader looks for one only
after the engine has answered the step that wrote it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype(
    [
        ("ticket", "<i8"),
        ("position", "<i4"),
        ("token", "<i4"),
        ("logprob", "<f4"),
        ("truncated_logprob", "<f4"),
        ("entropy", "<f4"),
        ("confidence", "<f4"),
        ("rest_logprob", "<f4"),
    ]
)
"""One sampled token: the ticket of its branch, its position in the response, its statistics."""

CHANNEL_RECORDS = 1 << 18
"""Size of an engine's ring, 10 MiB: room for 256 unread steps of 1024 branches."""

_HEAD = 4096
_WRITTEN, _READ = 0, 8
"""Places of the two counters, in 8-byte words."""


@dataclass(frozen=True)
class Frame:
    """The rows of one forward pass, rows whose prompt is not read to its end included."""

    version: int
    """Version of the weights that computed the frame."""
    records_B: NDArray[np.void]
    """dtype RECORD."""


class Channel:
    """A file in memory that both processes map; `create` makes it, the constructor opens it."""

    def __init__(self, path: str | Path) -> None:
        self._counters = np.memmap(path, np.int64, "r+", shape=(_HEAD // 8,))
        self._ring = np.memmap(path, RECORD, "r+", offset=_HEAD)

    @classmethod
    def create(cls, path: str | Path, records: int) -> Channel:
        """A new, empty ring of that many records; FileExistsError if the file exists."""
        with open(path, "xb") as file:
            file.truncate(_HEAD + records * RECORD.itemsize)
        return cls(path)

    def write(self, version: int, records_B: NDArray[np.void], *, seconds: float) -> None:
        """Append a frame. TimeoutError if the reader does not make room for it within `seconds`."""
        count, size = len(records_B) + 1, len(self._ring)
        written = int(self._counters[_WRITTEN])
        deadline = time.monotonic() + seconds
        while written + count - int(self._counters[_READ]) > size:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"the ring of {size} records is full and was not read for {seconds} s"
                )
            time.sleep(0.001)
        head = np.zeros(1, RECORD)
        head["position"], head["token"] = version, len(records_B)
        frame, first = np.concatenate([head, records_B]), written % size
        rest = size - first
        self._ring[first : first + count] = frame[:rest]
        self._ring[: max(0, count - rest)] = frame[rest:]
        self._counters[_WRITTEN] = written + count

    def read(self) -> Frame | None:
        """The oldest frame that was not read, or None."""
        read, size = int(self._counters[_READ]), len(self._ring)
        if read == int(self._counters[_WRITTEN]):
            return None
        head = self._ring[read % size]
        count = int(head["token"])
        version = int(head["position"])
        first = (read + 1) % size
        tail_B = self._ring[first : first + count]
        records_B = np.concatenate([tail_B, self._ring[: count - len(tail_B)]])
        self._counters[_READ] = read + 1 + count
        return Frame(version, records_B)
