"""Reader: what a model says of each response token, from passes that read a shared token once.

Rows that begin alike, the answers to a question and questions behind one text, are one tree. A
token of it has one place and one predecessor, so that log-prob and entropy are one number for all
rows through it. Its backward pass adds what the rows ask for, whatever the loss (arXiv:2511.00413).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.attention import Layout
from pyrl.logits.linear_token_stats import linear_token_stats
from pyrl.logits.token_stats import Options, TokenStats, token_stats
from pyrl.loss.axis import LossState
from pyrl.loss.columns import Columns
from pyrl.loss.fused import is_local
from pyrl.loss.loss import Loss
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.result import PolicyLoss
from pyrl.loss.shared import shared_policy_loss
from pyrl.loss.terms import Terms
from pyrl.pack import PackedTree, TokenBatch, pack_rows

if TYPE_CHECKING:
    from pyrl.run.config import Run

SMALL_LOGITS = 1 << 24
"""Bytes of a pass's [U, V] logits above which they are made in chunks, where each is made once."""

LARGE_LOGITS = 1 << 30
"""The same where each chunk has to be made twice: for a loss that is not local to a token."""

DISAGREEMENT = 1e-3
"""Nats: rounding makes less of a token that two branches drew after the same text."""


class Reader:
    """Reads batches in passes of at most `tokens_per_pass` tokens, and counts what it reads."""

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        tokens_per_pass: int = 16_384,
        share: bool = True,
        bfloat16: bool = False,
    ) -> None:
        """`temperature` is that of sampling. `share`: read a beginning that rows have in common
        once. `bfloat16`: compute in it (autocast), else in the model's own type."""
        self._temperature, self._tokens, self._share = temperature, tokens_per_pass, share
        self._autocast = bfloat16
        self.plain_head = False
        """The model's logits are its head's product with the last hidden states, and no more."""
        self.parts = 1
        """Passes end at these parts of a batch's tokens, so that each process has one."""
        self._rows = self._unique = self._cut = self._passes = self._chunked = 0
        self._disagreeing = self._responses = 0

    @classmethod
    def of(cls, run: Run) -> Reader:
        """The reader that a run's settings ask for."""
        return cls(
            run.algorithm.sample.temperature,
            tokens_per_pass=run.tokens_per_pass,
            share=run.pack == "tree",
            bfloat16=run.dtype == "bfloat16",
        )

    def passes(self, batch: TokenBatch) -> Iterator[NDArray[np.int64]]:
        """Leaf ordinals of each pass; a leaf with more than the tokens of a pass goes alone.

        A pass takes neighbours of a tree; a tree that is cut is read again down to the cut. The
        largest trees come first, so that a batch which does not fit in memory fails at once; equal
        lengths lie side by side, which attention uses.
        """
        if not len(batch):
            return
        tree = self._packed(batch)
        length_N = np.diff(batch.input_offset_N1)
        self._rows += int(length_N.sum())
        self._unique += int(tree.added_N.sum())
        self._count_disagreeing(batch, tree)
        order_N = tree.order_N
        # A leaf that shares nothing with those before it begins a tree.
        tree_N = np.cumsum(tree.added_N[order_N] == length_N[order_N]) - 1
        size_N = np.bincount(tree_N, weights=tree.added_N[order_N])[tree_N]
        order_N = order_N[np.argsort(-size_N, kind="stable")]
        added_N = tree.added_N[order_N]
        part_N = (np.cumsum(added_N) - added_N) * self.parts // added_N.sum()
        part_N = np.maximum.accumulate(np.where(added_N, part_N, 0))
        start, used = 0, 0
        for stop, leaf in enumerate(order_N):
            full = used + added_N[stop] > self._tokens or part_N[stop] > part_N[start]
            if full and stop > start:
                yield order_N[start:stop]
                start, used = stop, 0
                self._cut += int(length_N[leaf] - added_N[stop])
            used += int(added_N[stop] if stop > start else length_N[leaf])
        yield order_N[start:]

    def _count_disagreeing(self, batch: TokenBatch, tree: PackedTree) -> None:
        """Tokens of which two rows report other log-probs: each row keeps its own."""
        highest_U = np.full(len(tree.label_U), -np.inf, np.float32)
        lowest_U = -highest_U
        np.maximum.at(highest_U, tree.unique_T, batch.old_logprob_T)
        np.minimum.at(lowest_U, tree.unique_T, batch.old_logprob_T)
        apart_U = highest_U - lowest_U > DISAGREEMENT
        self._disagreeing += int(apart_U[tree.unique_T].sum())
        self._responses += len(tree.unique_T)

    def __call__(
        self, model: PreTrainedModel, batch: TokenBatch, asked: Options | None = None
    ) -> TokenStats:
        """Log-prob, entropy and what is asked for of each response token [T], differentiable.

        All are of the distribution at the sampling temperature. `model` attends through pyrl
        (`pyrl.attention.use_pyrl_attention`); the batch is one pass.
        """
        tree = self._packed(batch)
        self._passes += 1
        with self._autocasting(model):
            stats = self._stats(model, tree, asked or Options())
        unique_T = torch.from_numpy(tree.unique_T).to(model.device)
        columns = {f.name: getattr(stats, f.name) for f in fields(stats)}
        of_T = {k: v.index_select(0, unique_T) for k, v in columns.items() if v is not None}
        return replace(stats, **of_T)

    def loss(
        self,
        model: PreTrainedModel,
        batch: TokenBatch,
        loss: Loss,
        terms: Terms,
        columns: Columns,
    ) -> tuple[PolicyLoss, TokenStats]:
        """`policy_loss` of a pass, differentiable, and its statistics [T].

        Without `old_logprob_T` the policy has not moved since. One chunk of logits lies in memory
        at a time, unless those of the pass are small or the loss is not local to a token.
        """
        tree = self._packed(batch)
        if is_local(loss) and self._exceeds(SMALL_LOGITS, model, tree):
            self._passes += 1
            unique_T = torch.from_numpy(tree.unique_T).to(model.device)
            with self._autocasting(model):
                hidden_UH, weight_VH, bias, label_U = self._head(model, tree)
            parts = (hidden_UH, weight_VH, label_U, unique_T, self._temperature)
            return shared_policy_loss(*parts, bias=bias, loss=loss, terms=terms, **columns)
        nucleus = loss.nucleus
        asked = None if nucleus is None else nucleus.asks(self._temperature, LossState())
        stats = self(model, batch, asked)
        given: Columns = {"old_logprob_T": stats.logprob.detach(), **columns}
        given["nucleus_entropy_T"] = stats.nucleus_entropy
        return policy_loss(stats.logprob, stats.entropy, loss=loss, terms=terms, **given), stats

    def nothing(self, model: PreTrainedModel) -> Tensor:
        """Zero, from a pass over one token through all of the model; its gradient is zero."""
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        layout = Layout.of_rows(np.array([1]))
        with self._autocasting(model):
            inputs = {"input_ids": token, "position_ids": token, "use_cache": False}
            logits: Tensor = model(**inputs, layout=layout).logits
        return 0.0 * logits.float().sum()

    def _autocasting(self, model: PreTrainedModel) -> AbstractContextManager[object]:
        return torch.autocast(model.device.type, torch.bfloat16, enabled=self._autocast)

    def _exceeds(self, bound: int, model: PreTrainedModel, tree: PackedTree) -> bool:
        """Whether the logits of a pass are too many, and can be made from hidden states."""
        weight_VH = model.get_output_embeddings().weight
        size = 2 if self._autocast else weight_VH.itemsize
        return self.plain_head and size * len(tree.label_U) * len(weight_VH) > bound

    def _stats(self, model: PreTrainedModel, tree: PackedTree, asked: Options) -> TokenStats:
        """The statistics [U] of the unique response tokens."""
        twice = torch.is_grad_enabled()
        if self._exceeds(LARGE_LOGITS if twice else SMALL_LOGITS, model, tree):
            self._chunked += twice
            hidden_UH, weight_VH, bias, label_U = self._head(model, tree)
            return linear_token_stats(
                hidden_UH, weight_VH, label_U, self._temperature, bias=bias, **asked
            )
        inputs, predictor_U, label_U = _inputs(model, tree)
        # Not `[0]`, whose gradient would be a second [1, U, V] matrix of zeros first.
        logits_UV = model(**inputs, logits_to_keep=predictor_U).logits.squeeze(0)
        # The head's product does not need its result again: the gradient takes its place.
        return token_stats(logits_UV, label_U, self._temperature, inplace=True, **asked)

    def _head(
        self, model: PreTrainedModel, tree: PackedTree
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Last hidden states [U, H], weight and bias of the head, labels [U]."""
        inputs, predictor_U, label_U = _inputs(model, tree)
        hidden_UH = model.get_decoder()(**inputs).last_hidden_state[0, predictor_U]
        head = model.get_output_embeddings()
        bias = None if head.bias is None else head.bias.to(hidden_UH.dtype)
        return hidden_UH, head.weight.to(hidden_UH.dtype), bias, label_U

    def _packed(self, batch: TokenBatch) -> PackedTree:
        prompt_N = np.diff(batch.input_offset_N1) - np.diff(batch.token_offset_N1)
        return pack_rows(batch.input_I, batch.input_offset_N1, prompt_N, self._share)

    def metrics(self) -> dict[str, float]:
        """What has been read since the last call, by the names of pyrl.report.metrics."""
        found = {
            "pack/tokens": float(self._rows),
            "pack/unique": float(self._unique),
            "pack/repeated": self._cut / max(1, self._unique),
            "pack/disagreeing": self._disagreeing / max(1, self._responses),
            "pack/chunked_head": self._chunked / max(1, self._passes),
        }
        self._rows = self._unique = self._cut = self._passes = self._chunked = 0
        self._disagreeing = self._responses = 0
        return found


def _inputs(model: PreTrainedModel, tree: PackedTree) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What the model is called with, the places [U] that predict a response token, and its id."""
    arrays = (tree.input_J, tree.position_J, tree.predictor_U, tree.label_U)
    input_J, position_J, predictor_U, label_U = (
        torch.from_numpy(array).to(model.device) for array in arrays
    )
    inputs = {
        "input_ids": input_J[None],
        "position_ids": position_J[None],
        "layout": Layout.of_tree(tree),
        "use_cache": False,
    }
    return inputs, predictor_U, label_U
