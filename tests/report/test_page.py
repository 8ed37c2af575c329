"""The page of a run: what is in it, how large it is, and which directories are none of a run."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from run_history import history
from saved_runs import SETTINGS, write_run, write_trees

from pyrl import cli
from pyrl.report import MetricsLog, Progress
from pyrl.report.metrics import MEANING
from pyrl.report.page import write_page
from pyrl.report.page.run_record import LONGEST, run_record
from pyrl.report.page.sections import SECTIONS
from pyrl.report.page.thinning import curves

HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp;\u2028\ud800</b>"
"""What a response may have: it ends scripts, begins comments, and is no valid Unicode."""


def data_of(page: Path) -> Any:
    found = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text()
    )
    assert len(found) == 1
    return json.loads(found[0])


def test_a_page_has_all_of_a_run_and_asks_for_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5, alarms=[(3, "Step 3: entropy has grown.")])
    write_trees(run, 2, ["a", "b"], trunks=2, leaves=2, length=6)
    page = write_page([run])
    assert page == run / "report.html"
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(|fetch\(|XMLHttp", text)
    (record,) = data_of(page)["runs"]
    assert record["title"] == "echo on demo, demo:train"
    assert (record["last"], record["steps"], record["finished"]) == (5, 5, True)
    assert set(MEANING) | {"eval/held-out/greedy"} == set(record["curves"])
    assert record["curves"]["eval/held-out/greedy"] == {"s": [0, 5], "v": [0.4, 0.9]}
    assert record["alarms"] == [{"step": 3, "alarm": "Step 3: entropy has grown."}]
    assert record["completions"]["all"] == len(record["completions"]["rows"]) == 5
    assert record["settings"]["fork.max_width"] == 4
    assert [tree["step"] for tree in record["trees"]["shown"]] == [2]


def test_a_text_of_a_model_cannot_leave_the_data(tmp_path: Path) -> None:
    plain = write_page([write_run(tmp_path / "plain", 2)]).read_text()
    run = write_run(tmp_path / "run", 2, text=HOSTILE)
    write_trees(run, 1, [HOSTILE.replace("\ud800", ""), "x"], trunks=1, leaves=2, length=4)
    page = write_page([run])
    text = page.read_text("utf-8")
    for sign in ("<script", "</script", "<!--", "<b>"):
        assert text.count(sign) == plain.count(sign)
    (record,) = data_of(page)["runs"]
    assert record["completions"]["rows"][0]["completion"] == HOSTILE
    assert HOSTILE.replace("\ud800", "") in record["trees"]["shown"][0]["words"]


def test_a_name_of_a_run_is_no_markup(tmp_path: Path) -> None:
    page = write_page([write_run(tmp_path / "<i>&", 1)])
    assert "<title>pyrl: &lt;i&gt;&amp;</title>" in page.read_text()


def test_a_long_run_keeps_its_means_and_extremes_in_few_points() -> None:
    rows = history(2000, reward=lambda n: float(n == 1234), entropy=lambda n: n / 2000, late=None)
    rows[100]["late"], rows[101]["late"] = 2.5, "no number"
    thin = curves(rows, 300)
    assert set(thin) == {"reward", "entropy", "late"}
    for curve in thin.values():
        assert len(curve["s"]) <= 300
        assert curve["s"] == sorted(set(curve["s"]))
        assert all(
            lo <= v <= hi for lo, v, hi in zip(curve["lo"], curve["v"], curve["hi"], strict=True)
        )
    assert max(thin["reward"]["hi"]) == 1
    assert thin["entropy"]["s"][-1] == 2000
    assert thin["entropy"]["hi"][-1] == 1
    assert thin["late"] == {"s": [101], "v": [2.5], "lo": [2.5], "hi": [2.5]}
    few = curves(rows[:300], 300)
    assert few["entropy"] == {"s": list(range(1, 301)), "v": [n / 2000 for n in range(1, 301)]}


def test_every_panel_shows_metrics_that_there_are(tmp_path: Path) -> None:
    names = [name for s in SECTIONS for panel in s.panels for _, name in panel.lines]
    assert {name for name in names if not name.startswith("eval/")} <= set(MEANING)


def test_two_thousand_steps_with_many_trees_are_less_than_five_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2000, text="long " * 2000)
    for step in range(16):
        write_trees(run, step, ["word", " other"], trunks=8, leaves=8, length=160)
    page = write_page([run])
    assert page.stat().st_size < 5e6
    (record,) = data_of(page)["runs"]
    assert record["trees"]["steps"] == 16
    shown = [tree["step"] for tree in record["trees"]["shown"]]
    assert {0, 15} <= set(shown)
    assert 5 < len(shown) < 16
    told = [row["step"] for row in record["completions"]["rows"]]
    assert {1, 2000} <= set(told)
    assert len(record["completions"]["rows"][0]["completion"]) < LONGEST + 50


def test_of_a_tree_beyond_all_bounds_the_first_leaf_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1)
    write_trees(run, 1, ["a"], trunks=2, leaves=1, length=3)
    (tree,) = run_record(run, "run", runs=10**9)["trees"]["shown"]
    assert len(tree["word"]) == 3


def test_a_run_that_is_not_finished_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 4)
    (run / "report.json").unlink()
    (run / "alarms.jsonl").unlink()
    (run / "completions.jsonl").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # a crash
    (run / "trees").mkdir()
    (run / "trees" / ".5.safetensors.part").write_bytes(b"half")
    record = run_record(run, "run", 1)
    assert (record["last"], record["finished"], record["alarms"]) == (4, False, None)
    assert record["completions"] == {"rows": [], "all": 0}
    assert record["trees"] == {"shown": [], "steps": 0}


def remove(name: str) -> Any:
    return lambda run: (run / name).unlink()


def write(name: str, text: str) -> Any:
    return lambda run: (run / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "run: expected the output directory of a run, there is none"),
        (remove("run.yaml"), "run: expected the output directory of a run, it has no run.yaml"),
        (remove("metrics.jsonl"), "run: expected the log of a run, it has no metrics.jsonl"),
        (write("metrics.jsonl", ""), "metrics.jsonl: expected at least one step, got none"),
        (write("metrics.jsonl", "nothing\n"), "metrics.jsonl:1: expected a JSON object"),
        (write("alarms.jsonl", "[]\n"), "alarms.jsonl:1: expected a JSON object"),
        (write("run.yaml", "a: [1"), "run.yaml: no valid YAML"),
        (write("run.yaml", "- 1"), "run.yaml: expected the settings of a run, got [1]"),
        (
            write("run.yaml", yaml.safe_dump(SETTINGS)),
            "run.yaml: expected the setting 'steps', got None: this is no run of this version",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(
    spoil: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", 2)
    spoil(run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(run), "--output", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_the_command_names_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name / "run", 2)) for name in ("a", "b")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *runs, "--output", str(tmp_path / "deep" / "page.html")])
    assert stop.value.code == 0
    page = tmp_path / "deep" / "page.html"
    assert capsys.readouterr().out == f"report   {page}\n"
    assert [run["name"] for run in data_of(page)["runs"]] == runs  # two have the same last part
    with pytest.raises(SystemExit):
        cli.main(["report", runs[0], "--output", str(tmp_path)])
    assert capsys.readouterr().out == f"report   {tmp_path / 'report.html'}\n"
    with pytest.raises(SystemExit):
        cli.main(["report"])
    assert "expected 1 to 6 runs side by side, got 0" in capsys.readouterr().err


def test_what_alarms_said_is_kept_once_over_a_resume(tmp_path: Path) -> None:
    progress = Progress(console=Console(quiet=True))
    with MetricsLog(tmp_path / "run") as log:
        for step in (1, 2):
            progress.alarm(f"Step {step}: something.")
            log.write(step, {"reward": math.nan})
            log.write_alarms(step, progress.take_alarms())
        log.write_alarms(3, progress.take_alarms())
    with MetricsLog(tmp_path / "run", resume_at=2) as log:
        log.write_alarms(2, ["Step 2: something.", "Step 2: more."])
        log.write(2, {"reward": 1.0})
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"steps": 2}))
    said = run_record(tmp_path / "run", "run", 1)["alarms"]
    assert [(row["step"], row["alarm"]) for row in said] == [
        (1, "Step 1: something."),
        (2, "Step 2: something."),
        (2, "Step 2: more."),
    ]
