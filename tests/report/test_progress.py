"""The live display: it speaks, in a pipe and on a terminal."""

import threading
import time
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console
from run_history import written

from pyrl.report import (
    Progress,
)


@pytest.fixture
def pipe() -> Console:
    return Console(file=StringIO(), force_terminal=False)


def test_in_a_pipe_each_step_is_a_line_and_so_is_what_happens_outside_of_steps(
    pipe: Console,
) -> None:
    with Progress(console=pipe) as progress:
        progress.phase("loading")
        progress.phase("evaluating held-out")
        progress.show({"eval/held-out/greedy": 0.5})
        for step in (1, 2, 3):
            progress.step(step, 3)
            for phase in ("sampling", "scoring", "updating"):
                progress.phase(phase)
                progress.tokens(10)
            progress.show({"entropy": 0.5})
        progress.phase("evaluating held-out")
    said = written(pipe).splitlines()
    assert said[:2] == ["loading", "evaluating held-out"]
    assert [line.split("  ")[0] for line in said[2:5]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert said[5:] == ["evaluating held-out, step 3/3"]
    assert ["left" in line for line in said] == [False, False, True, True, False, False]


def test_in_a_pipe_there_are_no_control_characters(pipe: Console) -> None:
    with Progress(console=pipe) as progress:
        progress.step(1, 2)
        progress.phase("sampling")
        progress.tokens(1234)
        progress.show({"vote/majority_ratio": 0.75, "entropy": 0.5, "reward": None})
        progress.alarm("Step 1: [entropy] is odd.")
    text = written(pipe)
    assert all(char == "\n" or char.isprintable() for char in text)
    assert "1,234 tokens" in text
    assert "vote 0.75  entropy 0.5" in text
    assert "reward" not in text
    assert "! Step 1: [entropy] is odd.\n" in text


def test_time_left_and_speed_come_from_this_process_alone(
    pipe: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("pyrl.report.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    progress = Progress(console=pipe)
    progress.step(41, 50)  # resumed: forty steps are no part of this process's speed
    progress.phase("sampling")
    progress.tokens(600)
    clock.now += 6
    progress.phase("updating")
    clock.now += 4
    progress.show({})
    assert written(pipe) == "step 41/50  10 s  600 tokens  100 tokens/s  1:30 left\n"


def test_on_a_terminal_the_display_is_live_and_alarms_stay() -> None:
    screen = Console(file=StringIO(), force_terminal=True, width=100, color_system=None)
    with Progress(console=screen) as progress:
        progress.step(7, 80)
        progress.phase("updating")
        progress.show({"reward": 0.625})
        progress.alarm("Step 7: the gradient norm has grown.")
        time.sleep(0.4)
    text = written(screen)
    for part in ("step 7/80", "updating 0 s", "reward 0.625", "! Step 7: the gradient norm has"):
        assert part in text


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_leaves_a_usable_terminal_and_no_thread(terminal: bool) -> None:
    def interrupted() -> None:
        with Progress(console=console) as progress:
            progress.step(1, 80)
            raise KeyboardInterrupt

    console = Console(file=StringIO(), force_terminal=terminal, width=80)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    deadline = time.monotonic() + 10  # rich tells its thread to end and does not wait for it
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= threads  # fewer: another test's thread has ended
    assert written(console).count("\x1b[?25l") == written(console).count("\x1b[?25h") == terminal


def test_counting_tokens_costs_under_a_microsecond_or_two(pipe: Console) -> None:
    progress = Progress(console=pipe)
    begin = time.perf_counter()
    for _ in range(20_000):
        progress.tokens(32)
    assert (time.perf_counter() - begin) / 20_000 < 20e-6
