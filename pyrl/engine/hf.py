"""HF: the embedded engine, a transformers model batched continuously over a cache that forks.

It shares the learner's weights, and is the reference for the other engines.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrl.engine import NO_TOKENS, RUNNING, STOPPED, TRUNCATED, Branches, Dtype, Sampled, Work
from pyrl.engine.admission import Admission, find
from pyrl.engine.kv_cache import Prefix, SlotCache, detached, part, prefill
from pyrl.engine.packed_linear import PackedLinears
from pyrl.engine.trial import check_sampling
from pyrl.logits.sample_tokens import sample_tokens
from pyrl.logits.sampling import Exclude, Sampling
from pyrl.models import room

PREFILL_TOKENS = 8192
"""Prompt tokens per forward at most (a longer prompt goes alone): bounds the memory of prefills."""

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(eq=False)
class _Path:
    """Where the computed tokens of one path lie: nowhere yet, in a slot, or parked."""

    prompt: NDArray[np.int32] | None = None
    """Tokens that are still to be computed."""
    slot: int = -1
    parked: Prefix | None = None
    heirs: int = 0
    """Queued branches that will copy from here."""
    taken: bool = False
    """A branch has entered with this path: further ones copy tokens that are already computed."""


@dataclass(eq=False)
class _Branch:
    branch: int
    seed: int
    limit: int
    retain: bool
    prompt_length: int
    length: int
    """Response tokens, the pending one included."""
    path: _Path
    """The branch's tokens; while it is queued, the path that it will copy from."""
    pending: int | None = None
    """The sampled token that the model has not seen."""
    exclude: NDArray[np.int32] = field(default_factory=lambda: NO_TOKENS)
    """Tokens that are not drawn next."""

    @property
    def total(self) -> int:
        return self.prompt_length + self.length


