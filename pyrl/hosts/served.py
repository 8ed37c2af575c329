"""Served: one prompt's tree over a host's servers, from its first request to token advantages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyrl.advantage import WhitenTokens, advantages
from pyrl.advantage.ranks import RankNormal
from pyrl.algorithm import Algorithm
from pyrl.answers import EQUIVALENCES, Equivalence, classify, extractor_named
from pyrl.answers.reading import decoder
from pyrl.baselines import Informative
from pyrl.checks import one_of
from pyrl.engine import TRUNCATED
from pyrl.forest import Forest
from pyrl.hosts.requests import Ask, RequestEngine
from pyrl.hosts.trees import check_replay
from pyrl.leaves import LOOKED_UP, Leaves, collect, needs_of, score
from pyrl.prompts import Prompt
from pyrl.prune import Keep
from pyrl.reward import rewards
from pyrl.rollout import Rollout, answer_start, make_signals
from pyrl.select import selected, tokens_that_train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEP_WIDE = (WhitenTokens, Informative, RankNormal)
"""Stages that compare the tokens or prompts of a whole step, of which a tree is one prompt."""

UNKNOWN = frozenset({"entropy_T", "entropy_N", "confidence_T", "confidence_N", *LOOKED_UP})
"""What servers and their trainers do not say before the advantages are computed."""

_THREADS = ThreadPoolExecutor(max_workers=4096, thread_name_prefix="pyrl-tree")
"""A thread for each tree that waits for replies. The event loop's own few serve the host."""

_SCORING = Lock()
"""Answers are compared, and functions of others called, by one thread at a time."""


@dataclass(frozen=True)
class Tree:
    """The N leaves of one prompt that train; arrays [T] are of one leaf's response tokens."""

    token_N: tuple[NDArray[np.int32], ...]
    logprob_N: tuple[NDArray[np.float32], ...]
    """As the server reported them (nats)."""
    advantage_N: tuple[NDArray[np.float64], ...]
    train_N: tuple[NDArray[np.bool_], ...]
    """The tokens that train."""
    reward_N: NDArray[np.float64]
    """NaN is unknown."""
    truncated_N: NDArray[np.bool_]
    """Leaves that the limit ended."""
    votes: int
    """Leaves that voted."""
    ratio: float
    """The share of them that says what the label says; 0 without a label."""
    requests: int
    forks: int
    """Places where the tree forked."""
    versions: tuple[int, ...]
    """Versions of the weights that drew it, ascending, if the servers say."""


@dataclass(eq=False)
class _Group:
    calls: int = 0
    tree: asyncio.Task[Tree] | None = None


