"""Evaluation: when a run scores its model, on which questions, and the scores it has so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pyrl.evaluate import Evaluator, Scoring
from pyrl.prompts import Prompt
from pyrl.report import Evaluation, Progress
from pyrl.report.metrics import Row
from pyrl.run.config import Run
from pyrl.run.directory import naming


@dataclass
class Evaluations:
    """Scores before and after training for the report, and between them for the curves."""

    run: Run
    evaluator: Evaluator
    sets: Mapping[str, Sequence[Prompt]]
    prompts: Sequence[Prompt]
    """The training questions, which are not scored between if there are others."""
    scoring: Scoring
    progress: Progress
    taken: list[Evaluation] = field(default_factory=list)
    """Scores before and after training."""

    def due(self, step: int) -> Row:
        """Metrics of the scores that are due after `step` steps; an empty row if none are."""
        if step == 0:
            return self.score("before", step)
        if step == self.run.steps:
            return self.score("after", step)
        if not self.run.eval_every or step % self.run.eval_every:
            return {}
        how = replace(self.scoring, votes=0, low_temperature=0.0)
        sets = {name: of for name, of in self.sets.items() if of is not self.prompts}
        return _metrics(self._scores("after", step, sets or self.sets, how))

    def score(self, model: Literal["before", "after"], step: int) -> Row:
        """Score all sets, remember the scores for the report, and return them as metrics.

        The larger vote is what the untrained model could do with the compute of training.
        """
        how = self.scoring if model == "before" else replace(self.scoring, votes=0)
        scores = self._scores(model, step, self.sets, how)
        self.taken += scores
        return _metrics(scores)

    @property
    def finished(self) -> bool:
        """The trained model has its scores."""
        return any(score.model == "after" for score in self.taken)

    def _scores(
        self,
        model: Literal["before", "after"],
        step: int,
        sets: Mapping[str, Sequence[Prompt]],
        how: Scoring,
    ) -> list[Evaluation]:
        scores = []
        for name, prompts in sets.items():
            self.progress.phase(f"evaluating {name}")
            with naming(f"evaluation of {name} after step {step}", prompts):
                scores.append(self.evaluator(name, model, prompts, how))
        return scores


def _metrics(scores: Sequence[Evaluation]) -> Row:
    return {f"eval/{e.set}/{name}": value for e in scores for name, value in e.metrics.items()}