class HFEngine:
    """`Engine` over a transformers causal language model; puts it in eval mode to sample.

    It computes with the model's own tensors: an optimizer's step in place is seen by the next
    `start` also without `load_weights(None, version)`, which gives tokens their version. A write
    through `.data`, which PyTorch does not count, is there a RuntimeError where it would be missed.

    `eos`: token ids that end a response. `max_rows`: rows of the running batch; further branches
    wait, forks before new prompts. `gather` brings the weights together where processes have parts
    of them; it is called before they are used.

    Raises ModelError for a model that it cannot sample from, by `pyrl.engine.trial`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Collection[int],
        *,
        max_rows: int = 256,
        gather: Callable[[], None] | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
        self._gather = gather or (lambda: None)
        # Weights that come and go are not kept in another layout beside it.
        self._linears = PackedLinears(nn.Module() if gather else model)
        self._gather()
        check_sampling(model)
        self._model = model
        self._decoder = model.get_decoder()
        vocabulary: int = model.get_input_embeddings().num_embeddings
        self._admission = Admission(vocabulary, room(model))
        self._eos = np.array(sorted(eos), np.int32)
        self._max_rows = max_rows
        self._sampling: Sampling | None = None
        self._version = 0
        self._torn = False
        """A step has begun and not ended: some rows have one token more than others."""
        self._work = dict.fromkeys(("prompt_tokens", "decode_tokens", "copied_tokens"), 0)
        self._cache = SlotCache(max_rows)
        self._known: dict[int, _Branch] = {}
        self._running: dict[int, _Branch] = {}  # in the order of entry
        self._slots: list[_Branch] = []  # the running branches and the orphans, by slot
        self._orphans: list[_Branch] = []  # aborted, but their last token is still to be computed
        self._forked: OrderedDict[int, _Branch] = OrderedDict()
        self._submitted: OrderedDict[int, _Branch] = OrderedDict()

    @property
    def dtype(self) -> Dtype:
        return DTYPES[self._model.dtype]

    def start(self, sampling: Sampling) -> None:
        if self._running:
            raise RuntimeError(
                f"start: {len(self._running)} branches are running; abort them first"
            )
        if self._linears.changed():
            raise RuntimeError(
                "start: the model's weights were written (through .data) since they were last "
                "sampled from; call load_weights(None, version) after each such change"
            )
        self._sampling = sampling

    def submit(self, branches: Branches) -> None:
        prompts = self._admission.submit(branches, self._known)
        paths = [_Path(prompt=prompt) for prompt in prompts]
        fields = (branches.branch_B, branches.prompt_B, branches.seed_B, branches.limit_B)
        new = [
            _Branch(branch, seed, limit, branches.retain, prompts[p].size, 0, paths[p])
            for branch, p, seed, limit in zip(*(x.tolist() for x in fields), strict=True)
        ]
        self._queue(new, self._submitted)

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        source = find(parent, self._known)
        finished = not any(parent in x for x in (self._running, self._forked, self._submitted))
        self._admission.fork(
            keep, source.length, branch_B, seed_B, exclude, finished=finished, known=self._known
        )
        fields = (source.limit, source.retain, source.prompt_length, keep, source.path)
        new = [
            _Branch(b, seed, *fields, exclude=exclude.copy())
            for b, seed in zip(branch_B.tolist(), seed_B.tolist(), strict=True)
        ]
        self._queue(new, self._forked)

    def finish(self, branch_B: NDArray[np.int64]) -> None:
        self._end([find(branch, self._running) for branch in branch_B.tolist()])

    def abort(self, branch_B: NDArray[np.int64]) -> None:
        leaving: list[_Branch] = []
        for entry in [find(branch, self._known) for branch in dict.fromkeys(branch_B.tolist())]:
            del self._known[entry.branch]
            if entry.branch in self._running:
                del self._running[entry.branch]
                (self._orphans if self._awaited(entry) else leaving).append(entry)
            for queue in (self._forked, self._submitted):
                if queue.pop(entry.branch, None):
                    entry.path.heirs -= 1
        self._leave(leaving)
        self._torn = self._torn and bool(self._running)

    def step(self) -> Sampled:
        if self._sampling is None:
            raise RuntimeError("step: call start first")
        if self._model.training:
            self._model.eval()
        if self._torn:
            raise RuntimeError("step: the last one failed half-way; abort all branches first")
        self._torn = True
        self._gather()
        # Inference mode instead of no_grad would poison buffers that the learner also uses.
        with torch.no_grad(), self._linears.active():
            self._decode()
            self._admit()
            sampled = self._sample(self._sampling)
        self._torn = False
        return sampled

    def load_weights(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Take a full set of named weights, or None if the learner has changed the model in place.

        RuntimeError while branches are running, queued or retained: their caches would be stale.
        ValueError, with the model unchanged, unless the names and shapes are exactly the model's
        (of tied weights one name is enough; if more come, they must agree).
        """
        if self._known:
            raise RuntimeError(
                f"load_weights: {len(self._known)} branches are running, queued or retained; "
                "abort them first"
            )
        if weights is not None:
            _replace_weights(self._model, dict(weights))
        self._linears.clear()
        self._cache = SlotCache(self._max_rows)
        self._slots, self._orphans = [], []
        self._version = version

    def weight_version(self) -> int:
        return self._version

    def work(self) -> Work:
        return Work(**self._work)

    def close(self) -> None:
        self.abort(np.array([*self._known], np.int64))

    def _queue(self, new: list[_Branch], queue: OrderedDict[int, _Branch]) -> None:
        for entry in new:
            entry.path.heirs += 1
        ids = {entry.branch: entry for entry in new}
        queue.update(ids)
        self._known.update(ids)

    def _decode(self) -> None:
        """Let the model see the token that each row drew last."""
        self._leave([orphan for orphan in self._orphans if not self._awaited(orphan)])
        self._orphans = [orphan for orphan in self._orphans if orphan.path.slot >= 0]
        if self._slots:
            self._cache.decode(self._decoder, torch.tensor([x.pending for x in self._slots]))
            self._work["decode_tokens"] += len(self._slots)
        self._leave(self._orphans)
        self._orphans = []

    def _admit(self) -> None:
        """Fill free rows from the queues; each starts as a copy of the tokens already computed."""
        entering = list(self._dequeue(self._max_rows - len(self._slots)))
        self._prefill({id(x.path): x.path for x in entering if x.path.prompt is not None}.values())
        for _, group in groupby(entering, key=lambda entry: (id(entry.path), entry.total)):
            heirs = list(group)
            path, total = heirs[0].path, heirs[0].total
            first = self._cache.insert(self._computed(path, total), len(heirs))
            self._work["copied_tokens"] += total * (len(heirs) - (not path.taken))
            path.taken = True
            path.heirs -= len(heirs)
            for slot, heir in enumerate(heirs, first):
                heir.path = _Path(slot=slot, taken=True)
                self._running[heir.branch] = heir
            self._slots += heirs

    def _sample(self, sampling: Sampling) -> Sampled:
        """Draw a token for each running branch; branches that end leave their rows."""
        rows = list(self._running.values())
        branch_B = np.array([entry.branch for entry in rows], np.int64)
        if not rows:
            none = np.empty(0, np.float32)
            ids = np.empty(0, np.int32)
            return Sampled(branch_B, ids, none, none, none, np.empty(0, np.uint8), none, none)
        hidden_B = self._cache.last_hidden(np.array([entry.path.slot for entry in rows], np.int64))
        drawn = sample_tokens(
            self._model.get_output_embeddings()(hidden_B),
            np.array([entry.seed for entry in rows], np.uint64),
            np.array([entry.length for entry in rows], np.int64),
            sampling,
            Exclude.of_rows([entry.exclude for entry in rows]),
        )
        for entry, token in zip(rows, drawn.token_B.tolist(), strict=True):
            entry.pending = token
            entry.exclude = NO_TOKENS
            entry.length += 1
        spent_B = np.array([entry.length == entry.limit for entry in rows])
        stopped_B = np.isin(drawn.token_B, self._eos)
        finish_B = np.where(stopped_B, STOPPED, np.where(spent_B, TRUNCATED, RUNNING))
        self._end([rows[b] for b in np.flatnonzero(finish_B)])
        return Sampled(
            branch_B,
            drawn.token_B,
            drawn.logprob_B,
            drawn.entropy_B,
            drawn.confidence_B,
            finish_B.astype(np.uint8),
            drawn.truncated_logprob_B,
            drawn.rest_logprob_B,
        )

    def _end(self, entries: list[_Branch]) -> None:
        """Take finished branches from their rows; retained ones stay known."""
        for entry in entries:
            del self._running[entry.branch]
            if not entry.retain:
                del self._known[entry.branch]
        self._leave(entries)

    def _dequeue(self, count: int) -> Iterator[_Branch]:
        for queue in (self._forked, self._submitted):
            while queue and count:
                yield queue.popitem(last=False)[1]
                count -= 1

    def _prefill(self, paths: Collection[_Path]) -> None:
        """Compute prompts, packed without padding; neighbours of equal length attend as a batch."""
        prompts = [(path, path.prompt) for path in paths if path.prompt is not None]
        prompts.sort(key=lambda pair: pair[1].size)
        while prompts:
            end_N = np.cumsum([prompt.size for _, prompt in prompts])
            count = max(1, int(np.searchsorted(end_N, PREFILL_TOKENS, side="right")))
            pack, prompts = prompts[:count], prompts[count:]
            prefixes = self._compute([prompt for _, prompt in pack], [0, *end_N[:count].tolist()])
            for (path, _), prefix in zip(pack, prefixes, strict=True):
                path.prompt, path.parked = None, prefix
            self._work["prompt_tokens"] += int(end_N[count - 1])

    def _compute(self, prompts: list[NDArray[np.int32]], cu_seqlens: list[int]) -> list[Prefix]:
        device = self._model.device
        token_I = torch.from_numpy(np.concatenate(prompts)).to(device, torch.int64)
        return prefill(self._decoder, token_I, cu_seqlens)

    def _computed(self, path: _Path, total: int) -> Prefix:
        if path.parked is not None:
            return part(path.parked, 0, total)
        return self._cache.view(path.slot, total)

    def _awaited(self, entry: _Branch) -> bool:
        """Whether a queued fork shares the token that the model has not seen."""
        return entry.path.heirs > 0 and any(
            heir.path is entry.path and heir.total == entry.total for heir in self._forked.values()
        )

    def _leave(self, entries: list[_Branch]) -> None:
        """Free rows; those that may still be copied are parked first."""
        # From the last slot down, so that the row that moves into a hole is one that stays.
        for entry in sorted(entries, key=lambda entry: entry.path.slot, reverse=True):
            path = entry.path
            if path.heirs or entry.branch in self._known:
                path.parked = detached(self._cache.view(path.slot, self._cache.length(path.slot)))
            self._cache.remove(path.slot)
            last = self._slots.pop()
            if last is not entry:
                self._slots[path.slot] = last
                last.path.slot = path.slot
            path.slot = -1


def _replace_weights(model: PreTrainedModel, given: dict[str, Tensor]) -> None:
    own: dict[str, Tensor] = model.state_dict()
    tied: dict[int, list[str]] = {}
    for name, tensor in own.items():
        tied.setdefault(tensor.data_ptr(), []).append(name)
    unknown = sorted(given.keys() - own.keys())
    missing = [names[0] for names in tied.values() if given.keys().isdisjoint(names)]
    if unknown or missing:
        raise ValueError(f"weights: unknown names {unknown}, missing names {missing}")
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name}: expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
            )
    for names in tied.values():
        first, *others = (given[name] for name in names if name in given)
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(f"expected equal tensors for the tied weights {names}")
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
