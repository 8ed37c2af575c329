"""A whole comparison of small runs: what it leaves, also when it is killed, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from short_run import SETTINGS
from tiny_run import write_questions

from pyrl import cli
from pyrl.compare.comparing import FILES, compare
from pyrl.compare.contestants import RANDOM, TRUE, parse_compare
from pyrl.compare.result import result
from pyrl.compare.tables import brief, facts, tables
from pyrl.report import read_metrics
from pyrl.report.question_scores import read_question_scores
from pyrl.reward import RandomReward, TrueReward
from pyrl.run import results

SIZES = shlex.split("""
    --budget tokens=700 --seeds 2 --temperatures 0.6 --no-controls --sample.votes 4 --sample.train 4
    --sample.max-tokens 18 --loss.kl.coef 0 --learning-rate 1e-5 --save-every 1
""")
METHODS = ("ttrl", "few=ttrl --sample.votes 2 --sample.train 2")


def argv(folder: Path, output: str, *more: str) -> list[str]:
    """Two methods, of which one samples less, on four questions and four held-out ones."""
    data = ["--data", str(folder / "questions.jsonl"), "--eval-data", str(folder / "others.jsonl")]
    return [*METHODS, *SETTINGS, *SIZES, *data, "--output", str(folder / output), *more]


@dataclass(frozen=True)
class Done:
    folder: Path
    record: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread_without_curves() -> Iterator[None]:
    """To draw each run takes longer than the run."""
    threads, draw = torch.get_num_threads(), results.save_curves
    results.save_curves = lambda *_: None
    yield
    torch.set_num_threads(threads)
    results.save_curves = draw


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("compare")
    rows = write_questions(folder / "questions.jsonl", 8).read_text().splitlines(keepends=True)
    (folder / "questions.jsonl").write_text("".join(rows[:4]))
    (folder / "others.jsonl").write_text("".join(rows[4:]))
    return Done(folder, compare(parse_compare(argv(folder, "done")), lambda text: None))


def timeless(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((path / "comparison.json").read_text())
    del record["times"]
    return record


def test_a_comparison_leaves_what_its_runs_came_to(done: Done) -> None:
    record, output = done.record, done.folder / "done"
    assert json.loads((output / "comparison.json").read_text()) == record
    assert record["methods"] == ["ttrl", "few"]
    assert record["controls"] == []
    assert record["questions"] == {"trained questions": 4, "held-out questions": 4}
    training = {(row["model"], row["seed"]): row for row in record["training"]}
    for model in ("ttrl", "few"):
        for seed in (0, 1):
            run = output / "runs" / model / f"seed-{seed}"
            rows = read_metrics(run / "metrics.jsonl")
            own = training[model, seed]
            assert own["sampled tokens"] == rows[-1]["num_tokens"] <= 700
            # One more step would have been too many.
            assert own["sampled tokens"] + own["sampled tokens"] / own["steps"] > 600
            scores = read_question_scores(run / "scores" / "after.json")
            for name, of in scores.items():
                (row,) = [r for r in record["scores"] if (r["model"], r["set"]) == (model, name)]
                share = sum(sum(score.right) for score in of) / (2 * len(of))
                assert row["by seed"]["pass@1"][seed] == share
    assert training["few", 0]["steps"] > 2 * training["ttrl", 0]["steps"]
    means = {(r["model"], r["set"]): r["metrics"]["greedy"] for r in record["scores"]}
    for row in record["differences"]:
        assert -1 <= row["low"] <= row["mean"] <= row["high"] <= 1
        if row["metric"] == "greedy":
            first, second = (means[row[side], row["set"]] for side in ("first", "second"))
            assert row["mean"] == pytest.approx(first - second)
    pairs = {(row["first"], row["second"]) for row in record["differences"]}
    assert pairs == {("ttrl", "few"), ("ttrl", "untrained"), ("few", "untrained")}
    votes = record["more votes"]["votes"]
    assert 9 < votes < 20  # 700 tokens for four questions whose answers have at most 18
    assert f"maj@{votes}" in record["more votes"]["rows"][-1]["metrics"]


def test_its_page_is_one_file_with_every_table(done: Done) -> None:
    said = (done.folder / "done" / "comparison.html").read_text()
    assert "data:image/png;base64,iVBOR" in said
    assert said.count("src=") == 1
    assert "href" not in re.sub("base64,[^>]*", "", said)
    for table in tables(done.record):
        assert table.html() in said
        assert table.markdown() in (done.folder / "done" / "comparison.md").read_text()
    assert {table.title for table in brief(done.record)} < {
        t.title for t in tables(done.record)
    } | {"Scores on 4 held-out questions"}
    assert "no held-out" not in facts(done.record)


KILLED = """
import multiprocessing, os, sys
context = multiprocessing.get_context
multiprocessing.get_context = lambda kind: context("fork")  # an import takes seconds
from pyrl.compare.comparing import compare
from pyrl.compare.contestants import parse_compare
compare(parse_compare(sys.argv[1:]), lambda text: None)
"""


def test_a_comparison_that_was_killed_with_its_workers_ends_with_the_same_record(
    done: Done,
) -> None:
    output = done.folder / "killed"
    options = argv(done.folder, "killed")
    started = subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, *options, "--workers", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    locks = output / "runs"
    while not [*locks.glob("*/*/checkpoint-*")] and started.poll() is None:
        time.sleep(0.02)
    workers = [lock.read_text().split()[1] for lock in locks.glob("*/*/.lock")]
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert workers
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "a worker outlives the comparison"
        time.sleep(0.02)
    assert not (output / "comparison.json").exists()
    compare(parse_compare([*options, "--resume"]), lambda text: None)
    assert timeless(output) == timeless(done.folder / "done")


def refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *options])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "tokens=5"], "expected METHODs before the options of pyrl compare, got none"),
        (["ttrl", "--demo"], "expected --budget tokens=N, trained=N or seconds=N, got none"),
        (["ttrl", "--budget", "tokens=few"], "with a whole N, got 'tokens=few'"),
        (["ttrl", "--budget", "steps=5"], "with a whole N, got 'steps=5'"),
        (["ttrl", "--quick", "--seeds", "0"], "seeds: expected >= 1, got 0"),
        (["ttrl", "--quick", "--temperatures", "0"], "temperatures: expected numbers > 0, got 0"),
        (["ttrl", "--quick", "--seed", "3"], "--seeds N says how many there are"),
        (["ttrl", "echo --total-trained-tokens 9", "--quick"], "--budget trained=N is the one of"),
        (["ttrl", "echo --total-tokens 9", "--quick"], "--budget tokens=N is the one of all runs"),
        (["ttrl", "ttrl", "--quick"], "expected another name for each method, got 'ttrl'"),
        (["ttrl", "b=ttrl --data demo:heldout", "--quick"],
         "b: expected the data of ttrl, 'demo:train', got 'demo:heldout'"),
        (["ttrl", "grpo", "--quick"], "there is no demo method 'grpo'"),
        (["true labels=ttrl", "--quick"], "there is no demo method 'true'"),
        (["--quick"], "expected METHODs before"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert said in refused([*options, "--output", str(output)], capsys)
    assert not output.exists()


def test_another_comparison_s_directory_is_refused(
    done: Done, capsys: pytest.CaptureFixture[str]
) -> None:
    before = timeless(done.folder / "done")
    assert "expected a new or empty directory" in refused(argv(done.folder, "done"), capsys)
    more = argv(done.folder, "done", "--resume", "--budget", "tokens=800")
    assert "budget that the comparison began with ('700 sampled" in refused(more, capsys)
    more = argv(done.folder, "done", "--resume", "--learning-rate", "1e-6")
    assert "got other settings of the same names" in refused(more, capsys)
    more = argv(done.folder, "nothing", "--resume")
    assert "nothing to resume, there is no compare.yaml" in refused(more, capsys)
    assert timeless(done.folder / "done") == before


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    def changed(output: Path) -> None:
        text = (output / name).read_text()
        assert old in text
        (output / name).write_text(text.replace(old, new, 1))

    return changed


AFTER = "runs/few/seed-1/scores/after.json"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (change("compare.yaml", "format: 1", "format: 7"), "of format 1, got format 7: another"),
        (change(AFTER, '"format": 2', '"format": 3'), "scores of format 2, got format 3: another"),
        (change(AFTER, '"question": 2', '"question": 5'), "expected the same questions of few and"),
        (change(AFTER, "]}", ""), "after.json: expected the scores of questions, got JSONDecode"),
        (lambda output: (output / AFTER).unlink(), "expected the scores of a finished run, found"),
    ],
    ids=["plan", "version", "questions", "damaged", "half"],
)
def test_runs_that_are_not_of_this_comparison_are_refused(
    harm: Callable[[Path], None],
    said: str,
    done: Done,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(shutil.copytree(done.folder / "done", tmp_path / "harmed"))
    harm(output)
    more = argv(done.folder, "done", "--resume", "--output", str(output))
    assert said in refused(more, capsys)


def test_controls_are_the_first_method_with_another_reward() -> None:
    found = parse_compare(["echo", "ttrl", "--quick"]).contestants
    assert [one.label for one in found] == ["echo", "ttrl", RANDOM, TRUE]
    first = found[0].run.algorithm
    for one, reward in zip(found[2:], (RandomReward(), TrueReward()), strict=True):
        assert one.run.algorithm == replace(first, reward=reward)
        assert one.run.data == "demo:train"


def test_one_seed_and_no_answers_leave_out_what_needs_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(tmp_path / "questions.jsonl", 4, [None] * 4)
    output = tmp_path / "out"
    options = ["ttrl", *SETTINGS, *SIZES, "--controls", "--data", str(tmp_path / "questions.jsonl")]
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["compare", *options, "--output", str(output), "--seeds", "1", "--budget", "seconds=1"]
        )
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert "What training took" in printed.out
    assert str(output / "comparison.html") in printed.out
    assert "2 of 2: random reward, seed 0" in printed.err
    assert "no true answers: no control trains on them" in printed.err
    record = json.loads((output / "comparison.json").read_text())
    assert record["budget"] == "1 seconds"
    assert record["more votes"]["spent"] == record["training"][0]["sampled tokens"]
    assert record["controls"] == [RANDOM]
    assert (record["scores"], record["differences"], record["questions"]) == ([], [], {})
    assert "label accuracy" not in record["training"][0]["curves"]
    said = facts(record)
    assert "no intervals: how much a method varies with its seed is not seen in one" in said
    assert "no question has a true answer, so that there are no scores" in said
    assert [table.title for table in tables(record)] == [
        "The end of training",
        "What training took",
    ]
    assert all((tmp_path / "out" / name).stat().st_size for name in FILES)


def test_a_run_that_ends_with_budget_left_is_refused(done: Done) -> None:
    comparison = parse_compare(argv(done.folder, "done", "--steps", "2"))
    with pytest.raises(
        ValueError,
        match=r"ttrl, seed 0: expected a run that spends 700 sampled .*"
        r"it ended after its 2 steps",
    ):
        result(comparison, {})
