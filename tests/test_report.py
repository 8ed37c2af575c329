from __future__ import annotations

import json
import math
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pyrl.report import (
    Alarms,
    Completion,
    Evaluation,
    MetricsLog,
    Progress,
    Report,
    read_metrics,
    save_curves,
)
from pyrl.report.alarms import RULES, Changed, Outside
from pyrl.report.curves import PANELS
from pyrl.report.metrics import MEANING
from pyrl.report.progress import HEADLINE

# --- metrics.jsonl


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_one_line_that_any_json_reader_accepts(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run") as log:
        log.write(0, {"eval/held-out/greedy": np.float32(0.5)})
        row = log.write(
            1, {"reward": math.nan, "kl": math.inf, "tree/leaves": np.int64(7), "note": "é"}
        )
        assert lines(tmp_path / "run" / "metrics.jsonl")[1] == row
    assert row == {"step": 1, "reward": None, "kl": None, "tree/leaves": 7, "note": "é"}
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_value_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(TypeError, match="got list"):
        log.write(1, {"reward": [1.0]})


def test_every_row_is_on_disk_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(
        "os.fsync", lambda _: synced.append((tmp_path / "metrics.jsonl").stat().st_size)
    )
    with MetricsLog(tmp_path) as log:
        log.write(1, {"reward": 0.5})
        log.write(2, {"reward": 0.5})
    assert synced == [len('{"step": 1, "reward": 0.5}\n') * n for n in (1, 2)]


def test_a_new_run_never_writes_over_another(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"reward": 0.5})
    with pytest.raises(FileExistsError, match="holds another run"):
        MetricsLog(tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_after_a_crash_at_any_byte_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path) as log:
        for step in range(4):
            log.write(step, {"reward": step / 7})
        log.write_completions(2, [Completion("1+1=", "2", "2", "2", 1.0)])
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with MetricsLog(tmp_path, resume_at=2) as log:
            kept = [row["step"] for row in read_metrics(path)]
            assert kept == [step for step in (0, 1) if step < whole[:cut].count(b"\n")]
            log.write(2, {"reward": 1.0})
        assert [row["step"] for row in read_metrics(path)] == [*kept, 2]
    assert (tmp_path / "completions.jsonl").read_text() == ""


def test_rows_of_one_step_are_read_as_one(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(5, {"reward": 0.5})
        log.write(5, {"eval/held-out/greedy": 0.25})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 5, "reward": 0.5, "eval/held-out/greedy": 0.25}
    ]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object"):
        read_metrics(path)
    path.write_text('{"step": "one"}\n')
    with pytest.raises(ValueError, match=r'metrics\.jsonl:1: .* integer "step"'):
        MetricsLog(tmp_path, resume_at=1)


