"""Judging: a judger fitted on a model's answers to questions with true ones, and its test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Suppress

from pyrl.answers import Answers
from pyrl.evaluate import EvalSettings, opened
from pyrl.judger import Judger, Scorer, features
from pyrl.leaves import Leaves
from pyrl.report import Progress
from pyrl.vote import Majority, Vote


@dataclass(frozen=True)
class JudgerSettings(EvalSettings):
    """Fit a judger, which weighs votes by entropies: --vote judger --vote.file FILE."""

    samples: int = 16
    """Responses of each question."""
    low_temperature: Annotated[float, Suppress] = 0.0
    """No other score is taken of the model."""
    exact: Annotated[bool, Suppress] = False
    """Nor this one."""
    output: Path | None = Path("judger.json")
    """The file that is written."""
    held_out: float = 0.2
    """Share of the questions that the judger is tested on and not fitted on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is None:
            raise ValueError("output: expected a file for the judger, got None")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share in [0, 1), got {self.held_out}")


def fit_judger(settings: JudgerSettings, progress: Progress) -> dict[str, float]:
    """Sample, fit, test on the last questions and write the file: `pyrl fit-judger`.

    The result: `right` (share of right responses), and on the questions that were held out, if
    there are any, `auc` (chance that a right response is judged likelier than a wrong one) and the
    share of right labels by a plain vote (`majority`) and by the judger's (`judged`).
    ValueError unless some responses are right and some are not.
    """
    assert settings.output is not None
    with opened(settings, progress) as (evaluator, prompts):
        leaves, answers, right_N = evaluator.graded(prompts, settings.scoring)
    fitted = len(prompts) - round(settings.held_out * len(prompts))
    feature_NK, held_N = features(leaves), leaves.group_N >= fitted
    scorer = Scorer.fit(feature_NK[~held_N], right_N[~held_N])
    found = {"responses": float(len(right_N)), "right": float(right_N.mean())}
    if held_N.any():
        found["auc"] = auc(scorer(feature_NK[held_N]), right_N[held_N])
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    scorer.save(settings.output, {"model": settings.model, "data": settings.data} | found)
    if held_N.any():
        index_N = np.flatnonzero(held_N)
        held = leaves.take(index_N), answers.take(index_N), right_N[index_N]
        found["majority"] = _labels_right(Majority(), *held)
        found["judged"] = _labels_right(Judger(str(settings.output)), *held)
    return found


def auc(score_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> float:
    """The chance that a right one has the higher score, ties half; NaN without a pair."""
    above = score_N[right_N][:, None] - score_N[~right_N][None]
    return float((np.sign(above).mean() + 1) / 2) if above.size else float("nan")


def _labels_right(
    vote: Vote, leaves: Leaves, answers: Answers, right_N: NDArray[np.bool_]
) -> float:
    """Share of the questions that have leaves whose label is right."""
    class_G = vote(leaves, answers).class_G
    won_N = answers.class_N == class_G[leaves.group_N]
    won = [bool(right_N[won_N & (leaves.group_N == g)].any()) for g in np.unique(leaves.group_N)]
    return float(np.mean(won))
