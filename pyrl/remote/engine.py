"""Engine: branches as requests to a server, whose answers are handed out token by token."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
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
from pyrl.remote.service import Service
from pyrl.rollout import derive_seed

TOPS = "log-probs of the most probable tokens"

CONFIDENT = 5
"""Tokens whose mass is the confidence."""


@dataclass(frozen=True)
class Token:
    """One that the server has drawn, and what it says of it."""

    token: int
    logprob: float
    entropy: float
    confidence: float


@dataclass(eq=False)
class _Row:
    branch: int
    seed: int
    limit: int
    retain: bool
    prompt: NDArray[np.int32]
    tokens: list[int]
    """The response as far as it has been handed out."""
    begin: int = 0
    """Of these, those that it shares with the branch that it left."""
    ahead: deque[Token] = field(default_factory=deque)
    """What the server has drawn beyond them."""


class RemoteEngine:
    """`Engine` over a server of the Tinker protocol: a branch is a request of its prompt and its
    tokens so far.

    A fork is a request of the parent's beginning, with its own seed. The server's cache may hold
    the beginning; the protocol does not say so. `work` counts as decoded what the server has drawn,
    tokens that nobody has taken among them.
    """

    dtype: Dtype = "bfloat16"
    """The protocol does not say what a server computes in: bounds are those of the coarsest."""

    def __init__(
        self,
        service: Service,
        eos: Collection[int],
        admission: Admission,
        *,
        max_rows: int,
        chunk: int | None,
        top: int,
    ) -> None:
        """`chunk`: tokens that are asked for at a time; None: as many as a branch may have."""
        self._service, self._admission = service, admission
        self._eos, self._max_rows, self._chunk = frozenset(eos), max_rows, chunk
        self._top = min(top, admission.vocabulary)
        self._client: Any = None
        self._sampling: Sampling | None = None
        self._version = 0
        self._work = Work(0, 0, 0)
        self._known: dict[int, _Row] = {}
        self._running: dict[int, _Row] = {}
        """In the order of their entry; those beyond `max_rows` wait."""

    def start(self, sampling: Sampling) -> None:
        if self._running:
            raise RuntimeError(
                f"start: {len(self._running)} branches are running; abort them first"
            )
        self._sampling = sampling

    def submit(self, branches: Branches) -> None:
        prompts = self._admission.submit(branches, self._known)
        fields = (branches.branch_B, branches.prompt_B, branches.seed_B, branches.limit_B)
        for branch, p, seed, limit in zip(*(x.tolist() for x in fields), strict=True):
            self._enter(_Row(branch, seed, limit, branches.retain, prompts[p], []))

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        """EngineError where tokens are excluded: the protocol cannot."""
        if exclude.size:
            raise EngineError(
                f"fork: exclude: expected no tokens with a server of the Tinker protocol, "
                f"got {exclude}"
            )
        source = find(parent, self._known)
        self._admission.fork(
            keep,
            len(source.tokens),
            branch_B,
            seed_B,
            exclude,
            finished=parent not in self._running,
            known=self._known,
        )
        for branch, seed in zip(branch_B.tolist(), seed_B.tolist(), strict=True):
            begun = source.tokens[:keep]
            self._enter(
                replace(source, branch=branch, seed=seed, tokens=begun, begin=keep, ahead=deque())
            )

    def finish(self, branch_B: NDArray[np.int64]) -> None:
        for branch in branch_B.tolist():
            self._end(find(branch, self._running))

    def abort(self, branch_B: NDArray[np.int64]) -> None:
        for row in [find(branch, self._known) for branch in dict.fromkeys(branch_B.tolist())]:
            del self._known[row.branch]
            self._running.pop(row.branch, None)

    def step(self) -> Sampled:
        if self._sampling is None:
            raise RuntimeError("step: call start first")
        rows = [*self._running.values()][: self._max_rows]
        self._draw(self._sampling, [row for row in rows if not row.ahead])
        drawn = [row.ahead.popleft() for row in rows]
        for row, token in zip(rows, drawn, strict=True):
            row.tokens.append(token.token)
        stopped_B = np.array([token.token in self._eos for token in drawn], bool)
        spent_B = np.array([len(row.tokens) == row.limit for row in rows], bool)
        finish_B = np.where(stopped_B, STOPPED, np.where(spent_B, TRUNCATED, RUNNING))
        branch_B = np.array([row.branch for row in rows], np.int64)
        for b in np.flatnonzero(finish_B):
            self._end(rows[b])
        logprob_B = np.array([token.logprob for token in drawn], np.float32)
        unknown_B = np.full(len(rows), np.nan, np.float32)
        return Sampled(
            branch_B,
            np.array([token.token for token in drawn], np.int32),
            logprob_B,
            np.array([token.entropy for token in drawn], np.float32),
            np.array([token.confidence for token in drawn], np.float32),
            finish_B.astype(np.uint8),
            unknown_B,
            unknown_B,
        )

    def load_weights(self, weights: Iterable[tuple[str, Any]] | None, version: int) -> None:
        """Take a new `sampler`, a client of the SDK: the weights themselves stay on the server."""
        if self._known:
            raise RuntimeError(f"load_weights: {len(self._known)} branches are running or retained")
        if weights is not None:
            self._client = dict(weights)["sampler"]
        self._version = version

    def weight_version(self) -> int:
        return self._version

    def work(self) -> Work:
        return self._work

    def close(self) -> None:
        self.abort(np.array([*self._known], np.int64))
        self._service.close()

    def _enter(self, row: _Row) -> None:
        self._known[row.branch] = self._running[row.branch] = row

    def _end(self, row: _Row) -> None:
        del self._running[row.branch]
        row.ahead.clear()
        if not row.retain:
            del self._known[row.branch]

    def _draw(self, sampling: Sampling, rows: Sequence[_Row]) -> None:
        """Let the server draw the next tokens of these rows, all at the same time."""
        asked = [self._ask(sampling, row) for row in rows]
        drawn = [self._service.wait(future).sequences[0] for future in asked]
        tokens = [[*map(int, sequence.tokens)] for sequence in drawn]
        if not all(tokens):
            raise EngineFailure(f"{self._service.url}: expected at least one token, got none")
        for row, sequence, token_T, top_TK in zip(
            rows, drawn, tokens, self._tops(rows, drawn, tokens), strict=True
        ):
            entropy_T, confidence_T = statistics(top_TK, self._admission.vocabulary)
            logprob_T = self._service.told("log-probs of samples", sequence.logprobs)
            values = zip(token_T, logprob_T, entropy_T, confidence_T, strict=True)
            row.ahead.extend(Token(t, float(p), float(h), float(c)) for t, p, h, c in values)
        old = self._work
        self._work = Work(
            old.prompt_tokens + sum(len(row.prompt) + len(row.tokens) for row in rows),
            old.decode_tokens + sum(map(len, tokens)),
            0,
        )

    def _ask(self, sampling: Sampling, row: _Row) -> Any:
        length = len(row.tokens)
        left = row.limit - length
        # A server counts the tokens of a request: with one seed its next chunk would draw alike.
        seed = row.seed if length == row.begin else derive_seed(row.seed, length)
        params = self._service.types.SamplingParams(
            max_tokens=left if self._chunk is None else min(left, self._chunk),
            seed=seed - (1 << 64) if seed >= 1 << 63 else seed,
            stop=sorted(self._eos),
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
        )
        asked = {"topk_sample_logprobs": self._top} if self._service.tells_top else {}
        text = self._service.text([*row.prompt.tolist(), *row.tokens])
        return self._client.sample(text, 1, params, **asked)

    def _tops(
        self, rows: Sequence[_Row], drawn: Sequence[Any], tokens: Sequence[list[int]]
    ) -> list[NDArray[np.float64]]:
        """Log-probs [T, K] of the most probable tokens at each place of the samples.

        A release that cannot ask for them with a sample reads it once more, as a prompt.
        """
        if self._service.tells_top:
            told = [self._service.told(TOPS, s.topk_logprobs_np) for s in drawn]
            return [np.asarray(top.logprobs, np.float64) for top in told]
        params = self._service.types.SamplingParams(max_tokens=1, temperature=1.0, stop=[])
        texts = [
            [*row.prompt.tolist(), *row.tokens, *token_T]
            for row, token_T in zip(rows, tokens, strict=True)
        ]
        asked = [
            self._client.sample(
                self._service.text(text),
                1,
                params,
                include_prompt_logprobs=True,
                topk_prompt_logprobs=self._top,
            )
            for text in texts
        ]
        told = [
            self._service.told(TOPS, self._service.wait(future).topk_prompt_logprobs_np)
            for future in asked
        ]
        return [
            np.asarray(top.logprobs[-len(token_T) :], np.float64)
            for top, token_T in zip(told, tokens, strict=True)
        ]


def statistics(
    top_TK: NDArray[np.float64], vocabulary: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Entropy and confidence [T] from the log-probs of the most probable tokens.

    The mass r of all others has an entropy of at least -r log min(r, p), with p the least of those
    that are told; this bound is taken, so that the sum is at most r log((V - K) min(r, p) / r) too
    low. It is exact where all tokens are told.
    """
    top_TK = np.sort(top_TK, axis=1)[:, ::-1]
    mass_TK = np.exp(top_TK)
    entropy_T = -(mass_TK * np.maximum(top_TK, -1e3)).sum(axis=1)
    rest_T = np.maximum(1 - mass_TK.sum(axis=1), 0) if top_TK.shape[1] < vocabulary else 0.0
    least_T = np.maximum(np.minimum(rest_T, mass_TK[:, -1]), 1e-30)
    return entropy_T - rest_T * np.log(least_T), mass_TK[:, :CONFIDENT].sum(axis=1)