def test_completions_are_rows_of_their_own(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write_completions(3, [Completion("1+1=", "3", None, "2", math.nan)])
    assert lines(tmp_path / "completions.jsonl") == [
        {
            "step": 3,
            "prompt": "1+1=",
            "completion": "3",
            "answer": None,
            "label": "2",
            "reward": None,
        }
    ]


# --- loggers


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        for step in (1, 2, 3):
            log.write(step, {"reward": step / 10, "kl": math.nan})
    with MetricsLog(tmp_path, ["tensorboard"], resume_at=2) as log:
        log.write(2, {"reward": 0.9})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    found = [(event.step, round(event.value, 6)) for event in events.Scalars("reward")]
    assert found == [(1, 0.1), (2, 0.9)]


class Service:
    """Records what a logging service is sent."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> Service:
        self.inits.append(settings)
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_sent_each_step_once_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    service = Service()
    module = ModuleType(name)
    module.__dict__.update(init=service.init, log=service.log, finish=service.finish)
    monkeypatch.setitem(sys.modules, name, module)
    with MetricsLog(tmp_path, [name]) as log:
        for step in (1, 2, 3):
            log.write(step, {"reward": 0.5, "kl": math.nan, "note": "text"})
    with MetricsLog(tmp_path, [name], resume_at=2) as log:
        for step in (2, 3, 4):
            log.write(step, {"reward": 0.5})
    assert service.rows == [(step, {"reward": 0.5}) for step in (1, 2, 3, 4)]
    assert service.finished == 2
    first, second = service.inits
    assert first["name"] == second["name"] == tmp_path.name
    assert first.get("id") == second.get("id")
    assert second["resume"] == "allow"


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_logger_that_is_not_installed_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        MetricsLog(tmp_path, [name])


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected some of tensorboard, wandb, trackio"):
        MetricsLog(tmp_path / "run", ["tensorbord"])  # type: ignore[list-item]  # a user's typo
    assert not (tmp_path / "run").exists()


def test_every_name_that_a_reader_uses_is_a_metric() -> None:
    used = {name for panel in PANELS for _, name in panel.lines}
    used |= set(HEADLINE.values()) | {rule.metric for rule in RULES}
    assert {name for name in used if not name.startswith("eval/*/")} <= set(MEANING)


# --- progress


@pytest.fixture
def pipe() -> Console:
    return Console(file=StringIO(), force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_in_a_pipe_a_long_phase_speaks_on_its_own(pipe: Console) -> None:
    with Progress(console=pipe, every=0.05) as progress:
        progress.step(3, 80)
        progress.phase("sampling")
        time.sleep(0.5)
    said = written(pipe).splitlines()
    assert 4 <= len(said) <= 11
    assert all(re.fullmatch(r"step 3/80  sampling \d s", line) for line in said[1:])


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
    progress.step(42, 50)
    clock.now += 3
    progress.show({})
    assert written(pipe) == "step 42/50  updating 7 s  600 tokens  100 tokens/s  1:27 left\n"


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
    assert threading.active_count() == threads
    assert written(console).count("\x1b[?25l") == written(console).count("\x1b[?25h") == terminal


def test_counting_tokens_costs_under_a_microsecond_or_two(pipe: Console) -> None:
    progress = Progress(console=pipe)
    begin = time.perf_counter()
    for _ in range(20_000):
        progress.tokens(32)
    assert (time.perf_counter() - begin) / 20_000 < 20e-6


# --- alarms


def history(steps: int, **metrics: Any) -> list[dict[str, Any]]:
    """Rows 1..steps; a metric is a number or a function of the step; `__` stands for `/`."""
    return [
        {"step": step}
        | {
            name.replace("__", "/"): value(step) if callable(value) else value
            for name, value in metrics.items()
        }
        for step in range(1, steps + 1)
    ]


def messages(rows: list[dict[str, Any]], total: int = 80) -> list[str]:
    alarms = Alarms(total)
    return [text for end in range(1, len(rows) + 1) for text in alarms.check(rows[:end])]


def test_a_run_that_learns_raises_no_alarm() -> None:
    rng = random.Random(0)
    rows = history(
        80,
        reward=lambda step: 0.6 + 0.003 * step + rng.gauss(0, 0.03),
        entropy=lambda step: 0.3 * math.exp(-step / 50),
        grad_norm=lambda step: rng.uniform(3, 10),
        frac_reward_zero_std=lambda step: 0.4 + 0.004 * step,
        vote__majority_ratio=lambda step: 0.7 + 0.003 * step,
        vote__majority_ratio_min=0.3,
        vote__answered=0.99,
        vote__distinct_labels=1.0,
        vote__label_accuracy=lambda step: 0.65 + 0.003 * step,
        vote__reward_accuracy=0.85,
        vote__icc=0.1,
        completions__mean_length=lambda step: 17 + rng.gauss(0, 0.3),
        tree__branch_rate=0.02,
        tree__prune_rate=0.1,
        advantage__clamp_rate=0.01,
        sampling__sampling_logp_difference__mean=1e-6,
    )
    assert messages(rows) == []


def test_the_collapse_is_told_though_the_vote_share_stays_high() -> None:
    rows = history(
        10,
        reward=0.9,
        vote__majority_ratio=0.9,
        vote__label_accuracy=lambda step: 0.65 if step < 6 else 0.06,
        vote__distinct_labels=lambda step: 1.0 if step < 5 else 0.1,
    )
    rows.insert(0, {"step": 0, "eval/held-out/greedy": 0.65})
    rows.append({"step": 11, "eval/held-out/greedy": 0.0})
    said = messages(rows)
    assert len(said) == 3
    assert all("collapsing: lower the learning rate" in text for text in said)
    assert said[-1].startswith(
        "Step 11, held-out: greedy accuracy has fallen from 0.65 to 0. The run is collapsing"
    )


def test_a_high_vote_share_alone_is_no_alarm() -> None:
    assert messages(history(40, vote__majority_ratio=0.99, reward=0.99)) == []


def test_an_alarm_speaks_once_and_again_only_after_it_cleared() -> None:
    icc = [0.5] * 6 + [0.0] * 6 + [0.5] * 6
    rows = history(18, vote__icc=lambda step: icc[step - 1])
    alarms = Alarms(80)
    fired = [end for end in range(1, 19) if alarms.check(rows[:end])]
    assert fired == [3, 14]


def test_entropy_may_fall_late_but_not_in_the_first_tenth() -> None:
    def falls_at(when: int) -> list[str]:
        return messages(history(100, entropy=lambda step: 1.0 if step < when else 0.1), total=100)

    assert "from 1 to 0.1" in falls_at(5)[0]
    assert falls_at(50) == []


def trigger(rule: Any) -> Iterator[Mapping[str, Any]]:
    """A history on which the rule must speak."""
    name = rule.metric.replace("*", "held-out")
    for step in range(1, 13):
        if isinstance(rule, Outside):
            value = rule.bound + (0.04 if rule.than == "above" else -0.04)
        else:
            late = rule.times * (1.1 if rule.than == "above" else 0.5)
            value = late if step > rule.start else 1.0
        yield {"step": step, name: value}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.metric} {rule.than}")
def test_each_alarm_says_what_was_seen_against_what_and_what_to_try(rule: Any) -> None:
    rows = list(trigger(rule))
    alarms = Alarms(80, [rule])
    said = [text for end in range(1, 13) for text in alarms.check(rows[:end])]
    assert len(said) == 1
    assert rule.seen in said[0]
    assert said[0].endswith(rule.advice)
    assert (f"{rule.bound:g}" if isinstance(rule, Outside) else "from 1 to") in said[0]
    assert Alarms(80, [rule]).check([{"step": row["step"]} for row in rows]) == []


def test_missing_values_are_no_zeros() -> None:
    assert messages(history(20, entropy=lambda step: 1.0 if step < 8 else None)) == []
    assert isinstance(RULES[0], Changed)


# --- report


def evaluation(name: str, model: Any, **metrics: float) -> Evaluation:
    scores = {key.replace("_at_", "@"): value for key, value in metrics.items()}
    return Evaluation(name, model, scores, questions=100, tokens=12_000, seconds=3.0)


REPORT = Report(
    "ECHO on the demo model",
    (
        evaluation("trained questions", "before", greedy=0.5, maj_at_64=0.55),
        evaluation("held-out", "before", greedy=0.625, maj_at_64=0.65),
        evaluation("trained questions", "after", greedy=0.75, pass_at_16=0.9),
        evaluation("held-out", "after", greedy=0.875),
    ),
    {"seed": 0, "tokens sampled by training": 1_040_000, "learning rate": 2e-5},
)


def test_the_table_sets_after_beside_before_with_the_gain() -> None:
    console = Console(file=StringIO(), width=120)
    console.print(REPORT)
    text = written(console)
    for part in ("untrained", "after training", "held-out", "0.875 (+0.250)", "0.750 (+0.250)"):
        assert part in text
    assert "seed 0, tokens sampled by training 1,040,000, learning rate 2e-05" in text
    assert "up to 0.050" in text


def test_the_markdown_is_a_table_with_every_number() -> None:
    rows = [line for line in REPORT.markdown().splitlines() if line.startswith("|")]
    assert rows[0] == "| | trained questions | held-out |"
    assert {row.count("|") for row in rows} == {4}
    assert "| untrained: greedy | 0.500 | 0.625 |" in rows
    assert "| after training: greedy | 0.750 (+0.250) | 0.875 (+0.250) |" in rows
    assert "| after training: pass@16 | 0.900 |  |" in rows
    assert "| after training: sampled tokens | 12,000 | 12,000 |" in rows


def test_the_saved_report_holds_every_evaluation(tmp_path: Path) -> None:
    REPORT.save(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["report.json", "report.md"]
    record = json.loads((tmp_path / "report.json").read_text())
    assert tuple(Evaluation(**entry) for entry in record["evaluations"]) == REPORT.evaluations
    assert record["facts"] == REPORT.facts


# --- curves


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)


def test_the_picture_shows_the_run(tmp_path: Path) -> None:
    rows = history(
        30,
        reward=lambda step: step / 40,
        entropy=lambda step: 1 / step,
        eval__held_out__greedy=lambda step: 0.5 if step % 10 == 0 else None,
    )
    with MetricsLog(tmp_path) as log:
        for row in rows:
            log.write(row["step"], {name: v for name, v in row.items() if name != "step"})
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "ECHO, demo model")
    picture = pixels(tmp_path / "curves.png")
    assert picture.shape[1] > picture.shape[0] > 600
    blue = np.array([0x0B, 0x6E, 0x99]) / 255
    upper = picture[: picture.shape[0] // 2, :, :3]
    third = picture.shape[1] // 3
    for column in range(3):  # reward, the evaluation and entropy are drawn, each in its panel
        panel = upper[:, column * third : (column + 1) * third]
        assert (np.abs(panel - blue).max(axis=2) < 0.02).sum() > 100


def test_a_run_of_one_step_has_a_picture_too(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(0, {"eval/held-out/greedy": 0.5})
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "untrained")
    assert pixels(tmp_path / "curves.png").shape[0] > 600


def test_curves_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MetricsLog(tmp_path).close()
    with pytest.raises(ValueError, match="expected at least one step"):
        save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "")
    assert not (tmp_path / "curves.png").exists()
