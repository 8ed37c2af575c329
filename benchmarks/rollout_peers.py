"""What bench_rollout_vllm.py compares: trees as they grow, and the same trees by blocking calls."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from vllm import LLM, RequestOutput, SamplingParams

from pyrl import _core
from pyrl.engine import Branches
from pyrl.engine.vllm.core import Core
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.tap import Tap

MASK_TAIL = 8
"""Last tokens of a trunk that never fork, as in pyrl.fork.TopEntropy."""


@dataclass
class Cost:
    """What one variant did in one round."""

    leaves: int
    sampled: int
    computed: int
    """Forward tokens."""
    recomputed: int = 0
    """How many of these tokens another branch had computed."""
    host: float = math.nan
    """Seconds in pyrl's own code; NaN where it is not in use."""
    full: tuple[float, float] = (math.nan, math.nan)
    """Wall time of steps with 1024 branches, and pyrl's share of it (seconds)."""
    wall: float = math.nan
    cpu: float = math.nan


class Host:
    """Seconds that a rollout spends outside vLLM's steps and outside the draw.

    Counted are the rollout, the forest, the signals, the engine and the tap's share of vLLM's
    step; the draw is not: it takes the place of vLLM's sampler. Nor is what vLLM does with a
    request that enters or leaves.
    """

    def __init__(self) -> None:
        self.inside = self.tap = self.draw = 0.0
        self._marks: list[tuple[float, ...]] = []

    def mark(self, branches: int) -> None:
        """Note how many branches were given a token; `Rollout` calls it in each step."""
        times = time.perf_counter(), self.inside, self.tap, self.draw
        self._marks.append((branches, *times))

    def seconds(self, branches: int = 0) -> tuple[float, float]:
        """Wall time of the steps with at least that many branches, and pyrl's part of it."""
        marks = np.array(self._marks)
        steps = np.diff(marks[:, 1:], axis=0)[marks[1:, 0] >= branches]
        wall, inside, tap, draw = steps.sum(axis=0).tolist()
        return wall, wall - inside + tap - draw

    @contextmanager
    def watch(self) -> Iterator[None]:
        places: list[tuple[Any, str, str]] = [
            *((Core, name, "inside") for name in ("outputs", "add", "abort")),
            *((Tap, name, "tap") for name in ("apply", "update_state")),
            (_core, "sample_tokens", "draw"),
        ]
        with ExitStack() as stack:
            for owner, name, counter in places:
                timed = self._timed(vars(owner)[name], counter)
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, function: Callable[..., Any], counter: str) -> Callable[..., Any]:
        counters = vars(self)

        def timed(*values: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*values, **named)
            counters[counter] += time.perf_counter() - start
            return result

        return timed


@dataclass
class Shape:
    """A tree as it grew: what was asked of the engine, and how long each branch became."""

    submitted: list[Branches] = field(default_factory=list)
    forked: list[tuple[int, int, NDArray[np.int64], NDArray[np.uint64]]] = field(
        default_factory=list
    )
    """Parent, shared tokens, new branches, their seeds."""
    length: dict[int, int] = field(default_factory=dict)
    """Response tokens of each branch, shared ones included."""

    @contextmanager
    def record(self, engine: VLLMEngine) -> Iterator[None]:
        with (
            patch.object(engine, "submit", wraps=engine.submit) as submit,
            patch.object(engine, "fork", wraps=engine.fork) as fork,
        ):
            yield
        self.submitted = [call.args[0] for call in submit.call_args_list]
        self.forked = [call.args for call in fork.call_args_list]

    def trunks(self) -> list[tuple[int, list[int]]]:
        """Each trunk and its prompt."""
        return [
            (branch, group.prompts[p].tolist())
            for group in self.submitted
            for branch, p in zip(group.branch_B.tolist(), group.prompt_B.tolist(), strict=True)
        ]


def sample_all(engine: VLLMEngine) -> int:
    tokens = 0
    while len(branch_B := engine.step().branch_B):
        tokens += len(branch_B)
    return tokens


