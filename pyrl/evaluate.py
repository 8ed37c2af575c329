"""Evaluate: how often a model is right, alone and by its own vote."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import EQUIVALENCES, Equivalence, Extractor, classify
from pyrl.answers.reading import answer_format, decoder
from pyrl.checks import one_of
from pyrl.engine import Engine
from pyrl.engine.launch import ENGINES, Request
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.fork import Flat
from pyrl.leaves import Decode, Leaves, collect
from pyrl.logits.sampling import Sampling
from pyrl.models import find_device, load_model, room
from pyrl.prompts import Prompt, load_prompts
from pyrl.prune import Keep
from pyrl.report import Evaluation, Progress
from pyrl.rollout import Rollout, derive_seed
from pyrl.vote import Majority


def answered(prompts: Sequence[Prompt], name: str) -> Sequence[Prompt]:
    """The prompts, all of which have a true answer; ValueError names the first that has none."""
    for prompt in prompts:
        if prompt.answer is None:
            raise ValueError(
                f"{name}: expected a true answer for each question, {prompt.index} has none"
            )
    return prompts


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


@dataclass(frozen=True)
class EvalSettings:
    """Score a model: greedy, pass@1, maj@n and pass@n."""

    model: str
    """"demo", "smollm2", a directory, or a Hugging Face id."""
    data: str
    """Questions with answers: a file, "reasoning_gym:TASK", "demo:heldout", or a data set's id."""
    samples: int = 16
    """Per question, for pass@1 (their mean), maj@n and pass@n."""
    temperature: float = 0.6
    low_temperature: float = 0.3
    """Another pass@1; 0: none."""
    max_tokens: int = 1024
    """Response tokens at most."""
    extractor: str | None = None
    """How the answer is read: "boxed", "whole", "number" or "regex:PATTERN"; None: as the
    questions ask for."""
    equivalence: Literal["math", "exact"] = "math"
    """When two answers are the same: as mathematics (math-verify), or as text."""
    stop: str | None = None
    """A response also ends with any token with this text; None: as the questions ask for."""
    chat: bool | None = None
    """Use the chat template; None: if there is one and the data brings no worked examples."""
    prefix: str = ""
    """Text before each question."""
    suffix: str = ""
    """Text after each question."""
    seed: int = 0
    limit: int | None = None
    """Only the first questions."""
    max_rows: int = 256
    """Branches that the engine samples at the same time."""
    device: str = "auto"
    engine: str = "hf"
    """Who samples: "hf" (transformers), "vllm", or an engine that was added to
    pyrl.engine.launch.ENGINES."""
    vllm: VLLMOptions = field(default_factory=VLLMOptions)
    """How vLLM runs the model."""

    def __post_init__(self) -> None:
        one_of(self.engine, ENGINES, "engine")


class Evaluator:
    """Scores one engine on sets of questions with true answers."""

    def __init__(
        self,
        engine: Engine,
        decode: Decode,
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
        answered(prompts, name)
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
        answers = classify(leaves, self.extractor, self.equivalence)
        label_G = Majority()(leaves, answers).label_G
        right = [
            label is not None and self._same(label, prompt)
            for label, prompt in zip(label_G, prompts, strict=True)
        ]
        return float(np.mean(right))

    def _same(self, answer: str, prompt: Prompt) -> bool:
        assert prompt.answer is not None
        return self.equivalence.same(answer, prompt.answer) is True


def evaluate_model(settings: EvalSettings, progress: Progress) -> Evaluation:
    """Load a model and questions, and score the one on the other: `pyrl eval`."""
    model, tokenizer = load_model(settings.model)
    model.to(find_device(settings.device))
    space = room(model)
    prompts = load_prompts(
        settings.data,
        tokenizer,
        max_tokens=space.tokens - settings.max_tokens,
        space=space.limit,
        chat=settings.chat,
        prefix=settings.prefix,
        suffix=settings.suffix,
        limit=settings.limit,
    )
    answered(prompts, settings.data)
    extractor, eos = answer_format(
        model, tokenizer, settings.data, settings.extractor, settings.stop
    )
    engine, sync = ENGINES[settings.engine](
        Request(
            model=model,
            source=settings.model,
            eos=eos,
            max_rows=settings.max_rows,
            dtype="float32",
            probe_T=prompts[0].tokens,
            vllm=settings.vllm,
        )
    )
    how = Scoring(
        temperature=settings.temperature,
        samples=settings.samples,
        low_temperature=settings.low_temperature,
        max_tokens=settings.max_tokens,
    )
    with closing(engine):
        sync(0)
        evaluator = Evaluator(
            engine,
            decoder(tokenizer),
            extractor,
            EQUIVALENCES[settings.equivalence](),
            settings.seed,
            progress.tokens,
        )
        progress.phase("evaluating")
        return evaluator(settings.data.replace("/", " "), "before", prompts, how)
