from __future__ import annotations

import json
import math
import re
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from run_history import history, written

from pyrl.report import (
    Completion,
    Evaluation,
    MetricsLog,
    Report,
    read_metrics,
    save_curves,
)
from pyrl.report.alarms import RULES
from pyrl.report.curves import PANELS
from pyrl.report.metrics import MEANING, matching
from pyrl.report.progress import HEADLINE
from pyrl.report.table import IN_TRAINING, first_and_last

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
        self.tables: list[tuple[int, Any]] = []
        self.finished = 0

    def init(self, **settings: Any) -> Service:
        self.inits.append(settings)
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        if "completions" in row:
            self.tables.append((step, row["completions"]["dataframe"].to_dict("records")))
        else:
            self.rows.append((step, row))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def service(name: str, monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    module = ModuleType(name)
    module.__dict__.update(
        init=service.init, log=service.log, finish=service.finish, Table=lambda **table: table
    )
    monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return service


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_sent_each_step_once_also_after_a_resume(
    tmp_path: Path, service: Service, name: Any
) -> None:
    said = [Completion("1+1=", "?", None, "2", math.nan), Completion("1+1=", "2", "2", "2", 1.0)]
    with MetricsLog(tmp_path, [name]) as log:
        for step in (1, 2, 3):
            log.write_completions(step, said)
            log.write(step, {"reward": 0.5, "kl": math.nan, "note": "text"})
    with MetricsLog(tmp_path, [name], resume_at=2) as log:
        for step in (2, 3, 4):
            log.write_completions(step, said)
            log.write(step, {"reward": 0.5})
    assert service.rows == [(step, {"reward": 0.5}) for step in (1, 2, 3, 4)]
    assert [step for step, _ in service.tables] == [1, 2, 3, 4]
    rows = lines(tmp_path / "completions.jsonl")
    assert [row for _, table in service.tables for row in table] == rows
    assert [row["answer"] for row in rows] == [None, "2"] * 4
    assert service.finished == 2
    first, second = service.inits
    assert first["name"] == second["name"] == tmp_path.name
    assert first["project"] == "pyrl"
    assert first.get("id") == second.get("id")
    assert second["resume"] == "allow"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_the_settings_and_its_names_from_the_environment(
    tmp_path: Path, service: Service, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "sorting")
    monkeypatch.setenv("WANDB_NAME", "first try")
    settings = {"steps": 3, "loss": {"kl": {"coef": 0.0}}}
    MetricsLog(tmp_path, [name], settings=settings).close()
    (init,) = service.inits
    assert (init["project"], init["name"], init["config"]) == ("sorting", "first try", settings)


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
        MetricsLog(tmp_path / "run", ["tensorbord"])  # a typo
    assert not (tmp_path / "run").exists()


def test_every_name_that_a_reader_uses_is_a_metric() -> None:
    used = {name for panel in PANELS for _, name in panel.lines}
    used |= set(IN_TRAINING.values()) | set(HEADLINE.values()) | {rule.metric for rule in RULES}
    assert {name for name in used if not name.startswith("eval/*/")} <= set(MEANING)


def test_patterns_find_the_vote_of_any_number_of_samples() -> None:
    row = {"eval/held-out/maj@4": 0.5, "eval/held-out/pass@4": 0.5, "eval/a*/maj@64": 0.5}
    assert matching("eval/*/maj@*", row) == ["eval/held-out/maj@4", "eval/a*/maj@64"]
    assert "eval/*/maj@*" in {name for panel in PANELS for _, name in panel.lines}


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


def training_rows(steps: int) -> list[dict[str, Any]]:
    return [
        {"step": 0, "eval/held-out/greedy": 0.5},
        *history(steps, vote__majority_ratio=lambda step: step / 100, entropy=0.25, reward=None),
    ]


def test_a_run_without_answers_reports_its_first_steps_against_its_last() -> None:
    training = first_and_last(training_rows(20))
    assert training == {
        "first 5 steps": {"vote share": pytest.approx(0.03), "entropy": 0.25},
        "last 5 steps": {"vote share": pytest.approx(0.18), "entropy": 0.25},
    }
    title = "echo on a model with a long name, a file of questions with a very long name"
    report = Report(title, (), {"seed": 0}, training)
    console = Console(file=StringIO(), width=80)
    console.print(report)
    text = written(console)
    assert title in text  # whole
    assert re.search(r"vote share +│ +0.03 │ +0.18 │", text)
    assert "reward" not in text
    assert "brackets" not in text
    assert report.markdown().splitlines()[2:6] == [
        "| | first 5 steps | last 5 steps |",
        "|---|---:|---:|",
        "| vote share | 0.03 | 0.18 |",
        "| entropy | 0.25 | 0.25 |",
    ]


@pytest.mark.parametrize(
    ("steps", "parts"),
    [
        (0, []),
        (1, ["only step"]),
        (2, ["first step", "last step"]),
        (5, ["first 2 steps", "last 2 steps"]),
    ],
)
def test_short_runs_have_a_beginning_and_an_end_too(steps: int, parts: list[str]) -> None:
    assert [*first_and_last(training_rows(steps))] == parts


def test_scores_of_a_model_that_was_only_scored_are_not_called_untrained() -> None:
    report = Report("m on d", (evaluation("d", "given", greedy=0.5),))
    console = Console(file=StringIO(), width=80)
    console.print(report)
    for text in (written(console), report.markdown()):
        assert "untrained" not in text
        assert "brackets" not in text
        assert "up to 0.050" in text
    assert "| greedy | 0.500 |" in report.markdown()


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
