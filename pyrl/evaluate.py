"""Evaluate: how often a model is right, alone and by its own vote."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import EQUIVALENCES, Answers, Equivalence, Extractor, classify
from pyrl.answers.reading import answer_format, decoder
from pyrl.answers.truth import has_truth, right
from pyrl.checks import one_of
from pyrl.engine import Engine
from pyrl.engine.launch import ENGINES, Request
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.foreign import TIME_LIMIT
from pyrl.fork import Flat, Fork, WithoutReplacement
from pyrl.leaves import Decode, Leaves, collect
from pyrl.logits.sampling import Sampling
from pyrl.models import find_device, load_model, room
from pyrl.prompts import Prompt, load_prompts
from pyrl.prune import Keep
from pyrl.report import Evaluation, Progress
from pyrl.report.question_scores import QuestionScore
from pyrl.rollout import Rollout, Stop, derive_seed
from pyrl.vote import Majority, Mass

FLAT = Flat()


def answered(prompts: Sequence[Prompt], name: str) -> Sequence[Prompt]:
    """The prompts, all of which have a true answer; ValueError names the first that has none."""
    for prompt in prompts:
        if not has_truth(prompt):
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
    exact: int = 0
    """Different responses, drawn without replacement, whose masses are summed; 0: none."""


@dataclass(frozen=True)
class EvalSettings:
    """Score a model: greedy, pass@1, maj@n and pass@n."""

    model: str
    """"demo", "smollm2", a directory, a .gguf file, or a Hugging Face id."""
    data: str
    """Questions with answers: a file, "reasoning_gym:TASK", "demo:heldout", or a data set's id."""
    samples: int = 16
    """Per question, for pass@1 (their mean), maj@n and pass@n."""
    temperature: float = 0.6
    """Of these samples; greedy answers have none."""
    low_temperature: float = 0.3
    """Another pass@1; 0: none."""
    exact: bool = False
    """Also draw `samples` different responses of each question (two at least): whether the answer
    of the largest mass is right, the mass of right ones, and the mass that they leave unseen, by
    which the second can be too small."""
    max_tokens: int = 1024
    """Response tokens at most."""
    extractor: str | None = None
    """How the answer is read: "boxed", "whole", "number" or "regex:PATTERN"; None: as the
    questions ask for."""
    answer_after: str = ""
    """Read the answer only from what follows the last such text, as "</think>"; a response
    without it has none. Empty: from all of the response."""
    equivalence: Literal["math", "exact"] = "math"
    """When two answers are the same: as mathematics (math-verify), or as text."""
    stop: str | None = None
    """A response also ends where it has this text; None: as the questions ask for."""
    chat: bool | None = None
    """Use the chat template; None: if there is one and the data brings no worked examples."""
    prefix: str = ""
    """Text before each question."""
    suffix: str = ""
    """Text after each question."""
    prompt_column: str | None = None
    """Column of the questions; None: prompt, question, problem or messages."""
    answer_column: str | None = None
    """Column of the true answers; None: answer, solution, ground_truth or
    reward_model.ground_truth."""
    system: str | None = None
    """A system message before each question, for the chat template."""
    chat_arguments: tuple[str, ...] = ()
    """Variables of the chat template, each NAME=VALUE, such as enable_thinking=False."""
    call_time_limit: float = TIME_LIMIT
    """Seconds that the chat template may take for a question."""
    seed: int = 0
    """Seed of sampling."""
    limit: int | None = None
    """Only the first questions."""
    max_rows: int = 256
    """Branches that the engine samples at the same time."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"..."""
    engine: str = "hf"
    """Who samples: "hf" (transformers), "vllm", or an engine that was added to
    pyrl.engine.launch.ENGINES."""
    vllm: VLLMOptions = field(default_factory=VLLMOptions)
    """How vLLM runs the model."""
    output: Path | None = None
    """Directory for report.md and report.json with the scores; None: they are only printed."""

    def __post_init__(self) -> None:
        one_of(self.engine, ENGINES, "engine")
        if self.output is not None and (self.output / "report.json").exists():
            raise ValueError(f"output: expected no report in {self.output} yet, got report.json")

    @property
    def scoring(self) -> Scoring:
        """Which scores these settings ask for."""
        return Scoring(
            temperature=self.temperature,
            samples=self.samples,
            low_temperature=self.low_temperature,
            max_tokens=self.max_tokens,
            exact=max(self.samples, 2) if self.exact else 0,
        )


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
        stop: Stop | None = None,
    ) -> None:
        self.engine, self.decode = engine, decode
        self.extractor, self.equivalence = extractor, equivalence
        self.seed, self.on_tokens, self.stop = seed, on_tokens, stop

    def __call__(
        self,
        name: str,
        model: Literal["before", "after", "given"],
        prompts: Sequence[Prompt],
        how: Scoring,
    ) -> Evaluation:
        """ValueError if a question has no true answer."""
        answered(prompts, name)
        started = time.monotonic()
        greedy, tokens = self._sample(prompts, 1, 0.0, how)
        greedy_G = self._right(greedy, prompts)
        metrics = {"greedy": float(greedy_G.mean())}
        if how.low_temperature:
            low, used = self._sample(prompts, how.samples, how.low_temperature, how)
            metrics[f"pass@1/T={how.low_temperature:g}"] = float(self._right(low, prompts).mean())
            tokens += used
        leaves, used = self._sample(prompts, max(how.samples, how.votes), how.temperature, how)
        sampled, by_question = self._sampled(leaves, prompts, how, greedy_G)
        metrics |= sampled
        if how.exact:
            masses, more = self._masses(prompts, how)
            metrics |= masses
            used += more
        return Evaluation(
            set=name,
            model=model,
            metrics=metrics,
            questions=len(prompts),
            tokens=tokens + used,
            seconds=time.monotonic() - started,
            by_question=by_question,
        )

    def graded(
        self, prompts: Sequence[Prompt], how: Scoring
    ) -> tuple[Leaves, Answers, NDArray[np.bool_]]:
        """Samples of each question, their answers, and which of them are right."""
        leaves, _ = self._sample(prompts, how.samples, how.temperature, how)
        answers = classify(leaves, self.extractor, self.equivalence)
        return leaves, answers, self._right(leaves, prompts)

    def _sampled(
        self,
        leaves: Leaves,
        prompts: Sequence[Prompt],
        how: Scoring,
        greedy_G: NDArray[np.bool_],
    ) -> tuple[dict[str, float], tuple[QuestionScore, ...]]:
        """The metrics of the samples, and what they and the greedy responses are by question."""
        n, count = how.samples, max(how.samples, how.votes)
        answers = classify(leaves, self.extractor, self.equivalence)
        right_GN = self._grade(leaves, answers, prompts).reshape(len(prompts), count)[:, :n]
        label_G, right_G = self._majority(leaves, answers, prompts, count, n)
        metrics = {
            f"pass@1/T={how.temperature:g}": float(right_GN.mean()),
            f"maj@{n}": float(right_G.mean()),
        }
        if how.votes:
            _, more_G = self._majority(leaves, answers, prompts, count, how.votes)
            metrics[f"maj@{how.votes}"] = float(more_G.mean())
        by_question = []
        for group, prompt in enumerate(prompts):
            own = slice(group * count, group * count + n)
            class_N = answers.class_N[own]
            by_question.append(
                QuestionScore(
                    question=prompt.index,
                    text=prompt.text,
                    greedy=bool(greedy_G[group]),
                    right=tuple(right_GN[group].tolist()),
                    answers=answers.answer_N[own],
                    classes=tuple(class_N.tolist()),
                    distinct=len(np.unique(class_N[class_N >= 0])),
                    label=label_G[group],
                    label_right=bool(right_G[group]),
                    entropy=float(leaves.entropy_N[own].mean()),
                    length=float(leaves.length_N[own].mean()),
                )
            )
        return metrics | {f"pass@{n}": float(right_GN.any(1).mean())}, tuple(by_question)

    def _majority(
        self, leaves: Leaves, answers: Answers, prompts: Sequence[Prompt], count: int, votes: int
    ) -> tuple[Sequence[str | None], NDArray[np.bool_]]:
        """The labels of the first samples of each question, of which there are `count`, and which
        of these labels are right [G]."""
        first = np.flatnonzero(np.arange(len(leaves.leaf_N)) % count < votes)
        label_G = Majority()(leaves.take(first), answers.take(first)).label_G
        return label_G, np.equal(right(label_G, prompts, self.equivalence), 1)

    def _masses(self, prompts: Sequence[Prompt], how: Scoring) -> tuple[dict[str, float], int]:
        """What the most probable responses say, and what they weigh; the sampled tokens."""
        at, fork = f"T={how.temperature:g}", WithoutReplacement()
        leaves, used = self._sample(prompts, how.exact, how.temperature, how, fork)
        mass_N = np.exp(leaves.log_mass_N)
        right = float((mass_N * self._right(leaves, prompts)).sum()) / len(prompts)
        return {
            f"label by mass/{at}": self._label(leaves, prompts),
            f"right mass/{at}": right,
            f"unseen mass/{at}": 1 - float(mass_N.sum()) / len(prompts),
        }, used

    def _sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        temperature: float,
        how: Scoring,
        fork: Fork = FLAT,
    ) -> tuple[Leaves, int]:
        rollout = Rollout(
            self.engine,
            [prompt.tokens for prompt in prompts],
            votes=samples,
            limit=how.max_tokens,
            sampling=Sampling(temperature),
            fork=fork,
            prune=Keep(),
            signals=None,
            seed=derive_seed(self.seed, samples, round(temperature * 1000)),
            on_tokens=self.on_tokens,
            stop=self.stop,
        )
        return collect(rollout.run(), self.decode), rollout.counts.sampled_tokens

    def _right(self, leaves: Leaves, prompts: Sequence[Prompt]) -> NDArray[np.bool_]:
        """Which leaves are right [N]; one whose comparison ran out of time is not."""
        return self._grade(leaves, classify(leaves, self.extractor, self.equivalence), prompts)

    def _grade(
        self, leaves: Leaves, answers: Answers, prompts: Sequence[Prompt]
    ) -> NDArray[np.bool_]:
        asked = [prompts[group] for group in leaves.group_N.tolist()]
        return np.equal(right(answers.answer_N, asked, self.equivalence), 1)

    def _label(self, leaves: Leaves, prompts: Sequence[Prompt]) -> float:
        """Share of right labels by mass."""
        answers = classify(leaves, self.extractor, self.equivalence)
        label_G = Mass()(leaves, answers).label_G
        return float((right(label_G, prompts, self.equivalence) == 1).mean())


