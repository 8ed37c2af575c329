"""Doctor: whether a run would work here, part by part, and what to do where it would not.

A part is a file of this folder and is imported when its turn comes: what is missing is a finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

ABOUT = """\
Versions, devices, disk and engines: each line is ok, or says what to do. It trains the demo model
for some seconds and leaves nothing behind. Exit code 0: a run would work; 1: not yet."""

PARTS = ("packages", "machine", "speed", "vllm")
"""vLLM last: importing it changes threads and settings of the process."""

BROKEN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What packages raise that are missing, do not fit each other or were cut short."""

SENTENCE = 200
"""Characters of a library's message that a line shows."""


@dataclass(frozen=True)
class Finding:
    """One line."""

    name: str
    value: str
    todo: str = ""
    """What to do; empty: it is ok."""
    needed: bool = True
    """No run works before that is done; else it is only for those who want the thing."""

    def __str__(self) -> str:
        if not self.todo:
            return f"{self.name:17} {self.value:44} ok"
        mark = "to do" if self.needed else "optional"
        return f"{self.name:17} {self.value:44} {mark}: {self.todo}"


def examine() -> Iterator[Finding]:
    """All findings, each as soon as it is known. Never raises for what is missing or broken."""
    for part in PARTS:
        try:
            yield from import_module(f"pyrl.doctor.{part}").findings()
        except BROKEN as error:
            yield Finding(part, f"not examined: {told(error)}", "install what the message names")


def told(error: BaseException) -> str:
    """A message in one line, not too long."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= SENTENCE else f"{said[: SENTENCE - 3]}..."


def report() -> int:
    """Print the findings; the exit code."""
    failed = 0
    for finding in examine():
        failed += bool(finding.todo) and finding.needed
        print(finding, flush=True)
    things = "1 thing is" if failed == 1 else f"{failed} things are"
    print(f"\n{things} to do before a run works here" if failed else "\nA run works here.")
    return int(failed > 0)
