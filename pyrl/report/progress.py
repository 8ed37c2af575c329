"""What a run says while it runs: a live display, or in a pipe a plain line for each step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pyrl.report.metrics import short

HEADLINE = {
    "vote": "vote/majority_ratio",
    "entropy": "entropy",
    "reward": "reward",
    "labels right": "vote/label_accuracy",
    "length": "completions/mean_length",
}
"""What a person watches, in the display's order; a metric that a run does not have is left out."""


class Phases:
    """The phases of a step: shown while they last, and the seconds that each took in all."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._name: str | None = None
        self._began = 0.0
        self._seconds: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        """A phase begins, and the one before it ends."""
        self.metrics()
        self._name = name
        self._progress.phase(name)

    def metrics(self) -> dict[str, float]:
        """The last phase ends; `timing/NAME` of all so far."""
        now = time.monotonic()
        if self._name is not None:
            name = f"timing/{self._name}"
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._began
        self._name, self._began = None, now
        return self._seconds


class Progress:
    """A context manager; every method is cheap enough to be called at each decode step.

    On a terminal the display redraws itself; elsewhere (a pipe, CI) a line without control
    characters is written after each step, and where something begins that is no part of a step.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._started = self._phase_started = time.monotonic()
        self._step_started = self._first_started = self._finished_at = self._started
        self._step = self._total = 0
        self._in_step = False
        self._finished = 0
        """Steps that this process has finished."""
        self._phase = "starting"
        self._tokens = self._phase_tokens = 0
        self._rate = 0.0
        self._shown: dict[str, Any] = {}
        self._alarms: list[str] = []
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def step(self, step: int, total: int) -> None:
        """Step number `step` of `total` begins (from 1); a resumed run begins later than 1."""
        self._step_started = time.monotonic()
        if not self._total:
            self._first_started = self._step_started
        self._step, self._total, self._in_step = step, total, True

    def phase(self, name: str) -> None:
        """What happens now: "sampling", "scoring", "updating", "evaluating held-out"..."""
        self._speed()
        self._phase, self._phase_started, self._phase_tokens = name, time.monotonic(), 0
        if not (self._live or self._in_step):
            self._say(f"{name}, step {self._step}/{self._total}" if self._total else name)

    def tokens(self, n: int) -> None:
        """`n` more tokens were sampled."""
        self._tokens += n
        self._phase_tokens += n

    def show(self, metrics: Mapping[str, Any]) -> None:
        """The numbers of the step that has just ended."""
        self._shown.update(metrics)
        if not self._in_step:
            return
        self._in_step = False
        self._finished += 1
        self._finished_at = time.monotonic()
        if not self._live:
            self._say(self._line())

    def alarm(self, text: str) -> None:
        """Show at once that something is wrong with the run; the message stays on the screen."""
        self._alarms.append(text)
        if self._live:
            self._console.print(Text(f"! {text}", style="bold yellow"), soft_wrap=True)
        else:
            self._say(f"! {text}")

    def take_alarms(self) -> list[str]:
        """Alarms that were shown since the last call, for the log."""
        taken, self._alarms = self._alarms, []
        return taken

    def _say(self, line: str) -> None:
        self._console.file.write(line + "\n")
        self._console.file.flush()

    def _speed(self) -> float:
        """Tokens per second of this phase; of the last one that sampled if this one does not."""
        if self._phase_tokens:
            seconds = time.monotonic() - self._phase_started
            self._rate = self._phase_tokens / max(seconds, 1e-3)
        return self._rate

    def _left(self) -> str:
        """The time of the steps to come; nothing is known of a final evaluation."""
        missing = self._total - self._step + self._in_step
        if not (self._finished and missing):
            return ""
        pace = (self._finished_at - self._first_started) / self._finished
        spent = time.monotonic() - self._finished_at
        return f"{_clock(max(0.0, pace * missing - spent))} left"

    def _line(self) -> str:
        parts = [
            f"step {self._step}/{self._total}",
            f"{time.monotonic() - self._step_started:.0f} s",
            f"{self._tokens:,} tokens",
            f"{self._speed():,.0f} tokens/s",
            *(f"{label} {number}" for label, number in self._numbers()),
            self._shares(),
            self._left(),
        ]
        return "  ".join(part for part in parts if part)

    def _shares(self) -> str:
        """Where the time of the last step went, without what took less than a twentieth."""
        spent = {n: s for n, s in self._shown.items() if n.startswith("timing/")}
        whole = sum(spent.values())
        large = {n.partition("/")[2]: s / whole for n, s in spent.items() if s > whole / 20}
        return ", ".join(f"{name} {share:.0%}" for name, share in large.items())

    def _numbers(self) -> list[tuple[str, str]]:
        values = ((label, self._shown.get(name)) for label, name in HEADLINE.items())
        return [(label, short(value)) for label, value in values if value is not None]

    def _render(self) -> RenderableType:
        now = time.monotonic()
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(f"step {self._step}/{self._total}" if self._total else "before training", "bold"),
            ProgressBar(total=max(self._total, 1), completed=self._step - self._in_step, width=40),
            Text(f"{_clock(now - self._started)}  {self._left()}", "dim"),
        )
        work = f"{self._tokens:,} tokens sampled  {self._speed():,.0f} tokens/s"
        phase = Text(f"{self._phase} {now - self._phase_started:.0f} s", "cyan")
        numbers = Text("  ").join(
            Text.assemble((label, "dim"), " ", (number, "bold"))
            for label, number in self._numbers()
        )
        lines = Table.grid()
        lines.add_row(grid)
        lines.add_row(Text("  ").join([phase, Text(work)]))
        lines.add_row(numbers)
        if shares := self._shares():
            lines.add_row(Text(f"last step: {shares}", "dim"))
        return lines


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
