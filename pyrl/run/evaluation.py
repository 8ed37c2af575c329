"""Evaluation: when a run scores its model, on which questions, and the scores it has so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pyrl.algorithm import Sample
from pyrl.answers.truth import has_truth
from pyrl.evaluate import Evaluator, Scoring
from pyrl.prompts import Prompt
from pyrl.report import Evaluation, Progress
from pyrl.report.metrics import Row
from pyrl.report.question_scores import save_question_scores
from pyrl.run.config import Run
from pyrl.run.directory import naming

TRAINED = "trained questions"
"""The name of the training questions as a set."""

SCORES = "scores"
"""The folder of a run with the scores by question."""


def affordable(run: Run, scoring: Scoring, sets: int) -> int:
    """Questions of each of the sets whose scores cost less than a tenth of what training samples.

    Counted in responses, and half of that tenth: leaves of a tree share tokens, and the responses
    of an evaluation do not.
    """
    sample: Sample = run.algorithm.sample
    votes = sample.train if sample.stop_when_decided else sample.votes
    if sample.max_tokens_per_prompt:
        votes = min(votes, sample.max_tokens_per_prompt // sample.max_tokens)
    low = scoring.samples if scoring.low_temperature else 0
    between = len(range(run.eval_every, run.steps, run.eval_every)) if run.eval_every else 0
    responses = (
        run.eval_before * (1 + low + max(scoring.samples, scoring.votes) + scoring.exact)
        + run.eval_after * (1 + low + scoring.samples + scoring.exact)
        + between * (1 + scoring.samples)
    )
    return run.steps * run.prompts_per_step * votes // (20 * max(1, sets * responses))


@dataclass
class Evaluations:
    """Scores before and after training for the report, and between them for the curves."""

    run: Run
    evaluator: Evaluator
    sets: Mapping[str, Sequence[Prompt]]
    """Questions, some of which may have no true answer: these are left out."""
    scoring: Scoring
    progress: Progress
    ready: Callable[[], object] = lambda: None
    """Called before anything is sampled: the engine is free then, and has the weights to score."""
    taken: list[Evaluation] = field(default_factory=list)
    """Scores before and after training."""

    def due(self, step: int) -> Row:
        """Metrics of the scores that are due after `step` steps; an empty row if none are."""
        if step == 0:
            return self.score("before", step) if self.run.eval_before else {}
        if step == self.run.steps and self.run.eval_after:
            return self.score("after", step)
        if not self.run.eval_every or step % self.run.eval_every:
            return {}
        how = replace(self.scoring, votes=0, low_temperature=0.0, exact=0)
        others = [name for name in self.sets if name != TRAINED]
        return _metrics(self._scores("after", step, others or [*self.sets], how))

    def score(self, model: Literal["before", "after"], step: int) -> Row:
        """Score all sets, remember the scores for the report, and return them as metrics.

        The larger vote is what the untrained model could do with the compute of training.
        """
        how = self.scoring if model == "before" else replace(self.scoring, votes=0)
        scores = self._scores(model, step, [*self.sets], how)
        self.taken += scores
        if by_question := {e.set: e.by_question for e in scores if e.by_question}:
            save_question_scores(self.run.output / SCORES / f"{model}.json", by_question)
        return _metrics(scores)

    def goes_on(self) -> None:
        """One more step: what was the end of training, before a run got more steps, is none."""
        self.taken = [score for score in self.taken if score.model != "after"]

    @property
    def finished(self) -> bool:
        """The trained model has the scores that it should have."""
        return (
            not self.run.eval_after
            or not any(self.asked(name) for name in self.sets)
            or any(score.model == "after" for score in self.taken)
        )

    def asked(self, name: str) -> list[Prompt]:
        """The questions of a set that are scored: the same ones before, between and after."""
        answered = list(filter(has_truth, self.sets[name]))
        limit = self.run.eval_limit
        if limit is None:
            limit = affordable(self.run, self.scoring, len(self.sets))
        elif limit == 0:
            limit = len(answered)
        # A run that was resumed with more steps could afford more: its gains would mean nothing.
        limit = next((score.questions for score in self.taken if score.set == name), limit)
        chosen = np.random.default_rng(0).permutation(len(answered))[:limit]
        return [answered[place] for place in sorted(chosen.tolist())]

    def left_out(self) -> str:
        """How many questions are scored, of each set of which not all are."""
        counts = {name: (len(self.asked(name)), len(of)) for name, of in self.sets.items()}
        some = [f"{n:,} of {all_:,} {name}" for name, (n, all_) in counts.items() if n < all_]
        return ", ".join(some)

    def _scores(
        self, model: Literal["before", "after"], step: int, names: Sequence[str], how: Scoring
    ) -> list[Evaluation]:
        scores = []
        for name in names:
            if prompts := self.asked(name):
                self.progress.phase(f"evaluating {name}")
                self.ready()
                with naming(f"evaluation of {name} after step {step}", prompts):
                    scores.append(self.evaluator(name, model, prompts, how))
        return scores


def _metrics(scores: Sequence[Evaluation]) -> Row:
    return {f"eval/{e.set}/{name}": value for e in scores for name, value in e.metrics.items()}
