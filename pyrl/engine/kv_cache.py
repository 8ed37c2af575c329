"""Keys and values of the running batch in slots, and of paths that wait outside of it.

The cache also holds the final hidden state of every position: with it a fork at any earlier token
draws from the output embeddings alone, and no token is computed twice. A transformers decoder takes
`Prefill` and `SlotCache` for its `past_key_values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyrl.attention import Layout

Prefix = Sequence[Tensor]
"""What the model has computed for the first T tokens of a path; token t lies at position t.

The keys of each layer `[kv_heads, T, head_dim]`, then the values of each layer, then the final
hidden states `[T, hidden_size]`, the inputs of the output embeddings.
"""


def part(prefix: Prefix, start: int, end: int) -> Prefix:
    """A view of some positions."""
    return [tensor[..., start:end, :] for tensor in prefix]


def detached(prefix: Prefix) -> Prefix:
    """A copy that keeps no larger tensor alive."""
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in prefix]


class Prefill:
    """Keeps keys and values of one forward over packed prompts, `[1, I]`."""

    def __init__(self) -> None:
        self._key: list[Tensor] = []
        self._value: list[Tensor] = []

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx != len(self._key):
            raise ValueError(f"expected layer {len(self._key)} to attend next, got {layer_idx}")
        self._key.append(key)
        self._value.append(value)
        return key, value

    def prefixes(self, hidden: Tensor, cu_seqlens: Sequence[int]) -> list[Prefix]:
        """One prefix per prompt, from the final hidden states `[1, I, hidden_size]`."""
        packed = [tensor[0] for tensor in (*self._key, *self._value, hidden)]
        return [detached(part(packed, start, end)) for start, end in pairwise(cu_seqlens)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def prefill(decoder: nn.Module, token_I: Tensor, cu_seqlens: Sequence[int]) -> list[Prefix]:
    """Compute packed prompts, whose offsets are `cu_seqlens`; one prefix each."""
    cache, layout = Prefill(), Layout.of_rows(np.diff(cu_seqlens))
    hidden = decoder(
        input_ids=token_I[None],
        position_ids=torch.from_numpy(layout.position_J).to(token_I.device)[None],
        past_key_values=cache,
        use_cache=True,
        layout=layout,
    ).last_hidden_state
    return cache.prefixes(hidden, cu_seqlens)


class SlotCache:
    """The running batch: row b lies in slot b, rows are compact.

    Storage is `[slots, kv_heads, capacity, head_dim]` per layer, so that decoding reads views. Both
    axes grow by doubling, slots to `max_slots` at most.
    """

    def __init__(self, max_slots: int) -> None:
        self._max_slots = max_slots
        self._length_B = np.zeros(max_slots, np.int64)
        self._rows = 0
        self._stores: list[Tensor] = []  # a prefix with an axis of slots in front
        self._key_length = 0
        self._newest: tuple[Tensor, Tensor] | None = None  # slots and positions being computed

    def length(self, slot: int) -> int:
        return int(self._length_B[slot])

    def insert(self, prefix: Prefix, count: int) -> int:
        """Append `count` rows that start as copies of `prefix`; returns the first slot."""
        length = prefix[-1].shape[0]
        first, end = self._rows, self._rows + count
        if not self._stores:
            self._stores = [t.new_empty(0, *t.shape[:-2], 0, t.shape[-1]) for t in prefix]
        self._reserve(end, length)
        for store, source in zip(self._stores, prefix, strict=True):
            store[first:end, ..., :length, :] = source
        self._length_B[first:end] = length
        self._rows = end
        return first

    def view(self, slot: int, length: int) -> Prefix:
        """The first `length` positions of a row, valid until the row leaves."""
        return [store[slot, ..., :length, :] for store in self._stores]

    def remove(self, slot: int) -> None:
        """Drop a row; the last row moves into its slot."""
        last = self._rows - 1
        if slot != last:
            length = self.length(last)
            for store in self._stores:
                store[slot, ..., :length, :] = store[last, ..., :length, :]
            self._length_B[slot] = length
        self._rows = last

    def begin_token(self) -> tuple[Tensor, Tensor | None]:
        """Make room for one more token in every row.

        Returns its position `[B, 1]` and the boolean mask of keys `[B, 1, 1, K]`, None where all
        rows are equally long.
        """
        length_B = self._length_B[: self._rows]
        shortest, longest = int(length_B.min()), int(length_B.max())
        self._key_length = longest + 1
        self._reserve(self._rows, self._key_length)
        device = self._stores[-1].device
        position_B = torch.from_numpy(length_B.copy()).to(device)
        self._newest = torch.arange(self._rows, device=device), position_B
        if shortest == longest:
            return position_B[:, None], None
        mask = torch.arange(self._key_length, device=device) <= position_B[:, None]
        return position_B[:, None], mask[:, None, None]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new token's `[B, kv_heads, 1, head_dim]`; returns views of all tokens."""
        layers = len(self._stores) // 2
        key_store, value_store = self._stores[layer_idx], self._stores[layers + layer_idx]
        slot_B, position_B = self._token()
        key_store[slot_B, :, position_B] = key[:, :, 0]
        value_store[slot_B, :, position_B] = value[:, :, 0]
        seen = (slice(self._rows), slice(None), slice(self._key_length))
        return key_store[seen], value_store[seen]

    def decode(self, decoder: nn.Module, token_B: Tensor) -> None:
        """Compute one more token in every row, and keep its final hidden states."""
        position_B1, mask = self.begin_token()
        hidden = decoder(
            input_ids=token_B[:, None].to(position_B1.device),
            position_ids=position_B1,
            attention_mask=mask,
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state
        self.end_token(hidden[:, 0])

    def end_token(self, hidden: Tensor) -> None:
        """Store the new token's final hidden states `[B, hidden_size]`."""
        self._stores[-1][self._token()] = hidden
        self._length_B[: self._rows] += 1
        self._newest = None

    def last_hidden(self, slot_B: NDArray[np.int64]) -> Tensor:
        """Final hidden states `[B, hidden_size]` at the last position of some rows."""
        hidden = self._stores[-1]
        last_B = torch.from_numpy(self._length_B[slot_B] - 1)
        return hidden[torch.from_numpy(slot_B).to(hidden.device), last_B.to(hidden.device)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._key_length - 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._key_length - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._key_length, 0

    def _token(self) -> tuple[Tensor, Tensor]:
        if self._newest is None:
            raise RuntimeError("begin_token must come first")
        return self._newest

    def _reserve(self, slots: int, length: int) -> None:
        if slots > self._max_slots:
            raise RuntimeError(f"expected at most {self._max_slots} rows, got {slots}")
        had_slots, had_length, _ = self._stores[-1].shape
        if slots <= had_slots and length <= had_length:
            return
        slots = had_slots if slots <= had_slots else min(max(slots, 2 * had_slots), self._max_slots)
        length = had_length if length <= had_length else max(length, 2 * had_length)
        for i, old in enumerate(self._stores):
            # Zeros, since a masked key still enters the weighted sum, with weight 0.
            new = old.new_zeros(slots, *old.shape[1:-2], length, old.shape[-1])
            new[: self._rows, ..., :had_length, :] = old[: self._rows]
            self._stores[i] = new  # one by one: two whole caches never exist together
