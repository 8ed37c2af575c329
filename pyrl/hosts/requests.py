"""Requests: an engine whose tokens come from a host's servers, which answer whole requests.

A branch is one request: its prompt, and as the answer all tokens up to its end. A sibling is a
request too, whose prompt is the prefix that it shares with its parent: a server with a cache of
prefixes computes nothing of that again. Seeds play no part, since the servers draw.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl.engine import (
    NO_TOKENS,
    RUNNING,
    STOPPED,
    TRUNCATED,
    Branches,
    Dtype,
    EngineError,
    EngineFailure,
    Sampled,
    Work,
)
from pyrl.engine.admission import Admission, find
from pyrl.logits.sampling import Sampling

ANY_ID = 1 << 31
"""Token ids are below it; the host knows its vocabulary."""


@dataclass(frozen=True)
class Reply:
    """What a server says to a request."""

    token_T: NDArray[np.int32]
    """All tokens up to the end, an end token included."""
    logprob_T: NDArray[np.float32]
    """Their log-probs as the server reports them (nats)."""
    ended: bool
    """By an end token; otherwise by the limit."""
    versions: tuple[int, ...] = ()
    """Versions of the weights that drew them, if the server says."""


Ask = Callable[[list[int], int], Coroutine[Any, Any, Reply] | Awaitable[Reply]]
"""Asks what follows these token ids; the number is that of tokens at most."""


@dataclass(eq=False)
class _Row:
    branch: int
    prompt: list[int]
    path: list[int]
    """Response tokens so far."""
    limit: int
    retain: bool
    future: Future[Reply]
    reply: Reply | None = None
    read: int = 0
    """Tokens of the reply that are in the path."""
    last: int = field(default=RUNNING)


class RequestEngine:
    """`pyrl.engine.Engine` over `ask`, which is awaited in the event loop of the host.

    A rollout over it runs in another thread than that loop. Entropy and confidence of tokens are
    NaN: servers report the log-prob of what they drew alone. Raises EngineFailure for a reply
    without tokens, with other log-probs than tokens, or beyond its limit; what `ask` raises comes
    out of `step`.
    """

    dtype: Dtype = "bfloat16"

    def __init__(self, ask: Ask, loop: asyncio.AbstractEventLoop, version: int = 0) -> None:
        self._ask, self._loop, self._version = ask, loop, version
        self._admission = Admission(ANY_ID)
        self._known: dict[int, _Row] = {}
        self._running: dict[int, _Row] = {}
        self._prompt_tokens = self._decode_tokens = 0
        self.requests = 0
        """Requests made so far."""
        self.versions: set[int] = set()
        """Versions of weights in the replies."""

    def start(self, sampling: Sampling) -> None:
        """The host samples as its own options say; RuntimeError while branches are running."""
        if self._running:
            raise RuntimeError(f"start: {len(self._running)} branches are running; abort them")

    def submit(self, branches: Branches) -> None:
        prompts = self._admission.submit(branches, self._known)
        fields = (branches.branch_B, branches.prompt_B, branches.limit_B)
        for branch, p, limit in zip(*(x.tolist() for x in fields), strict=True):
            self._open(branch, prompts[p].tolist(), [], limit, branches.retain)

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        """As `Engine.fork`; EngineError for tokens to exclude, which a request cannot say."""
        source = find(parent, self._known)
        finished = parent not in self._running
        known, length = self._known, len(source.path)
        self._admission.fork(
            keep, length, branch_B, seed_B, exclude, finished=finished, known=known
        )
        if exclude.size:
            raise EngineError("fork: expected no tokens to exclude, which a request cannot say")
        for branch in branch_B.tolist():
            self._open(branch, source.prompt, source.path[:keep], source.limit, source.retain)

    def step(self) -> Sampled:
        """One token of each branch that has its reply; waits for the first where none has one."""
        self._collect()
        rows = [row for row in self._running.values() if row.reply is not None]
        token_B, logprob_B = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
        for b, row in enumerate(rows):
            reply = row.reply
            assert reply is not None
            token_B[b], logprob_B[b] = reply.token_T[row.read], reply.logprob_T[row.read]
            row.path.append(int(token_B[b]))
            row.read += 1
            over = row.read == len(reply.token_T)
            row.last = (STOPPED if reply.ended else TRUNCATED) if over else RUNNING
        for row in rows:
            if row.last != RUNNING:
                self._end(row)
        nan_B = np.full(len(rows), np.nan, np.float32)
        return Sampled(
            branch_B=np.array([row.branch for row in rows], np.int64),
            token_B=token_B,
            logprob_B=logprob_B,
            entropy_B=nan_B,
            confidence_B=nan_B,
            finish_B=np.array([row.last for row in rows], np.uint8),
            truncated_logprob_B=nan_B,
            rest_logprob_B=nan_B,
        )

    def finish(self, branch_B: NDArray[np.int64]) -> None:
        for branch in branch_B.tolist():
            self._end(find(branch, self._running))

    def abort(self, branch_B: NDArray[np.int64]) -> None:
        for row in [find(branch, self._known) for branch in dict.fromkeys(branch_B.tolist())]:
            row.future.cancel()
            del self._known[row.branch]
            self._running.pop(row.branch, None)

    def load_weights(self, weights: Iterable[tuple[str, Any]] | None, version: int) -> None:
        """EngineError: the host brings its servers new weights."""
        raise EngineError("load_weights: expected the host to bring its servers their weights")

    def weight_version(self) -> int:
        return self._version

    def work(self) -> Work:
        """Prompt tokens are those of all requests, whatever the servers have in their caches."""
        return Work(self._prompt_tokens, self._decode_tokens, 0)

    def close(self) -> None:
        """Cancel what has no reply: a thread that waits for it in `step` goes on with an error."""
        for row in [*self._known.values()]:
            row.future.cancel()

    def _open(
        self, branch: int, prompt: list[int], path: list[int], limit: int, retain: bool
    ) -> None:
        left = limit - len(path)
        future = asyncio.run_coroutine_threadsafe(self._reply(prompt + path, left), self._loop)
        self._known[branch] = _Row(branch, prompt, [*path], limit, retain, future)
        self._running[branch] = self._known[branch]
        self.requests += 1
        self._prompt_tokens += len(prompt) + len(path)

    async def _reply(self, token_ids: list[int], limit: int) -> Reply:
        reply = await self._ask(token_ids, limit)
        tokens, logprobs = len(reply.token_T), len(reply.logprob_T)
        if not 1 <= tokens <= limit or logprobs != tokens:
            raise EngineFailure(
                f"the host's server: expected 1 to {limit} tokens and a log-prob of each, got "
                f"{tokens} tokens and {logprobs} log-probs"
            )
        return reply

    def _collect(self) -> None:
        """Take the replies that are there; wait for one if no running branch has any."""
        waiting = {row.future: row for row in self._running.values() if row.reply is None}
        if len(waiting) == len(self._running) and waiting:
            wait(waiting, return_when=FIRST_COMPLETED)
        for future, row in waiting.items():
            if future.done():
                row.reply = future.result()
                self._decode_tokens += len(row.reply.token_T)
                self.versions.update(row.reply.versions)

    def _end(self, row: _Row) -> None:
        del self._running[row.branch]
        if not row.retain:
            del self._known[row.branch]
