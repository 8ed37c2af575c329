"""Evaluate: how often a model is right, alone and by its own vote."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers, Equivalence, Extractor, classify
from pyrl.engine import Engine, Sampling
from pyrl.fork import Flat
from pyrl.leaves import Leaves, collect
from pyrl.prompts import Prompt
from pyrl.prune import Keep
from pyrl.report import Evaluation
from pyrl.rollout import Rollout, derive_seed
from pyrl.vote import Majority


@dataclass(frozen=True)
class Scoring:
    """Which scores are taken of a model."""

    temperature: float = 0.6
    samples: int = 16
    """For pass@1 (their mean), maj@n and pass@n."""
    votes: int = 0
    """More samples for one larger vote, maj@votes; 0: none."""
    low_temperature: float = 0.0
    """Another pass@1 at this temperature; 0: none."""
    max_tokens: int = 1024


class Evaluator:
    """Scores one engine on sets of questions with true answers."""

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[Sequence[NDArray[np.int32]]], list[str]],
        extractor: Extractor,
        equivalence: Equivalence,
        seed: int,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.engine, self.decode = engine, decode
        self.extractor, self.equivalence = extractor, equivalence
        self.seed, self.on_tokens = seed, on_tokens

    def __call__(
        self, name: str, model: Literal["before", "after"], prompts: Sequence[Prompt], how: Scoring
    ) -> Evaluation:
        """ValueError if a question has no true answer."""
        missing = [prompt.index for prompt in prompts if prompt.answer is None]
        if missing:
            raise ValueError(
                f"{name}: expected a true answer for each question, question {missing[0]} has none"
            )
        started = time.monotonic()
        greedy, tokens = self._sample(prompts, 1, 0.0, how)
        metrics = {"greedy": float(self._right(greedy, prompts).mean())}
        if how.low_temperature:
            low, used = self._sample(prompts, how.samples, how.low_temperature, how)
            metrics[f"pass@1/T={how.low_temperature:g}"] = float(self._right(low, prompts).mean())
            tokens += used
        leaves, used = self._sample(prompts, max(how.samples, how.votes), how.temperature, how)
        metrics |= self._sampled(leaves, prompts, how)
        return Evaluation(
            set=name,
            model=model,
            metrics=metrics,
            questions=len(prompts),
            tokens=tokens + used,
            seconds=time.monotonic() - started,
        )

    def _sampled(self, leaves: Leaves, prompts: Sequence[Prompt], how: Scoring) -> dict[str, float]:
        n, count = how.samples, max(how.samples, how.votes)
        right_GN = self._right(leaves, prompts).reshape(len(prompts), count)
        metrics = {f"pass@1/T={how.temperature:g}": float(right_GN[:, :n].mean())}
        for votes in [n, how.votes] if how.votes else [n]:
            first = np.flatnonzero(np.arange(len(leaves.leaf_N)) % count < votes)
            metrics[f"maj@{votes}"] = self._majority(leaves.take(first), prompts)
        return metrics | {f"pass@{n}": float(right_GN[:, :n].any(1).mean())}

    def _sample(
        self, prompts: Sequence[Prompt], samples: int, temperature: float, how: Scoring
    ) -> tuple[Leaves, int]:
        rollout = Rollout(
            self.engine,
            [prompt.tokens for prompt in prompts],
            votes=samples,
            limit=how.max_tokens,
            sampling=Sampling(temperature),
            fork=Flat(),
            prune=Keep(),
            signals=None,
            seed=derive_seed(self.seed, samples, round(temperature * 1000)),
            on_tokens=self.on_tokens,
        )
        return collect(rollout.run(), self.decode), rollout.counts.sampled_tokens

    def _right(self, leaves: Leaves, prompts: Sequence[Prompt]) -> NDArray[np.bool_]:
        """Which leaves are right [N]; one whose comparison ran out of time is not."""
        answers = classify(leaves, self.extractor, self.equivalence)
        return np.array(
            [
                answer is not None and self._same(answer, prompts[group])
                for answer, group in zip(answers.answer_N, leaves.group_N.tolist(), strict=True)
            ]
        )

    def _majority(self, leaves: Leaves, prompts: Sequence[Prompt]) -> float:
        answers: Answers = classify(leaves, self.extractor, self.equivalence)
        label_G = Majority()(leaves, answers).label_G
        right = [
            label is not None and self._same(label, prompt)
            for label, prompt in zip(label_G, prompts, strict=True)
        ]
        return float(np.mean(right))

    def _same(self, answer: str, prompt: Prompt) -> bool:
        assert prompt.answer is not None
        return self.equivalence.same(answer, prompt.answer) is True
