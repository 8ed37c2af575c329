"""A run that ends by what all its steps have spent, and the scores by question that it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from short_run import outcome
from tiny_run import quiet, tiny_run

from pyrl.answers import Exact
from pyrl.evaluate import Scoring
from pyrl.report import read_metrics
from pyrl.report.question_scores import read_question_scores, save_question_scores
from pyrl.report.step import StepObserver
from pyrl.run.config import Run
from pyrl.run.evaluation import TRAINED
from pyrl.run.lock import RunError
from pyrl.run.spending import all_spent, share_spent
from pyrl.train import Trainer

SCORING = Scoring(samples=3, max_tokens=21)
STEPS = 3


def train(run: Run) -> Trainer:
    trainer = Trainer(run, quiet(), scoring=SCORING)
    trainer.train()
    trainer.close()
    return trainer


def endless(folder: Path, **settings: Any) -> Run:
    return tiny_run(folder, steps=1000, schedule="linear", min_learning_rate=0.0, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three steps that has ended by its tokens."""
    run = endless(tmp_path_factory.mktemp("whole"), total_tokens=700, save_every=1)
    assert train(run).step == STEPS
    return run


def test_a_run_ends_before_the_first_step_that_would_exceed_its_tokens(
    whole: Run, tmp_path: Path
) -> None:
    rows = read_metrics(whole.output / "metrics.jsonl")[1:]
    cost = [tokens for row in rows if isinstance(tokens := row["num_tokens"], int)]
    assert len(cost) == STEPS
    assert cost[-1] <= 700 < cost[-1] + cost[0]
    exact = replace(whole, total_tokens=cost[1], output=tmp_path / "exact", eval_before=False)
    assert train(exact).step == 2
    rows = read_metrics(exact.output / "metrics.jsonl")
    assert [row["num_tokens"] for row in rows[1:]] == cost[:2]
    # The rate falls with the tokens: by the first step's share of them.
    assert rows[2]["learning_rate"] == pytest.approx(1e-6 * (1 - cost[0] / cost[1]))
    assert f"eval/{TRAINED}/greedy" in rows[2]
    assert (exact.output / "checkpoint-2").is_dir()
    assert "training steps 2," in (exact.output / "report.md").read_text()
    short = replace(exact, total_tokens=cost[1] - 1, output=tmp_path / "short")
    assert train(short).step == 1


def test_a_run_that_was_killed_ends_where_it_would_have(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(whole, output=tmp_path / "run")
    trainer = Trainer(run, quiet(), scoring=SCORING)
    calls = 0

    def killed(tokens: int) -> None:
        nonlocal calls
        calls += tokens
        if calls > 600:  # the scores before training have some of these
            raise RuntimeError("killed")

    monkeypatch.setattr(trainer.evaluations.evaluator, "on_tokens", killed)
    monkeypatch.setattr(trainer, "_on_tokens", killed)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    trainer.close()
    train(replace(run, resume=True))
    assert outcome(run.output, STEPS) == outcome(whole.output, STEPS)
    for name in ("before", "after"):
        scores = read_question_scores(run.output / "scores" / f"{name}.json")
        assert scores == read_question_scores(whole.output / "scores" / f"{name}.json")


def test_a_run_that_ended_by_its_steps_goes_on_to_its_total(whole: Run, tmp_path: Path) -> None:
    run = replace(whole, steps=1, output=tmp_path / "run")
    assert train(run).step == 1
    assert train(replace(run, steps=1000, resume=True)).step == STEPS
    last = f"checkpoint-{STEPS}/model.safetensors"
    assert (run.output / last).read_bytes() == (whole.output / last).read_bytes()
    found = [
        json.loads((r.output / "report.json").read_text())["evaluations"] for r in (run, whole)
    ]
    assert [[e["model"] for e in of] for of in found] == [["before", "after"]] * 2
    assert [e["metrics"] for e in found[0]] == [e["metrics"] for e in found[1]]


def test_a_total_below_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"total_tokens: expected .* got 3: the first step samples"):
        train(endless(tmp_path, total_tokens=3))
    for name in ("total_tokens", "total_trained_tokens", "total_seconds"):
        with pytest.raises(ValueError, match=f"{name}: expected >"):
            endless(tmp_path, **{name: 0})


