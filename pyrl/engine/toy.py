"""Toy: an engine for tests of statistics, a bigram model whose probabilities are known exactly."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pyrl.engine import NO_TOKENS, RUNNING, STOPPED, TRUNCATED, Branches, Dtype, Sampled, Work
from pyrl.engine.admission import Admission, find
from pyrl.logits.sample_tokens import sample_tokens
from pyrl.logits.sampling import Exclude, Sampling


@dataclass(eq=False)
class _Row:
    branch: int
    seed: int
    limit: int
    retain: bool
    prompt_length: int
    path: list[int]
    """The prompt's last token, then the response."""
    computed: int
    """Tokens of prompt and response that the model has seen."""
    exclude: NDArray[np.int32] = field(default_factory=lambda: NO_TOKENS)
    """Tokens that are not drawn next."""

    @property
    def length(self) -> int:
        return len(self.path) - 1

    def see(self) -> int:
        """Let the model see the tokens that it has not seen; their number."""
        new = self.prompt_length + self.length - self.computed
        self.computed += new
        return new


class ToyEngine:
    """`Engine` over a bigram model: the next token depends on the last one alone.

    `transition_VV`: float64, row v is the distribution of the token after v. `sample_tokens` draws,
    so that seeds replay. Rows are unlimited: branches enter at once.
    Raises ValueError unless the rows are distributions.
    """

    dtype: Dtype = "float64"

    def __init__(self, transition_VV: NDArray[np.float64], eos: Collection[int]) -> None:
        self._log_VV = _log_distributions(transition_VV)
        self._admission = Admission(len(self._log_VV))
        self._eos = np.array(sorted(eos), np.int32)
        self._sampling: Sampling | None = None
        self._version = 0
        self._work = Work(0, 0, 0)
        self._known: dict[int, _Row] = {}
        self._running: dict[int, _Row] = {}

    def start(self, sampling: Sampling) -> None:
        if self._running:
            raise RuntimeError(
                f"start: {len(self._running)} branches are running; abort them first"
            )
        self._sampling = sampling

    def submit(self, branches: Branches) -> None:
        prompts = self._admission.submit(branches, self._known)
        fields = (branches.branch_B, branches.prompt_B, branches.seed_B, branches.limit_B)
        new = []
        for branch, p, seed, limit in zip(*(x.tolist() for x in fields), strict=True):
            size, path = prompts[p].size, [int(prompts[p][-1])]
            new.append(_Row(branch, seed, limit, branches.retain, size, path, size))
        self._enter(new)
        computed = sum(prompts[p].size for p in np.unique(branches.prompt_B))
        self._count(prompt=computed, copied=sum(row.prompt_length for row in new) - computed)

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        source = find(parent, self._known)
        finished = parent not in self._running
        self._admission.fork(
            keep, source.length, branch_B, seed_B, exclude, finished=finished, known=self._known
        )
        total = source.prompt_length + keep
        fork = replace(source, path=source.path[: keep + 1], computed=total, exclude=exclude.copy())
        new = [
            replace(fork, branch=branch, seed=seed, path=list(fork.path))
            for branch, seed in zip(branch_B.tolist(), seed_B.tolist(), strict=True)
        ]
        self._enter(new)
        # A last token that is shared is seen once, by the parent, even if that leaves before.
        seen = source.see() if total > source.computed else 0
        self._count(decode=seen, copied=total * len(new))

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
        rows = list(self._running.values())
        self._count(decode=sum(row.see() for row in rows))
        drawn = sample_tokens(
            self._log_VV[[row.path[-1] for row in rows]],
            np.array([row.seed for row in rows], np.uint64),
            np.array([row.length for row in rows], np.int64),
            self._sampling,
            Exclude.of_rows([row.exclude for row in rows]),
        )
        for row, token in zip(rows, drawn.token_B.tolist(), strict=True):
            row.path.append(token)
            row.exclude = NO_TOKENS
        spent_B = np.array([row.length == row.limit for row in rows], bool)
        stopped_B = np.isin(drawn.token_B, self._eos)
        finish_B = np.where(stopped_B, STOPPED, np.where(spent_B, TRUNCATED, RUNNING))
        for b in np.flatnonzero(finish_B):
            self._end(rows[b])
        return Sampled(
            np.array([row.branch for row in rows], np.int64),
            drawn.token_B,
            drawn.logprob_B,
            drawn.entropy_B,
            drawn.confidence_B,
            finish_B.astype(np.uint8),
            drawn.truncated_logprob_B,
            drawn.rest_logprob_B,
        )

    def load_weights(
        self, weights: Iterable[tuple[str, NDArray[np.float64]]] | None, version: int
    ) -> None:
        """Take a new `transition`, its only weight; None keeps the one that it has.

        RuntimeError while branches are running or retained.
        """
        if self._known:
            raise RuntimeError(f"load_weights: {len(self._known)} branches are running or retained")
        if weights is not None:
            given = dict(weights)
            if given.keys() != {"transition"}:
                raise ValueError(f"weights: expected the name transition alone, got {list(given)}")
            self._log_VV = _log_distributions(given["transition"])
        self._version = version

    def weight_version(self) -> int:
        return self._version

    def work(self) -> Work:
        return self._work

    def close(self) -> None:
        self.abort(np.array([*self._known], np.int64))

    def _enter(self, new: list[_Row]) -> None:
        ids = {row.branch: row for row in new}
        self._known |= ids
        self._running |= ids

    def _end(self, row: _Row) -> None:
        del self._running[row.branch]
        if not row.retain:
            del self._known[row.branch]

    def _count(self, *, prompt: int = 0, decode: int = 0, copied: int = 0) -> None:
        old = self._work
        self._work = Work(
            old.prompt_tokens + prompt, old.decode_tokens + decode, old.copied_tokens + copied
        )


def _log_distributions(transition_VV: NDArray[np.float64]) -> torch.Tensor:
    transition_VV = np.asarray(transition_VV, np.float64)
    if transition_VV.ndim != 2 or transition_VV.shape[0] != transition_VV.shape[1]:
        raise ValueError(f"transition: expected shape [V, V], got {transition_VV.shape}")
    if (transition_VV < 0).any() or not np.allclose(transition_VV.sum(axis=1), 1):
        raise ValueError("transition: expected rows that are distributions (>= 0, sum 1)")
    return torch.from_numpy(transition_VV).log()
