"""Trees: the stations of a step that a door calls, from its host's prompts to its host's loss."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from pyrl.advantage import advantages
from pyrl.algorithm import Algorithm
from pyrl.answers import Answers, Equivalence, Extractor, classify
from pyrl.answers.reading import decoder
from pyrl.engine import Engine
from pyrl.leaves import Leaves, Look, Scored, collect, score
from pyrl.pack import TokenBatch, pack
from pyrl.prompts import Prompt
from pyrl.report.step import StepObserver
from pyrl.reward import rewards
from pyrl.rollout import Rollout, answer_start, make_signals
from pyrl.run.states import States
from pyrl.select import selected, tokens_that_train
from pyrl.train import Step
from pyrl.vote import Votes


@dataclass(frozen=True)
class Grown:
    """Finished trees of some questions, and what they elected; nothing is rewarded yet."""

    prompts: Sequence[Prompt]
    rollout: Rollout
    leaves: Leaves
    """All that vote."""
    answers: Answers
    votes: Votes
    kept_N: NDArray[np.int64]
    """Ordinals of the leaves that train; those of a question are neighbours, in its order."""
    seconds: float

    @property
    def kept(self) -> Leaves:
        """The leaves that train."""
        return self.leaves.take(self.kept_N)

    @property
    def kept_G(self) -> NDArray[np.int64]:
        """How many leaves of each question [G] train."""
        return np.bincount(self.kept.group_N, minlength=self.leaves.groups)


@dataclass(frozen=True)
class Credit:
    """The kept leaves with the advantage of each of their tokens."""

    scored: Scored
    batch: TokenBatch
    metrics: Mapping[str, float]
    """Of the advantage stages, and of a selection after them."""


def check_replay(algorithm: Algorithm, host: str) -> None:
    """ValueError: earlier responses are to train, and the host's updates have those of a step."""
    if algorithm.replay.capacity:
        raise ValueError(
            f"replay.capacity: expected 0 in {host}, whose updates have the responses of one step, "
            f"got {algorithm.replay.capacity}"
        )


class Trees:
    """A method's way from questions to advantages, over any engine that is set up for sampling.

    Its loss and its updates are no part of this.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        extractor: Extractor,
        equivalence: Equivalence,
    ) -> None:
        if algorithm.temper.share:
            raise ValueError(
                f"temper.share: expected 0 in another trainer, which samples a question once, got "
                f"{algorithm.temper.share}"
            )
        self.algorithm, self.engine, self.tokenizer = algorithm, engine, tokenizer
        self.extractor, self.equivalence = extractor, equivalence
        self.decode = decoder(tokenizer)
        self.signals = make_signals(algorithm.fork, algorithm.prune)
        self.states = States(algorithm)
        self.observer = StepObserver(equivalence)

    def grow(self, prompts: Sequence[Prompt], seed: int, progress: float) -> Grown:
        """Sample, fork and prune, read the answers, vote and select. `progress`: share of the run.

        RuntimeError: branches of an earlier call are running in the engine.
        """
        started, algorithm, sample = time.monotonic(), self.algorithm, self.algorithm.sample
        rollout = Rollout(
            self.engine,
            [prompt.tokens for prompt in prompts],
            votes=sample.votes,
            limit=sample.max_tokens,
            sampling=sample.sampling(),
            fork=algorithm.fork,
            prune=algorithm.prune,
            signals=self.signals,
            seed=seed,
            even=sample.even,
            allowance=sample.allowance(),
            poll=algorithm.poll(self.decode, self.extractor, self.equivalence),
            answer_start=lambda tokens: answer_start(tokens, self.tokenizer),
        )
        leaves = collect(rollout.run(), self.decode, progress=progress)
        answers = classify(leaves, self.extractor, self.equivalence)
        votes = algorithm.vote(leaves, answers)
        kept_N = selected(algorithm.select, leaves, sample.train, self.states.select)
        seconds = time.monotonic() - started
        return Grown(prompts, rollout, leaves, answers, votes, kept_N, seconds)

    def rewards(self, grown: Grown) -> NDArray[np.float64]:
        """The method's own reward of each leaf [N] that voted, NaN where it is unknown."""
        prompts, state = grown.prompts, self.states.reward
        reward = self.algorithm.reward
        return rewards(reward, grown.leaves, grown.answers, grown.votes, prompts, state)

    def usable(self, grown: Grown, reward_N: NDArray[np.float64], *, own: bool) -> bool:
        """Whether rewards of the kept leaves say anything; `own`: they are the method's."""
        if not own:
            return bool(np.isfinite(reward_N).any())
        of_all_N = np.full(len(grown.leaves.leaf_N), np.nan)
        of_all_N[grown.kept_N] = reward_N
        return self.algorithm.reward.usable(grown.answers, grown.votes, of_all_N)

    def credit(self, grown: Grown, reward_N: NDArray[np.float64], look: Look) -> Credit:
        """Advantages from the rewards of the kept leaves [N]; `look` makes a pass of the model."""
        kept = grown.kept
        scored = score(kept, reward_N, look)
        stages, states = self.algorithm.advantage, self.states
        advantage_T, shaping = advantages(stages, scored, states.advantage)
        select = self.algorithm.select
        train_T, sifting = tokens_that_train(select, scored, advantage_T, states.select)
        self.states.check()
        batch = pack(kept.rows, advantage_T, scored.reward_N, train_T)
        return Credit(scored, batch, shaping | sifting)

    def metrics(self, grown: Grown, credit: Credit) -> dict[str, float]:
        """Numbers of the trees and the votes by the names of `pyrl.report.metrics`."""
        reward_N = np.full(len(grown.leaves.leaf_N), np.nan)
        reward_N[grown.kept_N] = credit.scored.reward_N
        step = Step(
            prompts=grown.prompts,
            rollout=grown.rollout,
            leaves=grown.leaves,
            answers=grown.answers,
            votes=grown.votes,
            reward_N=reward_N,
            kept_N=grown.kept_N,
            advantage_T=credit.batch.advantage_T,
            shaping=credit.metrics,
            update=None,
            sync={},
            timing={"timing/sampling": grown.seconds},
            seconds=grown.seconds,
        )
        row = self.observer(step).metrics
        return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}

    def save(self, path: Path, more: Mapping[str, Any]) -> None:
        """Write what rules have learnt and choices remember, and `more` (as JSON has it)."""
        arrays = self.states.arrays()
        if self.signals is not None:
            arrays["signals"] = np.frombuffer(self.signals.save(), np.uint8)
        record = {
            "states": self.states.state_dict(),
            "observer": self.observer.state_dict(),
            "more": more,
        }
        save_file(arrays, path, metadata={"record": json.dumps(record)})

    def load(self, path: Path) -> dict[str, Any]:
        """Take over what `save` wrote; its `more`. ValueError: there is none, or of others."""
        if not path.is_file():
            raise ValueError(f"{path}: expected what pyrl saves beside a checkpoint, found no file")
        with safe_open(path, "numpy") as file:
            record = json.loads(file.metadata()["record"])
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        signals = arrays.pop("signals", None)
        if (signals is None) != (self.signals is None):
            raise ValueError(f"{path}: expected the state of {self.algorithm.fork}, got another's")
        if signals is not None and self.signals is not None:
            self.signals.load(signals.tobytes())
        self.states.load_state_dict(record["states"], arrays)
        self.observer.load_state_dict(record["observer"])
        more: dict[str, Any] = record["more"]
        return more