def test_no_step_begins_after_the_seconds(tmp_path: Path) -> None:
    run = endless(tmp_path, total_seconds=1e-6, eval_before=False)
    assert train(run).step == 1


def test_no_step_begins_after_the_trained_tokens(whole: Run, tmp_path: Path) -> None:
    rows = read_metrics(whole.output / "metrics.jsonl")[1:]
    trained = [
        int(tokens) for row in rows if isinstance(tokens := row["pack/trained"], int | float)
    ]
    assert len(trained) == STEPS
    assert min(trained[:2]) > 0
    first = replace(whole, total_tokens=None, eval_before=False)
    for total, steps in ((trained[0], 1), (trained[0] + 1, 2)):
        run = replace(first, total_trained_tokens=total, output=tmp_path / str(total))
        assert train(run).step == steps
    assert read_metrics(run.output / "metrics.jsonl")[2]["learning_rate"] == pytest.approx(
        1e-6 * (1 - trained[0] / total)
    )
    # Killed after its first step, it still knows what that has trained.
    again = replace(run, output=tmp_path / "again", steps=1)
    assert train(again).step == 1
    assert train(replace(again, steps=1000, resume=True)).step == 2
    last = "checkpoint-2/model.safetensors"
    assert (again.output / last).read_bytes() == (run.output / last).read_bytes()


def test_the_share_that_is_spent_is_the_largest(tmp_path: Path) -> None:
    so_far = StepObserver(Exact())
    so_far.tokens, so_far.trained, so_far.seconds = 7, 6, 0.5
    run = tiny_run(tmp_path)
    assert share_spent(run, so_far) is None
    assert not all_spent(run, so_far)
    run = replace(run, total_seconds=1.0)
    assert share_spent(run, so_far) == 0.5
    assert not all_spent(run, so_far)
    assert share_spent(replace(run, total_trained_tokens=10), so_far) == 0.6
    assert share_spent(replace(run, total_trained_tokens=10, total_tokens=10), so_far) == 0.7
    assert share_spent(replace(run, total_trained_tokens=4), so_far) == 1.0
    assert all_spent(replace(run, total_trained_tokens=6), so_far)
    assert not all_spent(replace(run, total_trained_tokens=7, total_seconds=None), so_far)
    assert all_spent(replace(run, total_seconds=0.5), so_far)


def test_scores_by_question_are_those_of_the_report(whole: Run) -> None:
    report = json.loads((whole.output / "report.json").read_text())
    asked = [json.loads(line) for line in Path(whole.data).read_text().splitlines()]
    assert [evaluation["model"] for evaluation in report["evaluations"]] == ["before", "after"]
    for evaluation in report["evaluations"]:
        assert "by_question" not in evaluation
        path = whole.output / "scores" / f"{evaluation['model']}.json"
        scores, found = read_question_scores(path)[TRAINED], evaluation["metrics"]
        assert [score.question for score in scores] == [0, 1, 2, 3]
        assert sum(score.greedy for score in scores) == 4 * found["greedy"]
        assert sum(map(sum, (s.right for s in scores))) == 12 * found["pass@1/T=0.6"]
        assert sum(score.label_right for score in scores) == 4 * found["maj@3"]
        assert sum(any(score.right) for score in scores) == 4 * found["pass@3"]
        for score, row in zip(scores, asked, strict=True):
            assert score.text == row["prompt"]
            assert [answer == row["answer"] for answer in score.answers] == [*score.right]
            assert len({*score.answers} - {None}) == score.distinct
            assert score.label in score.answers
            assert 2 < score.length <= 21


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 0, "sets": {}}', "expected scores of format 2, got format 0"),
        ('{"format": 2, "sets": {"a": [{"que', "expected the scores of questions, got JSONDecode"),
        ('{"format": 2, "sets": {"a": [{"question": 3}]}}', "scores of questions, got KeyError"),
        ("[]", "expected the scores of questions, got TypeError"),
    ],
)
def test_other_files_are_no_scores(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    save_question_scores(path, {"a": []})
    assert read_question_scores(path) == {"a": []}
    path.write_text(text)
    with pytest.raises(ValueError, match=f"before.json: .*{said}"):
        read_question_scores(path)