def evaluate_model(settings: EvalSettings, progress: Progress) -> Evaluation:
    """Load a model and questions, and score the one on the other: `pyrl eval`."""
    with opened(settings, progress) as (evaluator, prompts):
        return evaluator(settings.data.replace("/", " "), "given", prompts, settings.scoring)


@contextmanager
def opened(
    settings: EvalSettings, progress: Progress
) -> Iterator[tuple[Evaluator, Sequence[Prompt]]]:
    """An evaluator of the model, and the questions, all of which have answers."""
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
        prompt_column=settings.prompt_column,
        answer_column=settings.answer_column,
        system=settings.system,
        chat_arguments=settings.chat_arguments,
        time_limit=settings.call_time_limit,
        limit=settings.limit,
    )
    answered(prompts, settings.data)
    form = answer_format(
        model,
        tokenizer,
        settings.data,
        settings.extractor,
        settings.stop,
        settings.answer_after,
    )
    engine, sync = ENGINES[settings.engine](
        Request(
            model=model,
            source=settings.model,
            eos=form.eos,
            max_rows=settings.max_rows,
            dtype="float32",
            probe_T=prompts[0].tokens,
            vllm=settings.vllm,
        )
    )
    with closing(engine):
        sync(0)
        evaluator = Evaluator(
            engine,
            decoder(tokenizer),
            form.extractor,
            EQUIVALENCES[settings.equivalence](),
            settings.seed,
            progress.tokens,
            form.stop,
        )
        progress.phase("evaluating")
        yield evaluator, prompts