def with_a_barrier(engine: VLLMEngine, shape: Shape) -> Cost:
    """The same tree by the same engine, with no fork before the last trunk has ended."""
    before = engine.work()
    for group in shape.submitted:
        engine.submit(group)
    sampled = sample_all(engine)
    for parent, keep, branch_B, seed_B in shape.forked:
        engine.fork(parent, keep, branch_B, seed_B)
    sampled += sample_all(engine)
    engine.abort(np.array(list(shape.length)))
    after = engine.work()
    computed = after.prompt_tokens + after.decode_tokens
    return Cost(
        leaves=len(shape.length),
        sampled=sampled,
        computed=computed - before.prompt_tokens - before.decode_tokens,
        recomputed=after.recomputed_tokens - before.recomputed_tokens,
    )


def no_connector() -> Any:
    """vLLM has one connector in a process, and the peer would call that of pyrl's engine."""
    return patch("vllm.distributed.kv_transfer.kv_transfer_state._KV_CONNECTOR_AGENT", None)


class Blocking:
    """vLLM's own `LLM.generate`, with the settings of the engine that it is compared with."""

    def __init__(self, model: str, rows: int, length: int, gib: float, block: int) -> None:
        with no_connector():
            self._llm = self._load(model, rows, length, gib, block)

    def _load(self, model: str, rows: int, length: int, gib: float, block: int) -> LLM:
        return LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            block_size=block,
            max_model_len=length,
            max_num_seqs=rows,
            kv_cache_memory_bytes=int(gib * 2**30),
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )

    def generate(
        self, prompts: Sequence[list[int]], lengths: Sequence[int], logprobs: int | None = None
    ) -> list[RequestOutput]:
        """A response of exactly that length to each prompt."""
        settings = [
            SamplingParams(
                temperature=1.0,
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                logprobs=logprobs,
            )
            for length in lengths
        ]
        questions = [{"prompt_token_ids": prompt} for prompt in prompts]
        with no_connector():
            answers = self._llm.generate(questions, settings, use_tqdm=False)
        drawn = [len(answer.outputs[0].token_ids) for answer in answers]
        if drawn != list(lengths):
            raise RuntimeError(f"expected {list(lengths)} tokens, got {drawn}")
        return answers

    def flat(self, prompt: list[int], samples: int, tokens: int) -> Cost:
        answers = self.generate([prompt] * samples, [tokens] * samples)
        return Cost(samples, samples * tokens, sum(map(_computed, answers)))

    def tree(self, shape: Shape, logprobs: int | None = None) -> Cost:
        """Two calls: the trunks; then all branches, the shared tokens as a part of the prompt.

        With `logprobs` the entropy of each token is estimated from so many, as ECHO's code does;
        without, the places to fork cost nothing. Either way the forks are at the shape's places.
        """
        trunks = shape.trunks()
        limits = [shape.length[trunk] for trunk, _ in trunks]
        first = self.generate([prompt for _, prompt in trunks], limits, logprobs)
        if logprobs is not None:
            for answer in first:
                most_uncertain(answer.outputs[0].logprobs, 2)
        path = {
            trunk: prompt + list(answer.outputs[0].token_ids)
            for (trunk, prompt), answer in zip(trunks, first, strict=True)
        }
        start = {trunk: len(prompt) for trunk, prompt in trunks}
        prefixes, lengths = [], []
        for parent, keep, branch_B, _ in shape.forked:
            for branch in branch_B.tolist():
                prefixes.append(path[parent][: start[parent] + keep])
                lengths.append(shape.length[branch] - keep)
        second = self.generate(prefixes, lengths)
        again = sum(
            len(prefix) - 1 - answer.num_cached_tokens
            for prefix, answer in zip(prefixes, second, strict=True)
        )
        return Cost(
            leaves=len(first) + len(second),
            sampled=sum(limits) + sum(lengths),
            computed=sum(map(_computed, [*first, *second])),
            recomputed=again,
        )


def _computed(answer: RequestOutput) -> int:
    """Forward tokens: what of the prompt was not cached, and all drawn tokens but the last."""
    drawn = len(answer.outputs[0].token_ids)
    return len(answer.prompt_token_ids) - answer.num_cached_tokens + drawn - 1


def most_uncertain(logprobs: Sequence[Any], count: int) -> list[int]:
    """The positions of largest entropy, by the log-probs that vLLM returned, renormalised."""
    entropy_T = []
    for position in logprobs:
        probability = np.exp([token.logprob for token in position.values()])
        probability /= probability.sum()
        entropy_T.append(float(-(probability * np.log(probability)).sum()))
    end = max(1, len(entropy_T) - MASK_TAIL)
    return sorted(heapq.nlargest(count, range(1, end), key=entropy_T.__getitem__))
