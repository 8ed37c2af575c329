"""Who is right: the task's own scorer says it where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reasoning_gym
from leaf_records import Question, leaves_of

from pyrl.answers import Exact, Whole, classify
from pyrl.answers.truth import right
from pyrl.reward import TrueReward
from pyrl.sources import Task
from pyrl.vote import Majority


def question(task: str) -> Question:
    entry = dict(reasoning_gym.create_dataset(task, size=1, seed=0)[0])
    text, answer = entry.pop("question"), entry.pop("answer")
    return Question(
        text=text, answer=answer, columns=entry, task=Task(task, '{"size": 1, "seed": 0}')
    )


def test_the_scorer_of_a_task_says_who_is_right(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    countdown = question("countdown")
    target = str(countdown.columns["metadata"]["target"])
    numbers = countdown.columns["metadata"]["numbers"]
    solution = str(countdown.answer)
    other = f"({solution})"  # as a text another answer
    said = [
        solution,
        other,
        target,
        f"{numbers[0]} + {numbers[1]}",
        "__import__('os')._exit(1)",  # some scorers evaluate what a model wrote
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"__import__('os').remove({str(kept)!r})",
        None,
    ]
    leaves = leaves_of([text or "" for text in said])
    answers = classify(leaves, Whole(), Exact())
    assert answers.class_N.tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        -1,
    ]  # votes compare answers with answers
    votes = Majority()(leaves, answers)
    reward_N = TrueReward()(leaves, answers, votes, [countdown])
    np.testing.assert_array_equal(reward_N, [1, 1, 0, 0, np.nan, 0, 0, 0])
    assert list(tmp_path.iterdir()) == [kept]


def test_what_a_scorer_cannot_read_is_wrong() -> None:
    puzzle = question("game_of_life")
    right_N = right([puzzle.answer, "{}", "(((", ""], [puzzle] * 4, Exact())
    np.testing.assert_array_equal(right_N, [1, 0, 0, 0])


@pytest.mark.parametrize(("answer", "truth", "expected"), [("a", "a", 1), ("a", "b", 0)])
def test_without_a_scorer_answers_are_compared(answer: str, truth: str, expected: float) -> None:
    assert right([answer, None], [Question(answer=truth)] * 2, Exact()).tolist() == [expected, 0]
    assert np.isnan(right([answer, None], [Question()] * 2, Exact())).all()
