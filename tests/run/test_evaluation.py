"""Which questions a run scores, when, and what that may cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tiny_run import SCORING, make_trainer, quiet, tiny, tiny_run, write_questions

from pyrl import demo
from pyrl.algorithm import Algorithm
from pyrl.demo.run import echo, ettrl, ttrl
from pyrl.evaluate import Evaluator, Scoring
from pyrl.methods import METHODS
from pyrl.prompts import Prompt
from pyrl.report import Evaluation
from pyrl.run.config import Run
from pyrl.run.directory import RunError, claim, find_start
from pyrl.run.evaluation import TRAINED, Evaluations
from pyrl.train import Trainer

LIMIT = 21


@dataclass
class Recorder:
    """Notes what it is asked to score, and scores nothing."""

    asked: list[tuple[str, str, list[int]]] = field(default_factory=list)
    responses: int = 0

    def __call__(
        self, name: str, model: Any, prompts: Sequence[Prompt], how: Scoring
    ) -> Evaluation:
        self.asked.append((name, model, [prompt.index for prompt in prompts]))
        low = how.samples if how.low_temperature else 0
        self.responses += len(prompts) * (1 + low + max(how.samples, how.votes))
        return Evaluation(name, model, {"greedy": 0.5}, len(prompts), 1, 1.0)


def questions(count: int, *, unanswered: Sequence[int] = ()) -> list[Prompt]:
    return [
        Prompt(i, f"{i}=", np.array([1], np.int32), None if i in unanswered else str(i), {})
        for i in range(count)
    ]


def evaluations(
    run: Run, sets: dict[str, list[Prompt]], scoring: Scoring | None = None
) -> tuple[Evaluations, Recorder]:
    recorder = Recorder()
    how = scoring or Scoring(samples=run.eval_samples)
    return Evaluations(run, cast(Evaluator, recorder), sets, how, quiet()), recorder


OF_EACH_SIZE = {
    make().sample.votes: name for name, make in METHODS.items() if make().sample.votes >= 8
}.values()
"""A method for each number of votes: nothing else of it counts. In a hundred steps with fewer, a
twentieth is less than one question of three sets."""


def sized(method: str, **settings: Any) -> Run:
    """A run of default sizes."""
    return Run("M", "D", method, METHODS[method](), Path("runs"), **settings)


def whole_run(made: Evaluations) -> None:
    for step in range(made.run.steps + 1):
        made.due(step)


@pytest.mark.parametrize("method", OF_EACH_SIZE)
@pytest.mark.parametrize("every", [0, 10])
@pytest.mark.parametrize("others", [0, 2])
def test_evaluations_cost_less_than_a_tenth_of_what_training_samples(
    method: str, every: int, others: int
) -> None:
    """Of 7,473 questions all were scored twice: 254,082 responses beside 40,960 in training."""
    run = sized(method, eval_every=every)
    sets = {TRAINED: questions(7473)} | {f"set {n}": questions(500) for n in range(others)}
    made, recorder = evaluations(run, sets)
    whole_run(made)
    trained = run.steps * run.prompts_per_step * run.algorithm.sample.votes
    assert trained / 100 < recorder.responses < trained / 10


@pytest.mark.parametrize("limits", [{"stop_when_decided": True}, {"max_tokens_per_prompt": 4096}])
def test_budgets_of_training_are_budgets_of_its_evaluations(limits: dict[str, Any]) -> None:
    run = sized("ttrl")
    sample = replace(run.algorithm.sample, **limits)
    made, recorder = evaluations(
        replace(run, algorithm=replace(run.algorithm, sample=sample)), {TRAINED: questions(7473)}
    )
    whole_run(made)
    least = sample.train if sample.stop_when_decided else 4
    assert 0 < recorder.responses < run.steps * run.prompts_per_step * least / 10


@pytest.mark.parametrize("make", [ettrl, echo])
def test_tokens_of_evaluations_are_a_small_part_of_a_run_s(make: Any, tmp_path: Path) -> None:
    """Counted in a run: leaves of a tree share tokens, responses of an evaluation do not."""
    run = tiny_run(tmp_path, tiny(make(), votes=16), steps=6, eval_limit=None, max_rows=64)
    trainer = Trainer(run, quiet(), scoring=Scoring(samples=1, max_tokens=LIMIT))
    report = trainer.train()
    assert [score.questions for score in report.evaluations] == [2, 2]
    assert sum(score.tokens for score in report.evaluations) < trainer.observer.tokens / 10
    assert "scored 2 of 4 trained questions" in (run.output / "report.md").read_text()


def test_the_same_random_questions_are_scored_each_time_whatever_the_seed() -> None:
    asked = []
    for seed in (0, 1):
        run = sized("ttrl", eval_every=1, steps=2, eval_limit=5, seed=seed)
        made, recorder = evaluations(run, {TRAINED: questions(100)})
        whole_run(made)
        assert [model for _, model, _ in recorder.asked] == ["before", "after", "after"]
        asked += [places for _, _, places in recorder.asked]
    assert asked == [asked[0]] * 6
    assert asked[0] == sorted(set(asked[0]))
    assert len(asked[0]) == 5
    assert asked[0] != [0, 1, 2, 3, 4]
    assert made.left_out() == "5 of 100 trained questions"


def test_all_questions_are_scored_where_that_is_asked_for() -> None:
    made, recorder = evaluations(sized("ttrl", steps=1, eval_limit=0), {TRAINED: questions(900)})
    whole_run(made)
    assert [places for _, _, places in recorder.asked] == [list(range(900))] * 2
    assert made.left_out() == ""


def test_a_row_without_an_answer_leaves_itself_out_and_not_all_scores(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in demo.QUESTIONS["train"].read_text().splitlines()[:3]]
    write_questions(tmp_path / "questions.jsonl", 4, [*(row["answer"] for row in rows), None])
    trainer = make_trainer(tiny_run(tmp_path, steps=1))
    report = trainer.train()
    assert [(score.set, score.questions) for score in report.evaluations] == [(TRAINED, 3)] * 2
    assert report.facts["scored"] == "3 of 4 trained questions"


def test_questions_to_evaluate_on_of_which_none_has_an_answer_are_refused(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "open.jsonl", 2, [None, None])
    with pytest.raises(ValueError, match=r"open.jsonl: expected questions with true answers, none"):
        make_trainer(tiny_run(tmp_path, eval_data=str(data)))


@pytest.mark.parametrize(
    ("settings", "models"),
    [
        ({}, ["before", "after"]),
        ({"eval_before": False}, ["after"]),
        ({"eval_after": False}, ["before"]),
        ({"eval_before": False, "eval_after": False}, []),
        ({"eval_before": False, "eval_after": False, "eval_every": 2}, ["after", "after"]),
    ],
)
def test_evaluations_can_be_switched_off(settings: dict[str, bool], models: list[str]) -> None:
    made, recorder = evaluations(sized("ttrl", steps=4, **settings), {TRAINED: questions(9)})
    whole_run(made)
    assert [model for _, model, _ in recorder.asked] == models
    assert made.finished


def test_a_run_without_evaluations_has_no_scores(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(ttrl(), updates=2), steps=1, eval_before=False, eval_after=False)
    trainer = make_trainer(run)
    assert trainer.train().evaluations == ()
    assert trainer.first_words == ()
    assert "eval/" not in (run.output / "metrics.jsonl").read_text()


def test_a_run_that_is_too_short_for_scores_says_so(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_run(tmp_path, tiny(ttrl(), updates=2), eval_limit=None))
    assert trainer.evaluations.due(0) == {}
    (said,) = trainer.first_words
    assert said.startswith("There is no evaluation: ")
    assert "--eval-limit N" in said


def test_a_run_that_goes_on_for_longer_scores_the_questions_of_before() -> None:
    made, recorder = evaluations(sized("ttrl", steps=8), {TRAINED: questions(900)})
    made.due(0)
    longer, later = evaluations(sized("ttrl", steps=80), {TRAINED: questions(900)})
    longer.taken = made.taken
    longer.due(80)
    assert later.asked[0][2] == recorder.asked[0][2]
    assert len(later.asked[0][2]) < 20


def test_a_limit_is_part_of_what_a_run_began_with(tmp_path: Path) -> None:
    """A gain is that of the same questions."""
    run = tiny_run(tmp_path, steps=1)
    claim(run)
    with pytest.raises(RunError, match=r"eval_limit \(was 0, is 1\)"):
        find_start(replace(run, resume=True, eval_limit=1))


def test_larger_votes_and_low_temperatures_are_in_the_count() -> None:
    algorithm: Algorithm = METHODS["ttrl"]()
    run = Run("M", "D", "ttrl", algorithm, Path("runs"))
    counts = []
    for how in (SCORING, replace(SCORING, votes=64), replace(SCORING, low_temperature=0.0)):
        made, recorder = evaluations(run, {TRAINED: questions(7473)}, how)
        whole_run(made)
        counts.append(len(made.asked(TRAINED)))
        assert recorder.responses < run.steps * run.prompts_per_step * algorithm.sample.votes / 10
    assert counts[1] < counts[0] < counts[2]
