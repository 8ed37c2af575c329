"""vLLM as an engine, stepped by hand, so that forks enter and pruned branches leave its batch.

A branch is a request; a fork is a request whose prompt ends with the tokens that it shares. vLLM
finds them in its prefix cache up to the last whole block; the rest is copied (`forks.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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
from pyrl.engine.vllm.channel import RECORD, Frame
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.engine.vllm.table import FORK, TAP, Branch, BranchTable
from pyrl.logits.sample_tokens import DRAWABLE
from pyrl.logits.sampling import Sampling
from pyrl.models import Room

if TYPE_CHECKING:
    from pyrl.engine.vllm.release import EngineCoreOutput

logger = logging.getLogger(__name__)


class Requests(Protocol):
    """What runs an engine's requests: vLLM here (`core.py`), or at samplers (`samplers.py`)."""

    max_model_len: int
    vocabulary: int
    block_size: int

    @property
    def closed(self) -> bool:
        """Whether every further call raises."""

    def start(self, sampling: Sampling) -> None:
        """Draw from this distribution from now on."""

    def add(
        self, name: str, tokens: list[int], max_tokens: int, stop: list[int], extra: dict[str, Any]
    ) -> None:
        """Queue a request."""

    def abort(self, names: list[str]) -> None:
        """Drop requests, wherever they are."""

    def outputs(self) -> Sequence[EngineCoreOutput]:
        """The outputs of the next step, one for each request that drew a token or ended in it."""

    def frame(self) -> Frame | None:
        """The oldest frame of drawn tokens that was not read, or None."""

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, int]:
        """Replace the weights and forget every cached prefix; digests of what arrived."""

    def close(self) -> None:
        """Stop; what it started ends too."""


