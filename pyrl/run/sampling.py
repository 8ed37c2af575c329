"""Sampling: the trees of a step, which grow when it begins, or while the step before is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pyrl._core.tree import Signals
from pyrl.algorithm import Algorithm
from pyrl.answers import EQUIVALENCES, Answers
from pyrl.leaves import Leaves
from pyrl.prompts import Prompt, step_prompts
from pyrl.rollout import Rollout, answer_start, derive_seed
from pyrl.run.config import Run
from pyrl.run.directory import keeping_forest, naming
from pyrl.run.setup import Parts
from pyrl.run.snapshot import Snapshot
from pyrl.vote import Votes


class Dropped(Exception):
    """Nobody wants the trees any more that grow ahead."""


@dataclass(frozen=True)
class Trees:
    """The questions of a step, and their trees."""

    step: int
    """How many steps were finished before it."""
    prompts: list[Prompt]
    rollout: Rollout


@dataclass(frozen=True)
class Sampled:
    """The samples of a step, before anything is learned from them."""

    prompts: list[Prompt]
    rollout: Rollout
    leaves: Leaves
    answers: Answers
    votes: Votes
    reward_N: NDArray[np.float64]
    accepted_G: NDArray[np.bool_]
    """The questions that train."""
    staleness: int
    sync: Mapping[str, float]
    """Metrics of the sync that made way for the trees of the next step."""


class Sampler:
    """Grows the trees of a run's steps; `begin` those of the next one, in a second thread.

    While they grow the engine is this thread's alone. What they come to depends on the weights of
    the snapshot, on the seed and on the signals as they were when they began, and on nothing that
    the learner does: a step that begins is the same whichever thread is faster.
    """

    def __init__(self, run: Run, parts: Parts, on_tokens: Callable[[int], object]) -> None:
        """`on_tokens` is called with the number of tokens after each step of the engine, also in
        the second thread."""
        self.run, self.parts, self.engine = run, parts, parts.engine
        self.signals = parts.signals
        self.snapshot = Snapshot.saved(parts.start) if parts.start and run.ahead else None
        """What samples, or has sampled, the step that begins next; None: the learner's weights."""
        # What a second thread reads is not shared: caches and counts would be those of a race.
        self.tokenizer = deepcopy(parts.tokenizer) if run.ahead else parts.tokenizer
        self.equivalence = EQUIVALENCES[run.equivalence]() if run.ahead else parts.equivalence
        self._report = on_tokens
        self._beside = ThreadPoolExecutor(1, "sampling ahead")
        self._next: tuple[Trees, Future[None]] | None = None
        self._unwanted = False
        self._sketches: bytes | None = None

    def take(self, step: int) -> tuple[Trees, Snapshot | None]:
        """The grown trees of the step after so many, and what sampled them if the learner's
        weights have changed since. Waits for those that grow ahead."""
        snapshot = self.snapshot
        if self._next is not None:
            (trees, grown), self._next = self._next, None
            grown.result()
            return trees, snapshot
        if snapshot is not None:
            with snapshot.lent_to(self.parts.model):
                self.parts.sync(snapshot.version)
        trees = self._trees(step)
        self._grow(trees)
        return trees, snapshot

    def begin(self, step: int) -> None:
        """Let the trees of the step after so many grow, by the weights that learner and engine have
        now: those after `step - 1`. After the last step none grow, until a run has more steps."""
        self.snapshot = Snapshot.of(self.parts.model, step - 1)
        if step >= self.run.steps:
            return
        self._sketches = self.signals.save() if self.signals else b""
        trees = self._trees(step)
        self._next = trees, self._beside.submit(self._grow, trees)

    def sketches(self) -> bytes:
        """The signals before the trees that are to be taken next; sampling moves them on."""
        if self._next is not None and self._sketches is not None:
            return self._sketches
        return self.signals.save() if self.signals else b""

    def wait(self) -> None:
        """Until no tree grows ahead and the engine is free."""
        if self._next is not None:
            wait([self._next[1]])

    def drop(self) -> None:
        """End the trees that grow ahead, if there are any, and forget them."""
        self._unwanted = True
        self.wait()
        self._next, self._unwanted = None, False

    def rollout(
        self,
        prompts: Sequence[Prompt],
        algorithm: Algorithm,
        signals: Signals | None,
        *place: int,
    ) -> Rollout:
        """Trees of this method, which do not grow yet; `place` is the step, and what gives other
        draws than the step's own."""
        sample, parts = algorithm.sample, self.parts
        return Rollout(
            self.engine,
            [prompt.tokens for prompt in prompts],
            votes=sample.votes,
            limit=sample.max_tokens,
            sampling=sample.sampling(),
            fork=algorithm.fork,
            prune=algorithm.prune,
            signals=signals,
            seed=derive_seed(self.run.seed, *place),
            even=sample.even,
            allowance=sample.allowance(),
            poll=algorithm.poll(parts.decode, parts.extractor, self.equivalence),
            stop=parts.stop,
            answer_start=lambda tokens: answer_start(tokens, self.tokenizer),
            on_tokens=self._on_tokens,
            remembered=self.run.save_trees,
        )

    def _trees(self, step: int) -> Trees:
        run, parts = self.run, self.parts
        prompts = step_prompts(parts.prompts, step, run.prompts_per_step, run.seed)
        return Trees(step, prompts, self.rollout(prompts, parts.algorithm, self.signals, step))

    def _grow(self, trees: Trees) -> None:
        forest, device = trees.rollout.forest, self.parts.model.device
        # A new thread is on the first device, and Triton looks at the thread's, not the tensor's.
        with (
            torch.accelerator.device_index(device.index),
            naming(f"step {trees.step + 1}", trees.prompts),
            keeping_forest(self.run.output, forest, trees.step + 1),
        ):
            trees.rollout.run()

    def _on_tokens(self, tokens: int) -> None:
        if self._unwanted:
            raise Dropped
        self._report(tokens)