class Gathering:
    """The calls of a host for one prompt, which it makes at once: they share the tree's leaves."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, _Group] = {}

    async def leaf(
        self, key: Hashable, grow: Callable[[int], Coroutine[Any, Any, Tree]]
    ) -> tuple[Tree, int]:
        """The tree of this key and the ordinal of this call in it.

        The first call has it grown, by `grow` with the number of calls. What it raises is raised
        in each of them.
        """
        group = self._groups.setdefault(key, _Group())
        place, group.calls = group.calls, group.calls + 1
        if group.tree is None:
            # The event loop runs this task after the other calls, which are waiting there already.
            group.tree = asyncio.create_task(self._grown(key, grow))
        return await asyncio.shield(group.tree), place

    async def _grown(self, key: Hashable, grow: Callable[[int], Coroutine[Any, Any, Tree]]) -> Tree:
        return await grow(self._groups.pop(key).calls)


@dataclass(frozen=True)
class Grower:
    """Grows the trees of a host's prompts as an algorithm says, and computes their advantages.

    The algorithm's `sample` gives the numbers of leaves and tokens; the distribution is the
    host's. Its loss and its updates are the host's as well. Raises ValueError for an algorithm
    that a host cannot carry, naming the choice.
    """

    algorithm: Algorithm
    tokenizer: PreTrainedTokenizerBase
    host: str
    extractor: str = "boxed"
    """How answers are read: `pyrl train --extractor`."""
    equivalence: str = "math"
    """When answers are equal: `pyrl train --equivalence`."""

    def __post_init__(self) -> None:
        check_algorithm(self.algorithm, self.host)
        extractor_named(self.extractor)
        one_of(self.equivalence, EQUIVALENCES, "equivalence")

    def sized(self, leaves: int, max_tokens: int, votes: int | None = None) -> Grower:
        """For trees of which `leaves` train and vote; with `votes`, as many vote as it says."""
        sample = replace(
            self.algorithm.sample,
            votes=leaves if votes is None else votes,
            train=leaves,
            max_tokens=max_tokens,
        )
        return replace(self, algorithm=replace(self.algorithm, sample=sample))

    async def grow(self, question: Prompt, ask: Ask) -> Tree:
        """The tree of one question; `ask` is awaited in the running loop, once for each branch."""
        loop = asyncio.get_running_loop()
        engine = RequestEngine(ask, loop)
        try:
            return await loop.run_in_executor(_THREADS, self._grow, engine, question)
        finally:
            engine.close()

    def _grow(self, engine: RequestEngine, question: Prompt) -> Tree:
        sample, algorithm = self.algorithm.sample, self.algorithm
        rollout = Rollout(
            engine,
            [question.tokens],
            votes=sample.votes,
            limit=sample.max_tokens,
            sampling=sample.sampling(),
            fork=algorithm.fork,
            prune=algorithm.prune,
            signals=None,
            seed=0,
            answer_start=lambda tokens: answer_start(tokens, self.tokenizer),
        )
        leaves = collect(rollout.run(), decoder(self.tokenizer))
        with _SCORING:
            answers = classify(leaves, extractor_named(self.extractor), _relation(self.equivalence))
            votes = algorithm.vote(leaves, answers)
            reward_N = rewards(algorithm.reward, leaves, answers, votes, [question])
        kept_N = selected(algorithm.select, leaves, sample.train, reward_N=reward_N)
        kept = leaves.take(kept_N)
        return Tree(
            token_N=kept.token_N,
            logprob_N=self._split(kept, kept.rows.logprob_T),
            **self._credit(kept, reward_N[kept_N]),
            reward_N=reward_N[kept_N],
            truncated_N=kept.finish_N == TRUNCATED,
            votes=len(leaves.leaf_N),
            ratio=float(votes.ratio_G[0]),
            requests=engine.requests,
            forks=rollout.counts.forks,
            versions=tuple(sorted(engine.versions)),
        )

    def _credit(self, kept: Leaves, reward_N: NDArray[np.float64]) -> dict[str, Any]:
        """What the tokens of the leaves that train are worth, and which of them train."""
        scored = score(kept, reward_N, refuse_pass)
        advantage_T, _ = advantages(self.algorithm.advantage, scored)
        train_T, _ = tokens_that_train(self.algorithm.select, scored, advantage_T)
        return {
            "advantage_N": self._split(kept, advantage_T),
            "train_N": self._split(kept, train_T),
        }

    def _split(self, leaves: Leaves, value_T: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        return tuple(np.split(value_T, np.cumsum(leaves.length_N)[:-1]))


def check_algorithm(algorithm: Algorithm, host: str) -> None:
    """ValueError names a choice that needs more than a host's servers and its trainer give."""
    choices: dict[str, Sequence[Any]] = {
        "fork": [algorithm.fork],
        "prune": [algorithm.prune],
        "vote": [algorithm.vote],
        "reward": [algorithm.reward],
        "select": [algorithm.select],
        "advantage": algorithm.advantage,
    }
    if algorithm.temper.share:
        raise ValueError(
            f"temper.share: expected 0 in {host}, which samples a question once, got "
            f"{algorithm.temper.share}"
        )
    for kind, parts in choices.items():
        for part in parts:
            if reason := _refusal(kind, part, algorithm):
                raise ValueError(
                    f"{kind}: expected a choice that works in {host}, got "
                    f"{type(part).__name__}: {reason}"
                )
    check_replay(algorithm, host)
    sample = algorithm.sample
    for name, given in (
        ("max_tokens_per_prompt", sample.max_tokens_per_prompt),
        ("max_seconds", sample.max_seconds),
        ("stop_when_decided", sample.stop_when_decided),
        ("even", sample.even),
    ):
        if given:
            raise ValueError(
                f"sample.{name}: expected none in {host}, whose servers answer whole requests, "
                f"got {given}"
            )


def _refusal(kind: str, part: Any, algorithm: Algorithm) -> str:
    """Why a host cannot carry a choice; empty if it can."""
    unknown = [name for name in needs_of(part) if name in UNKNOWN]
    if unknown:
        return f"it needs {unknown[0]}, which the host's servers do not report"
    if hasattr(part, "initial"):
        return "it remembers earlier steps, which the host does not save"
    if isinstance(part, STEP_WIDE):
        return "it compares all prompts of a step, and a tree is one of them"
    fork, prune = algorithm.fork, algorithm.prune
    online = {"fork": (fork, Keep()), "prune": (fork, prune)}
    if kind in online and make_signals(*online[kind]) is not None:
        return "it needs entropy and confidence of each token while it is sampled"
    if kind == "fork" and fork.law(Forest(), algorithm.sample.votes) is not None:
        return "it needs the mass of the tokens that were not drawn"
    return ""


@cache
def _relation(name: str) -> Equivalence:
    return EQUIVALENCES[name]()


def refuse_pass(name: str) -> NDArray[np.float64]:
    """ValueError: a host makes the passes of its learner after the advantages are known."""
    raise ValueError(f"{name}: expected no pass of the learner, which a host makes afterwards")