class VLLMEngine:
    """`Engine` over vLLM. `model`: a directory or a hub id; `eos`: token ids that end a response.

    `max_rows`: branches that run at once; further ones wait. `dtype`: of weights and cache unless
    the options say otherwise. With `options.own_process` an engine that dies or hangs is started
    again with the current weights, and every unfinished branch goes on from its last token with
    its own seed; the caller only sees that it took longer.

    That process samples on while the caller decides: forks and prunes reach it a step or two later,
    tokens that it has sampled for a pruned branch meanwhile are dropped, and thresholds that follow
    the order of tokens do not replay from a seed. In this process every step waits for the
    decisions of the step before.

    Raises EngineError for a release, model or option that does not fit; EngineFailure if the
    restarts are used up.
    """

    def __init__(
        self,
        model: str,
        eos: Collection[int],
        *,
        max_rows: int = 256,
        dtype: Dtype = "float32",
        options: VLLMOptions | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
        self._model, self._max_rows = model, max_rows
        self._options = options or VLLMOptions()
        self.dtype: Dtype = self._options.dtype or dtype
        self._eos = sorted(eos)
        self._core = self._launch()
        longest = self._core.max_model_len
        room = Room(longest, f"vllm.max_model_len = {longest}")
        self._admission = Admission(self.vocabulary, room)
        self._sampling: Sampling | None = None
        self._version = 0
        self._weights: list[tuple[str, Tensor]] | None = None
        self._digests: dict[str, int] = {}
        self._known: dict[int, Branch] = {}
        self._by_ticket: dict[int, Branch] = {}
        """Branches that run or are queued."""
        self._tickets = 0
        self._table = BranchTable(0)
        self._readers: dict[bytes, int] = {}
        """Prompts that were read with the current weights, and the ticket of the first branch that
        read each."""
        self._failures = 0
        """Restarts since the last token was drawn."""
        self._failure: EngineFailure | None = None
        """The failure of a call that did not wait for an answer; the next step handles it."""
        self._work = Work(0, 0, 0)

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows."""
        return self._core.vocabulary

    @property
    def block_size(self) -> int:
        """Tokens in a block of the cache: what a fork computes again is less."""
        return self._core.block_size

    def start(self, sampling: Sampling) -> None:
        if self._by_ticket:
            raise RuntimeError(
                f"start: {len(self._by_ticket)} branches are running; abort them first"
            )
        self._sampling = sampling
        self._tell(lambda: self._core.start(sampling))

    def submit(self, branches: Branches) -> None:
        prompts = self._admission.submit(branches, self._known)
        fields = (branches.branch_B, branches.prompt_B, branches.seed_B, branches.limit_B)
        new: list[Branch] = []
        for branch, p, seed, limit in zip(*(x.tolist() for x in fields), strict=True):
            prompt = prompts[p]
            reader = self._readers.setdefault(prompt.tobytes(), self._tickets + len(new))
            source = reader if reader < self._tickets + len(new) else -1
            shared = prompt.size if source >= 0 else 0
            new.append(Branch(branch, -1, prompt, seed, limit, branches.retain, source, shared))
        self._enter(new, np.empty(0, np.int32))

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        source = find(parent, self._known)
        length = self._length(source)
        finished = source.ticket not in self._by_ticket
        self._admission.fork(
            keep, length, branch_B, seed_B, exclude, finished=finished, known=self._known
        )
        # The model has not seen the last token of the parent's path either.
        shared = source.prompt.size + min(keep, length - 1)
        fields = (source.limit, source.retain, source.ticket, shared, keep, exclude.copy())
        new = [
            Branch(branch, -1, source.prompt, seed, *fields)
            for branch, seed in zip(branch_B.tolist(), seed_B.tolist(), strict=True)
        ]
        self._enter(new, self._table.tokens(source.ticket, keep))

    def finish(self, branch_B: NDArray[np.int64]) -> None:
        running = {entry.branch: entry for entry in self._by_ticket.values()}
        entries = [find(branch, running) for branch in branch_B.tolist()]
        for entry in entries:
            if not entry.retain:
                del self._known[entry.branch]
        self._cancel(entries)

    def abort(self, branch_B: NDArray[np.int64]) -> None:
        entries = [find(branch, self._known) for branch in dict.fromkeys(branch_B.tolist())]
        for entry in entries:
            del self._known[entry.branch]
        self._cancel([entry for entry in entries if entry.ticket in self._by_ticket])

    def step(self) -> Sampled:
        if self._sampling is None:
            raise RuntimeError("step: call start first")
        while self._by_ticket:
            try:
                if self._failure is not None:
                    raise self._failure
                sampled = self._take(self._core.outputs())
            except EngineFailure as failure:
                self._restart(failure)
                continue
            if len(sampled.branch_B):
                self._failures = 0
                return sampled
        return self._sampled(np.empty(0, RECORD))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Take all weights by their names in a checkpoint, tied ones under each of their names.

        RuntimeError while branches are running, queued or retained: their caches would be stale.
        ValueError for None: this engine shares no memory with the learner.
        """
        if self._known:
            raise RuntimeError(
                f"load_weights: {len(self._known)} branches are running, queued or retained; "
                "abort them first"
            )
        if weights is None:
            raise ValueError("load_weights: vLLM keeps weights of its own; expected named tensors")
        self._weights, self._version = list(weights), version
        self._readers.clear()
        try:
            self._digests = self._core.load(self._weights, version)
        except EngineFailure as failure:
            self._restart(failure)

    def weight_version(self) -> int:
        return self._version

    def received(self) -> dict[str, int]:
        """The digests of the weights that last arrived, by name."""
        return dict(self._digests)

    def work(self) -> Work:
        return self._work

    def close(self) -> None:
        """Stop vLLM and its processes; the engine cannot be used afterwards."""
        self._core.close()

    def _launch(self) -> Requests:
        from pyrl.engine.vllm.core import Core

        return Core(self._model, self._max_rows, self.dtype, self._options)

    def _length(self, entry: Branch) -> int:
        return int(self._table.length_R[entry.ticket - self._table.base])

    def _enter(self, new: list[Branch], tokens: NDArray[np.int32]) -> None:
        """Give branches tickets and queue their requests; `tokens`: responses so far."""
        if not self._known:
            self._table = BranchTable(self._tickets)
        for entry in new:
            self._known[entry.branch] = entry
            self._request(entry, tokens)

    def _request(self, entry: Branch, tokens: NDArray[np.int32]) -> None:
        entry.ticket = self._tickets
        self._tickets += 1
        self._by_ticket[entry.ticket] = entry
        self._table.add(entry, tokens)
        path = entry.prompt.tolist() + tokens.tolist()
        exclude = entry.exclude.tolist() if len(tokens) == entry.forked_at else []
        extra = {
            TAP: [entry.ticket, entry.seed, len(tokens), entry.prompt.size, exclude],
            FORK: [str(entry.source), entry.shared],
        }
        room = entry.limit - len(tokens)
        self._tell(lambda: self._core.add(str(entry.ticket), path, room, self._eos, extra))

    def _tell(self, function: Callable[[], None]) -> None:
        """Make a call that a restart would make again: a failure waits for the next step."""
        if self._failure is None:
            try:
                function()
            except EngineFailure as failure:
                self._failure = failure

    def _cancel(self, entries: list[Branch]) -> None:
        """Take branches that run or wait out of vLLM."""
        for entry in entries:
            self._close(entry.ticket)
        if entries and not self._core.closed:
            self._tell(lambda: self._core.abort([str(entry.ticket) for entry in entries]))

    def _close(self, ticket: int) -> None:
        del self._by_ticket[ticket]
        self._table.running_R[ticket - self._table.base] = False

    def _take(self, outputs: Sequence[EngineCoreOutput]) -> Sampled:
        """The tokens of one step, from the channel; the outputs tell whose they are."""
        drew = [output for output in outputs if output.new_token_ids]
        ticket_B = np.array([int(output.request_id) for output in drew], np.int64)
        row_B = ticket_B - self._table.base
        alive_B = (row_B >= 0) & self._table.running_R.take(row_B, mode="clip")
        if not alive_B.all():  # a separate process still draws for aborted branches
            drew = list(compress(drew, alive_B.tolist()))
            ticket_B, row_B = ticket_B[alive_B], row_B[alive_B]
        records_B = self._read(ticket_B)
        given = [output.new_token_ids for output in drew]
        lifted = np.maximum(records_B["token"], 0)[:, None].tolist()
        if given != lifted or (records_B["position"] != self._table.length_R[row_B]).any():
            raise EngineFailure(
                f"requests {ticket_B[:8].tolist()}... were given tokens {given[:8]} at positions "
                f"{self._table.length_R[row_B][:8]}, but {lifted[:8]} were drawn at "
                f"{records_B['position'][:8]}"
            )
        self._count(drew)
        ended = {int(output.request_id) for output in outputs if output.finish_reason is not None}
        return self._sampled(records_B.take(np.argsort(ticket_B)), ended)

    def _read(self, ticket_B: NDArray[np.int64]) -> NDArray[np.void]:
        """Records of these requests' tokens, in this order; frames may hold aborted ones too."""
        frames, size = [np.empty(0, RECORD)], 0
        where_B = np.full(len(ticket_B), -1)
        while (where_B < 0).any():
            frame = self._core.frame()
            if frame is None:
                raise EngineFailure(
                    f"no numbers arrived for requests {ticket_B[where_B < 0][:8].tolist()}"
                )
            ticket_R = frame.records_B["ticket"].copy()
            order_R = np.argsort(ticket_R)
            index_B = order_R.take(np.searchsorted(ticket_R, ticket_B, sorter=order_R), mode="clip")
            here_B = ticket_R[index_B] == ticket_B
            if frame.version != self._version and here_B.any():
                raise EngineFailure(
                    f"tokens were drawn with weights of version {frame.version}, expected "
                    f"{self._version}"
                )
            where_B = np.where(here_B, size + index_B, where_B)
            frames.append(frame.records_B)
            size += len(ticket_R)
        # `take`: indexing by an array copies a record field by field.
        return np.concatenate(frames).take(where_B)

    def _sampled(self, records_B: NDArray[np.void], ended: Collection[int] = ()) -> Sampled:
        """Write drawn tokens into the table, and close the branches that end with them.

        `ended`: tickets whose requests vLLM has ended; EngineFailure if such a branch has not.
        """
        row_B = records_B["ticket"] - self._table.base
        token_B = records_B["token"].copy()
        if (broken_B := token_B < 0).any():
            raise FloatingPointError(
                f"expected {DRAWABLE}, got {broken_B.sum()} of {len(token_B)} rows that are not"
            )
        spent_B = self._table.length_R[row_B] + 1 == self._table.limit_R[row_B]
        stopped_B = np.isin(token_B, self._eos)
        finish_B = np.where(stopped_B, STOPPED, np.where(spent_B, TRUNCATED, RUNNING))
        finished = records_B["ticket"][finish_B != RUNNING].tolist()
        if early := (self._by_ticket.keys() & ended).difference(finished):
            raise EngineFailure(f"requests {sorted(early)[:8]} ended before their branches")
        self._table.append(row_B, token_B)
        for ticket in finished:
            entry = self._by_ticket[ticket]
            self._close(ticket)
            if not entry.retain:
                del self._known[entry.branch]
        return Sampled(
            self._table.branch_R[row_B],
            token_B,
            records_B["logprob"].copy(),
            records_B["entropy"].copy(),
            records_B["confidence"].copy(),
            finish_B.astype(np.uint8),
            records_B["truncated_logprob"].copy(),
            records_B["rest_logprob"].copy(),
        )

    def _restart(self, failure: EngineFailure) -> None:
        """Start an engine with the current weights; unfinished branches go on where they are."""
        self._core.close()
        self._failures += 1
        if not self._options.own_process:
            raise failure
        if self._failures > self._options.restarts:
            raise EngineFailure(f"{failure} (restarts in a row: {self._failures - 1})")
        logger.warning("vLLM is started again: %s", failure)
        self._failure = None
        self._readers.clear()
        try:
            self._core = self._launch()
            if self._weights is not None:
                self._digests = self._core.load(self._weights, self._version)
        except (EngineError, EngineFailure) as another:
            self._restart(EngineFailure(str(another)))
            return
        if self._sampling is not None:
            sampling = self._sampling
            self._tell(lambda: self._core.start(sampling))
        self._go_on(list(self._by_ticket.values()))

    def _go_on(self, unfinished: Sequence[Branch]) -> None:
        """Request what follows the tokens that these branches have."""
        paths = [self._table.tokens(x.ticket, self._length(x)) for x in unfinished]
        for entry, tokens in zip(unfinished, paths, strict=True):
            self._close(entry.ticket)
            entry.source, entry.shared = -1, entry.prompt.size + len(tokens)
            self._request(entry, tokens)

    def _count(self, drew: Sequence[EngineCoreOutput]) -> None:
        """Count forward tokens: one for a drawn token, or the prefill that it was drawn after.

        vLLM does not report what a preempted request computes again: it is not counted.
        """
        prefilled = [output for output in drew if output.prefill_stats is not None]
        computed = cached = again = 0
        for output in prefilled:
            entry, stats = self._by_ticket[int(output.request_id)], output.prefill_stats
            computed += stats.num_computed_tokens
            cached += stats.num_cached_tokens
            again += max(0, entry.shared - stats.num_cached_tokens)
        old = self._work
        self._work = Work(
            old.prompt_tokens + computed,
            old.decode_tokens + len(drew) - len(prefilled),
            old.copied_tokens + cached,
            old.recomputed_tokens + again,
        )
