r"""The truth: what a data set gives as the answer of a question, and who is right by it.

A reasoning_gym task that has a scorer of its own is judged by it: `countdown` accepts every sum
that meets the target, and not the target itself. Votes still compare answers with answers.
"""

from __future__ import annotations

import base64
import pickle
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl.answers.equivalence import Equivalence, is_text
from pyrl.answers.extraction import Boxed
from pyrl.answers.pool import Outcome, Status, VerifierPool
from pyrl.sources import Task

_MARK = re.compile(r"####\s*(\S[^\n]*)\s*$")
"""GSM8K's: reasoning, and the answer in the last line."""
_MANY_WORDS = 8


class Question(Protocol):
    """What is known of the truth of a question; `pyrl.prompts.Prompt` has it."""

    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> str | None: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...
    @property
    def task(self) -> Task | None: ...


def has_truth(question: Question) -> bool:
    """Whether anything says which answers are right: a task's scorer or a true answer."""
    return question.task is not None or question.answer is not None


def final_answer(truth: str) -> str:
    r"""The answer in a whole solution: what follows its last ####, or its last `\boxed{}`."""
    marked = _MARK.search(truth)
    return marked[1].strip() if marked else Boxed()(truth) or truth


def is_long_text(truth: str) -> bool:
    """Whether an answer equals this one only if it repeats all of its words."""
    return len(truth.split()) >= _MANY_WORDS and is_text(truth)


def right(
    answers: Sequence[str | None], questions: Sequence[Question], equivalence: Equivalence
) -> NDArray[np.float64]:
    """Whether each answer is that of its question: 1, 0 (also for None), NaN where nobody knows.

    Nobody knows if the question has no truth, or if the verifier ran into a limit.
    """
    right_N = np.full(len(answers), np.nan)
    calls: dict[int, tuple[str, str, str, str]] = {}
    for i, (answer, question) in enumerate(zip(answers, questions, strict=True)):
        if answer is None:
            right_N[i] = 0.0 if has_truth(question) else np.nan
        elif question.task is not None:
            calls[i] = (question.task.name, question.task.options, _entry(question), answer)
        elif question.answer is not None:
            verdict = equivalence.same(answer, question.answer)
            right_N[i] = np.nan if verdict is None else float(verdict)
    if calls:
        distinct = dict.fromkeys(calls.values())
        outcome_of = dict(zip(distinct, _scorers().map("score", distinct), strict=True))
        right_N[list(calls)] = [_full(outcome_of[call]) for call in calls.values()]
    return right_N


@lru_cache(maxsize=1)
def _scorers() -> VerifierPool:
    """One pool for all questions: what the scorers evaluate is text of a model."""
    return VerifierPool(Path(__file__).with_name("task_judge.py"))


def _entry(question: Question) -> str:
    """The task's record of a question; a pickle keeps its tuples and whole numbers as keys."""
    entry = {"question": question.text, "answer": question.answer, **question.columns}
    return base64.b64encode(pickle.dumps(entry)).decode()


def _full(outcome: Outcome) -> float:
    """Scorers give less than 1 for a wrong answer in the right form."""
    return float(outcome.value >= 1) if outcome.status is Status.DONE else np.nan
