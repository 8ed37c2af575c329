"""Reader: what a model says of each response token, from passes that read a shared token once.

Rows that begin alike, the answers to a question and questions behind one text, are one tree. A
token of it has one place and one predecessor, so that log-prob and entropy are one number for all
rows through it. Its backward pass adds what the rows ask for, whatever the loss (arXiv:2511.00413).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.attention import Layout
from pyrl.logits.linear_token_stats import linear_token_stats
from pyrl.logits.token_stats import Options, TokenStats, token_stats
from pyrl.pack import PackedTree, TokenBatch, pack_rows

if TYPE_CHECKING:
    from pyrl.run.config import Run

LOGITS_BYTES = 1 << 30
"""Above it the [U, V] logits of a pass are not made at once: the head then works in chunks, which
computes its product twice."""

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
        start, used = 0, 0
        for stop, leaf in enumerate(order_N):
            if used + added_N[stop] > self._tokens and stop > start:
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
        label_U = torch.from_numpy(tree.label_U).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self._autocast):
            stats = self._stats(model, tree, label_U, asked or Options())
        unique_T = torch.from_numpy(tree.unique_T).to(model.device)
        columns = {f.name: getattr(stats, f.name) for f in fields(stats)}
        of_T = {k: v.index_select(0, unique_T) for k, v in columns.items() if v is not None}
        return replace(stats, **of_T)

    def _stats(
        self, model: PreTrainedModel, tree: PackedTree, label_U: Tensor, asked: Options
    ) -> TokenStats:
        """The statistics [U] of the unique response tokens."""
        device = model.device
        inputs = {
            "input_ids": torch.from_numpy(tree.input_J)[None].to(device),
            "position_ids": torch.from_numpy(tree.position_J)[None].to(device),
            "layout": Layout.of_tree(tree),
            "use_cache": False,
        }
        predictor_U = torch.from_numpy(tree.predictor_U).to(device)
        head = model.get_output_embeddings()
        logits_bytes = 4 * len(label_U) * head.weight.shape[0]
        if self.plain_head and logits_bytes > LOGITS_BYTES:
            self._chunked += 1
            hidden_UH = model.get_decoder()(**inputs).last_hidden_state[0, predictor_U]
            weight_VH, bias = head.weight.to(hidden_UH.dtype), head.bias
            bias = None if bias is None else bias.to(hidden_UH.dtype)
            return linear_token_stats(
                hidden_UH, weight_VH, label_U, self._temperature, bias=bias, **asked
            )
        # Not `[0]`, whose gradient would be a second [1, U, V] matrix of zeros first.
        logits_UV = model(**inputs, logits_to_keep=predictor_U).logits.squeeze(0)
        # The head's product does not need its result again: the gradient takes its place.
        return token_stats(logits_UV, label_U, self._temperature, inplace=True, **asked)

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
