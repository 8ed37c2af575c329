"""Learner: one policy update from a batch of tokens, in passes that fit in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrl._core.tree import PackedRows
from pyrl.attention import use_pyrl_attention
from pyrl.engine import Dtype
from pyrl.engine.hf import DTYPES
from pyrl.engine.sync import digest
from pyrl.engine.trial import check_learning, has_plain_head
from pyrl.learner.below import Below
from pyrl.learner.effects import effects
from pyrl.learner.guard import (
    NonFiniteError,
    SamplerMismatchError,
    check_update,
    tolerances,
)
from pyrl.learner.moments import load_moments, moments
from pyrl.learner.momentum import Corrected, Normalized
from pyrl.learner.needs import check_columns, no_pass
from pyrl.learner.of_prompts import of_prompts
from pyrl.learner.optimizer import make_optimizer
from pyrl.learner.reader import Reader
from pyrl.learner.recompute import layers, recompute_layers
from pyrl.learner.schedule import learning_rate
from pyrl.learner.tally import Tally, averaged
from pyrl.leaves import Look
from pyrl.logits.token_stats import Options, TokenStats
from pyrl.loss.axis import LossState
from pyrl.loss.bounds import has_radii
from pyrl.loss.columns import Columns
from pyrl.loss.loss import Loss
from pyrl.loss.old_policy import (
    Memory,
    expert_column,
    learned_columns,
    loss_columns,
    loss_mask,
    nucleus_level,
    tensors,
)
from pyrl.loss.terms import Terms, loss_terms
from pyrl.models.lora import has_adapter
from pyrl.pack import TokenBatch, gather, pack
from pyrl.ranks import ALONE, Ranks
from pyrl.ranks.sharded import Held, Sharded, number

if TYPE_CHECKING:
    from pyrl.run.config import Run


class Learner:
    """Owns a model's optimizer; a gradient is that of the whole mini-batch, however it is cut."""

    def __init__(
        self,
        model: PreTrainedModel,
        initial: PreTrainedModel | None,
        run: Run,
        ranks: Ranks = ALONE,
    ) -> None:
        """`initial` is the frozen reference of a penalty or of a stage; without such a one it is
        not used, nor is it where an adapter trains: the model below is the reference then.

        ValueError: the loss needs a column that a run does not have, or that its setting of
        `old_logprobs` does not let the learner compute, or a stage does.
        """
        self.model, self.run = model, run
        self.loss: Loss = run.algorithm.loss
        self.temperature: float = run.algorithm.sample.temperature
        self.sampler_dtype = self.dtype
        """What the engine that samples computes in; the trainer sets it."""
        self.sampler_shares = True
        """The engine computes with the learner's own tensors; the trainer sets it."""
        self.ranks = ranks
        self.memory = Memory()
        self.reader = Reader.of(run)
        self.reader.parts = ranks.size
        check_columns(self.loss, run)
        self._own(model, initial)

    def _own(self, model: PreTrainedModel, initial: PreTrainedModel | None) -> None:
        """Make the models ready to be read, and the first one to be updated."""
        run = self.run
        check_learning(model)
        self.reader.plain_head = has_plain_head(model)
        if run.gradient_checkpointing:
            recompute_layers(model)
        self.policy = self._held(model)
        self.reference: Held | None = None
        """The frozen model."""
        if run.algorithm.has_reference and has_adapter(model):
            self.reference = Below(self.policy)
        elif run.algorithm.has_reference and initial is not None:
            use_pyrl_attention(initial)
            self.reference = self._held(initial)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, run)

    @property
    def changed(self) -> bool:
        """The weights have been updated, by this learner or before its state was saved."""
        return bool(self.optimizer.state)

    @property
    def device(self) -> torch.device:
        """Where the losses of tokens are computed."""
        device: torch.device = self.model.device
        return device

    def _held(self, model: PreTrainedModel) -> Held:
        """The model in whole, or this process's part of it."""
        return Sharded(model, layers(model), self.ranks) if self.run.shard else Held(model)

    @property
    def dtype(self) -> Dtype:
        """What the forward pass computes in."""
        return "bfloat16" if self.run.dtype == "bfloat16" else DTYPES[self.model.dtype]

    @property
    def looks(self) -> bool:
        """Whether the learner reads the samples before an update, and not the engine alone."""
        if self.run.old_logprobs != "auto":
            return self.run.old_logprobs == "learner"
        if self.run.ahead:
            return bool(self.loss.learner_needs)
        return bool(self.loss.learner_needs) or self.loss.follows_signs or self._samples_differ

    @property
    def _is_old(self) -> bool:
        """The old policy is the learner's before the update, and no older one that sampled."""
        return self.looks and (self.loss.compares_sampler or not self.run.ahead)

    @property
    def _samples_differ(self) -> bool:
        """The engine does not compute as the learner does, so that its log-probs are others.

        Where 16 bits round, two passes of one model differ by more than an update may.
        """
        rounds = self.dtype in ("bfloat16", "float16")
        return rounds or not self.sampler_shares or self.sampler_dtype != self.dtype

    @property
    def never_acts(self) -> list[str]:
        """Fields of the loss that can do nothing in this run, in which no ratio leaves 1."""
        updates = min(self.run.algorithm.updates_per_step, self.run.prompts_per_step)
        to_rollout = self.loss.ratio.to == "rollout" and self.loss.trust == "ratio"
        moves = self.run.ahead or (self._samples_differ and (to_rollout or not self.looks))
        return [] if updates > 1 or moves else self.loss.off_policy_parts

    def update(
        self,
        batch: TokenBatch,
        group_N: NDArray[np.int64],
        step: int,
        experts: TokenBatch | None = None,
        spent: float | None = None,
        replayed: bool = False,
        stale: bool = False,
    ) -> dict[str, float]:
        """Optimizer steps over the batch's questions; metrics averaged over them.

        `spent`: the share of its total that the run has spent; None: it has none.
        `group_N` [N] is the question of each leaf: a mini-batch never splits one. `experts` has an
        expert's response to each of them, in their order. `replayed`: earlier policies sampled, so
        one update takes all, with the log-probs that they reported, and no step remembers it.
        `stale`: an earlier policy sampled, which `pyrl.run.snapshot` has compared with the sampler.
        NonFiniteError before the optimizer step that it would spoil; SamplerMismatchError before
        the first that has moved the weights: until then sampler and learner are the same policy.
        """
        self.ranks.tell("update", batch, group_N, step, experts, spent, replayed)
        rate = learning_rate(self.run, step, spent)
        seed = (self.run.seed << 32) + step
        progress = step / self.run.steps if spent is None else spent
        updates = self.run.algorithm.updates_per_step
        cost: dict[str, float] = {}
        if replayed:
            parts = [replace(batch, group_N=group_N)]
            state = self.memory.state(batch, seed, progress)
        else:
            parts, state, cost = self.mini_batches(batch, group_N, seed, progress, updates, experts)
        rows: list[dict[str, float]] = []
        moved = replayed
        for part in parts:
            tally = self.gradient(part, state, exact=self._is_old and not moved)
            told = self._move(part, state, tally, rate, on_policy=not (moved or stale))
            moved = moved or tally.weight > 0
            rows.append(tally.metrics() | told)
        if self.ranks.size > 1 and not self.policy.sharded:
            weights = {"sum of all bits": sum(map(digest, self.parameters))}
            self.ranks.check_same(f"weights after step {step + 1}", weights)
        trained = float((batch.mask_T & (batch.advantage_T != 0)).sum())
        learned = {"learning_rate": rate, "pack/trained": trained}
        return averaged(rows) | learned | cost | self._has_read()

    def _move(
        self, batch: TokenBatch, state: LossState, tally: Tally, rate: float, *, on_policy: bool
    ) -> dict[str, float]:
        """Step the optimizer along the gradient of the batch, clipped, unless `check` raises; what
        it tells."""
        norm = number(nn.utils.clip_grad_norm_(self.parameters, self.run.clip_grad_norm))
        self.check(tally, norm, on_policy=on_policy)

        def again() -> None:
            self.gradient(batch, state)
            clip = min(1.0, self.run.clip_grad_norm / (norm + 1e-6))
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(clip)

        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if isinstance(self.optimizer, Corrected):
            self.optimizer.step(again)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        told = self.optimizer.told if isinstance(self.optimizer, Normalized) else {}
        return {"grad_norm": norm, **told}

    def mini_batches(
        self,
        batch: TokenBatch,
        group_N: NDArray[np.int64],
        seed: int,
        progress: float,
        updates: int,
        experts: TokenBatch | None = None,
    ) -> tuple[list[TokenBatch], LossState, dict[str, float]]:
        """A step's batch for at most that many updates, what their losses read beside it, and what
        a pass for that has cost. The next step's losses know of this one.

        `seed` and `progress` (a share of the run) are those of the step.
        """
        questions = np.unique(group_N)
        updates = min(updates, len(questions))
        state = self.memory.state(batch, seed, progress)
        batch, cost = self._look(replace(batch, group_N=group_N), state, updates, experts)
        if state.nucleus_entropy is None:
            self.memory.nucleus_entropy = nucleus_level(self.loss, batch)
            state = replace(state, nucleus_entropy=self.memory.nucleus_entropy)
        self.memory.add(batch)
        parts = [
            batch.take(np.flatnonzero(np.isin(group_N, part)))
            for part in np.array_split(questions, updates)
        ]
        return parts, state, cost

    def _look(
        self, batch: TokenBatch, state: LossState, updates: int, experts: TokenBatch | None
    ) -> tuple[TokenBatch, dict[str, float]]:
        """The batch with the columns of a pass over it before any update, and what that cost.

        A first update alone needs no pass, unless the terms of the loss read its columns: the old
        policy is then the one that learns.
        """
        if not self.looks or (updates == 1 and not self.loss.learner_needs):
            return batch, {}
        started = time.monotonic()
        asked = self.loss.asks(self.temperature, state)
        columns = self._read(batch, asked)
        if not self._is_old:
            del columns["old_logprob_T"]
        tokens = len(batch.input_I)
        if experts is not None:
            theirs_T = self._read(experts)["logprob_T"]
            columns["expert_logprob_T"] = expert_column(batch, experts, theirs_T)
            tokens += len(experts.input_I)
        cost = {"old_logprobs/seconds": time.monotonic() - started, "old_logprobs/tokens": tokens}
        return replace(batch, columns=columns), cost

    def before(self, rows: PackedRows) -> Look:
        """Log-probs [T] of these rows before any update: by the learner ("old_logprob_T"), by the
        frozen first model ("ref_logprob_T"), or the mean of the prompt's, by the learner
        ("prompt_logprob_T"). A pass is made when one is asked for.

        ValueError then, where the run has none.
        """

        @cache
        def look(name: str) -> NDArray[np.float64]:
            frozen = name == "ref_logprob_T"
            if frozen and self.reference is None:
                raise ValueError(
                    f"{name}: expected an advantage stage or a selection that names it in `needs`, "
                    f"so that the first model is loaded; there is none"
                )
            if not frozen and self.run.old_logprobs == "engine":
                raise ValueError(no_pass(name, "an advantage stage or a selection"))
            batch = pack(rows, np.zeros(len(rows.label_T)))
            if name == "prompt_logprob_T":
                return of_prompts(batch, self.read)
            return self.read(batch, frozen)

        return look

    def after(self, rows: PackedRows) -> NDArray[np.float64]:
        """Log-probs [T] of these rows by the learner as it is now, at the sampling temperature.

        For the eyes only: no metric counts the pass.
        """
        counting, self.reader = self.reader, copy(self.reader)
        try:
            return self.logprobs(pack(rows, np.zeros(len(rows.label_T))))
        finally:
            self.reader = counting

    def logprobs(self, batch: TokenBatch) -> NDArray[np.float64]:
        """Log-probs [T] of the batch by the model as it is now, at the sampling temperature."""
        return self.read(batch)

    def read(self, batch: TokenBatch, frozen: bool = False) -> NDArray[np.float64]:
        """Log-probs [T] by the model as it is now, or by the frozen first one, in passes that are
        dealt to all processes."""
        self.ranks.tell("read", batch, frozen)
        return self._read(batch, frozen=frozen)["logprob_T"]

    def _read(
        self, batch: TokenBatch, asked: Options | None = None, *, frozen: bool = False
    ) -> dict[str, NDArray[np.float64]]:
        """What a model says of each response token [T], in passes and without a gradient."""
        asked = asked or Options()
        model = self.reference if frozen and self.reference else self.policy
        own: list[tuple[NDArray[np.int64], dict[str, NDArray[np.floating]]]] = []
        for leaf_N in self.ranks.deal(self.reader.passes(batch)):
            if leaf_N is None:
                self._idle(model)
                continue
            stats = self._stats(model, batch.take(leaf_N), asked)
            columns = learned_columns(stats, asked.get("kept_share")).items()
            row_T = gather(batch.token_offset_N1, leaf_N)
            own.append((row_T, {name: column_T.cpu().numpy() for name, column_T in columns}))
        read: dict[str, NDArray[np.float64]] = {}
        for row_T, found in chain.from_iterable(self.ranks.gather(own)):
            for name, column_T in found.items():
                read.setdefault(name, np.empty(len(batch.label_T)))[row_T] = column_T
        return read

    @torch.no_grad()
    def _stats(self, model: Held, batch: TokenBatch, asked: Options | None = None) -> TokenStats:
        return model(lambda read: self.reader(read, batch, asked))

    @torch.no_grad()
    def _idle(self, model: Held) -> None:
        """Take part in a pass of other processes, which gather their weights from all."""
        if model.sharded:
            model(self.reader.nothing)

    def gradient(
        self, batch: TokenBatch, state: LossState | None = None, *, exact: bool = False
    ) -> Tally:
        """Leave the gradient of the whole batch's loss in the parameters; nothing else changes.

        `exact`: the weights are still those of the old policy, which is the learner's.
        """
        terms = self._terms(batch, state)
        tally = Tally(effects(self.loss, terms, batch))
        # The policy that trains is the one that sampled: without dropout or any other noise.
        self.model.eval()
        self.optimizer.zero_grad(set_to_none=True)
        for leaf_N in self.ranks.deal(self._passes(batch, terms)):
            if leaf_N is None:
                loss = self._no_loss()
            else:
                loss = self._loss(batch.take(leaf_N), terms.take(leaf_N), tally, exact)
            if loss is not None:
                torch.autograd.backward(loss)
        first, *others = self.ranks.gather(tally)
        first.join(others)
        if not self.policy.sharded:  # each pass has added its own
            self.ranks.add_gradients(self.parameters)
        return first

    def tolerances(self, tokens: int) -> tuple[float, float]:
        """By how much the log-probs of one policy may differ between sampler and learner (nats): of
        a token, and in the mean of so many."""
        return tolerances((self.run.dtype, self.sampler_dtype), tokens)

    def check(self, tally: Tally, norm: float, *, on_policy: bool) -> None:
        """Raise what `check_update` raises, and drop the gradient, unless it may change the
        weights."""
        try:
            check_update(tally, norm, self.tolerances(tally.tokens) if on_policy else None)
        except (NonFiniteError, SamplerMismatchError):
            self._drop_gradient()
            raise

    def _has_read(self) -> dict[str, float]:
        """What has been read since the last call, by the names of pyrl.report.metrics."""
        return self.reader.metrics()

    def _drop_gradient(self) -> None:
        """Let no later step see the gradient of this batch."""
        self.optimizer.zero_grad(set_to_none=True)

    def _passes(self, batch: TokenBatch, terms: Terms) -> Iterator[NDArray[np.int64]]:
        """Passes over the leaves that have a gradient."""
        used_N = self._used(batch, terms)
        for leaf_N in self.reader.passes(batch.take(used_N)):
            yield used_N[leaf_N]

    def _used(self, batch: TokenBatch, terms: Terms) -> NDArray[np.int64]:
        """The leaves that have a gradient: zero advantage alone gives none."""
        used_T = terms.weight_T != 0
        if self.loss.needs_advantage:
            used_T = used_T & (terms.advantage_T != 0)
        return np.unique(batch.leaf_T[used_T.cpu().numpy()])

    def _terms(self, batch: TokenBatch, state: LossState | None) -> Terms:
        """What a token's loss takes from the whole mini-batch, from the policy that sampled it."""
        columns = loss_columns(batch)
        if has_radii(self.loss.bounds):
            columns["clip_low_T"], columns["clip_high_T"] = self.loss.bounds(batch)
        group_N = None
        if batch.group_N is not None:
            group_N = torch.from_numpy(np.unique(batch.group_N, return_inverse=True)[1])
        return loss_terms(
            self.loss,
            tensors(columns, self.device),
            mask_T=loss_mask(self.loss, batch),
            offset_N1=torch.from_numpy(batch.token_offset_N1),
            group_N=group_N,
            state=state,
        )

    def _loss(self, batch: TokenBatch, terms: Terms, tally: Tally, exact: bool) -> Tensor:
        reference = None
        if self.reference is not None and self.loss.has_reference:
            reference = self._stats(self.reference, batch).logprob
        columns = tensors(loss_columns(batch), self.device)
        given: Columns = {
            "rollout_logprob_T": columns["rollout_logprob_T"],
            "ref_logprob_T": reference,
            "proxy_logprob_T": columns.get("proxy_logprob_T"),
            "expert_logprob_T": columns.get("expert_logprob_T"),
        }
        if not exact:
            given["old_logprob_T"] = columns["old_logprob_T"]

        def loss(model: PreTrainedModel) -> Tensor:
            out, stats = self.reader.loss(model, batch, self.loss, terms, given)
            tally.add(out, stats, batch, terms)
            return out.loss

        return self.policy(loss)

    def _no_loss(self) -> Tensor | None:
        """The same passes as for a loss, where this process has none to compute."""
        if self.reference is not None and self.loss.has_reference:
            self._idle(self.reference)
        return self.policy(self.reader.nothing) if self.policy.sharded else None

    def gather(self) -> None:
        """Have all weights in this process, and in all others."""
        self.ranks.tell("gather")
        self.policy.gather()

    def weights(self) -> dict[str, Tensor] | None:
        """All weights, for a file, where the model has parts of them."""
        self.ranks.tell("weights")
        return self.policy.weights()

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The optimizer's tensors and step counts by parameter name, for a checkpoint."""
        self.ranks.tell("state")
        self.policy.part()
        return moments(self.optimizer, self.model, keep=not self.ranks.rank)

    def load_state(self, tensors: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Take over what `state` returned; ValueError if it is of another model."""
        self.policy.part()
        load_moments(self.optimizer, self.model, tensors, counts)

    def keep(self, step: int) -> str | None:
        """Where a server keeps weights and optimizer as they are after this step; None: the
        checkpoint has them."""
        return None

    def publish(self) -> str | None:
        """Where a server keeps the trained weights; None: the run's directory has them."""
        return None
