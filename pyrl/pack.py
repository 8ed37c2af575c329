"""Pack: the leaves that train, as one flat row of tokens without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl import _core
from pyrl._core.tree import PackedTree, pack_rows, pack_tree

__all__ = [
    "PackedTree",
    "TokenBatch",
    "gather",
    "offsets",
    "pack",
    "pack_given",
    "pack_rows",
    "pack_tree",
]


@dataclass(frozen=True)
class TokenBatch:
    """N responses: I input tokens (the prompt and response of each), T response tokens."""

    input_I: NDArray[np.int64]
    label_T: NDArray[np.int64]
    old_logprob_T: NDArray[np.float32]
    """As the engine that sampled reported them, at the sampling temperature."""
    entropy_T: NDArray[np.float32]
    confidence_T: NDArray[np.float32]
    mask_T: NDArray[np.bool_]
    """False for tokens that do not train: forced ones, which are no sample of the policy, and
    those that a selection dropped."""
    advantage_T: NDArray[np.float64]
    input_offset_N1: NDArray[np.int64]
    """Where each leaf's input tokens begin, and the end of the last."""
    token_offset_N1: NDArray[np.int64]
    """Where each leaf's response tokens begin, and the end of the last."""
    reward_N: NDArray[np.float64] | None = None
    """NaN is unknown; None: no loss reads them."""
    group_N: NDArray[np.int64] | None = None
    """The question of each leaf; None: no loss reads it."""
    columns: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    """More numbers for each response token, by the names that a loss knows them by."""

    def __len__(self) -> int:
        return len(self.input_offset_N1) - 1

    @property
    def leaf_T(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self)), np.diff(self.token_offset_N1))

    def take(self, leaf_N: NDArray[np.int64]) -> TokenBatch:
        """The batch of these leaves, in the given order."""
        row_I = gather(self.input_offset_N1, leaf_N)
        row_T = gather(self.token_offset_N1, leaf_N)
        rows = {"I": row_I, "T": row_T, "N": leaf_N}
        taken: dict[str, Any] = {}
        for of in fields(self):
            axis, value = of.name.rpartition("_")[2], getattr(self, of.name)
            if axis in rows and value is not None:
                taken[of.name] = value[rows[axis]]
        return TokenBatch(
            **taken,
            columns={name: value_T[row_T] for name, value_T in self.columns.items()},
            input_offset_N1=offsets(np.diff(self.input_offset_N1)[leaf_N]),
            token_offset_N1=offsets(np.diff(self.token_offset_N1)[leaf_N]),
        )


def offsets(length_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of consecutive spans begins, and the end of the last."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(length_N, dtype=np.int64)])


def gather(offset_N1: NDArray[np.int64], leaf_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row numbers of the given leaves' spans, one after the other."""
    length_N = np.diff(offset_N1)[leaf_N]
    shift_N = offset_N1[leaf_N] - offsets(length_N)[:-1]
    return np.arange(int(length_N.sum())) + np.repeat(shift_N, length_N)


def pack(
    rows: _core.tree.PackedRows,
    advantage_T: NDArray[np.float64],
    reward_N: NDArray[np.float64] | None = None,
    train_T: NDArray[np.bool_] | None = None,
) -> TokenBatch:
    """Join the forest's flat rows (`pack_flat`) with one advantage per response token.

    `train_T` are the tokens that train; None: all but forced ones.
    """
    if len(advantage_T) != len(rows.label_T):
        raise ValueError(f"pack: expected {len(rows.label_T)} advantages, got {len(advantage_T)}")
    leaves = len(rows.cu_seqlens) - 1
    return TokenBatch(
        input_I=rows.input_I,
        label_T=rows.label_T,
        old_logprob_T=rows.logprob_T,
        entropy_T=rows.entropy_T,
        confidence_T=rows.confidence_T,
        mask_T=~rows.forced_T if train_T is None else train_T,
        advantage_T=advantage_T,
        input_offset_N1=rows.cu_seqlens.astype(np.int64),
        token_offset_N1=offsets(np.bincount(rows.leaf_T, minlength=leaves)),
        reward_N=reward_N,
    )


def joined(first: TokenBatch, second: TokenBatch) -> TokenBatch:
    """The leaves of both, which have the same columns, in this order."""
    parts: dict[str, Any] = {}
    for of in fields(first):
        before, after = (vars(batch)[of.name] for batch in (first, second))
        axis = of.name.rpartition("_")[2]
        if axis == "N1":
            parts[of.name] = np.concatenate([before, before[-1] + after[1:]])
        elif axis in ("I", "T", "N") and before is not None:
            parts[of.name] = np.concatenate([before, after])
    columns = {
        name: np.concatenate([column_T, second.columns[name]])
        for name, column_T in first.columns.items()
    }
    return TokenBatch(**parts, columns=columns)


def pack_given(
    prompts: Sequence[NDArray[np.int32]],
    responses: Sequence[NDArray[np.int64]],
    *,
    advantage_T: NDArray[np.float64] | None = None,
    logprob_T: NDArray[np.float32] | None = None,
) -> TokenBatch:
    """Responses of any origin [N], each after its prompt [N].

    With an advantage for each of their tokens, one response after the other, they are there to
    learn from; `logprob_T` then are those of the policy that sampled them. Otherwise they are only
    read. ValueError where there are not as many as tokens.
    """
    length_N = np.array([len(response) for response in responses])
    row_N = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
    nothing_T = np.zeros(int(length_N.sum()), np.float32)
    for name, given in (("advantage_T", advantage_T), ("logprob_T", logprob_T)):
        if given is not None and given.shape != nothing_T.shape:
            raise ValueError(
                f"pack_given: {name}: expected a number for each of {nothing_T.size} response "
                f"tokens, got {list(given.shape)}"
            )
    return TokenBatch(
        input_I=np.concatenate(row_N).astype(np.int64),
        label_T=np.concatenate(responses),
        old_logprob_T=nothing_T if logprob_T is None else logprob_T,
        entropy_T=nothing_T,
        confidence_T=nothing_T,
        mask_T=np.full(nothing_T.size, advantage_T is not None),
        advantage_T=nothing_T.astype(np.float64) if advantage_T is None else advantage_T,
        input_offset_N1=offsets(np.array([len(row) for row in row_N])),
        token_offset_N1=offsets(length_N),
    )
