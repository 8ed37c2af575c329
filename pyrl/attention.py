"""How the model attends: one function for the sampler and the learner, on the same model object.

Rows are never padded. Training rows and prompts are packed, `[1, I]` with `cu_seq_lens_q`; decoding
has one query per row against the slot cache; equal-length rows need neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

NAME = "pyrl"

_CAUSAL_LAYERS = {"full_attention", "sliding_attention"}


def use_pyrl_attention(model: PreTrainedModel) -> None:
    """Let `model` attend through `pyrl_attention`, in training and in sampling.

    Pass `cu_seq_lens_q` (int, [N+1], best on the CPU: it is read by the host in each layer) to the
    model's forward for packed rows, with `position_ids` that start at 0 in each sequence.
    ValueError for a model that attends in a way that the function does not have.
    """
    # Configurations differ in their fields by design: absent means that the model lacks the thing.
    config = model.config.get_text_config().to_dict()
    if model._is_stateful:
        raise ValueError(
            f"expected a model whose layers all attend, {type(model).__name__} has layers with a "
            "state that runs along a text"
        )
    unknown = set(config.get("layer_types") or ()) - _CAUSAL_LAYERS
    if unknown:
        raise ValueError(
            f"expected layers of type {sorted(_CAUSAL_LAYERS)}, "
            f"{type(model).__name__} has {sorted(unknown)}"
        )
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise ValueError(
            f"expected a model that calls transformers' AttentionInterface, "
            f"{type(model).__name__} does not"
        )


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within, `model` attends as its own code says."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def pyrl_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention of `[B, heads, T, head_dim]` queries; returns `[B, T, heads, head_dim]`.

    Keys and values may have fewer heads; they are never repeated in memory. The mask is boolean
    `[B, 1, 1, K]`, True where a decoding row has a key. ValueError for logit soft-capping,
    attention sinks, position biases, and a sliding window that some sequence exceeds.
    """
    for name, found in (("softcap", softcap), ("sinks", s_aux), ("position_bias", position_bias)):
        if found is not None:
            raise ValueError(f"attention with {name} is not supported, found in {type(module)}")
    sdpa = _Attend(scaling, dropout, sliding_window)
    if cu_seq_lens_q is not None:
        return _packed(sdpa, query, key, value, cu_seq_lens_q.tolist()), None
    if query.shape[2] == 1:
        return _decode(sdpa, query, key, value, attention_mask), None
    if attention_mask is not None:
        raise ValueError("positions start anew within a row: pass cu_seq_lens_q for packed rows")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"expected as many queries as keys, got {query.shape} and {key.shape}")
    return sdpa.causal(query, key, value).transpose(1, 2), None


class _Attend:
    """Scaled dot products with the settings of one layer."""

    def __init__(self, scaling: float | None, dropout: float, window: int | None) -> None:
        self._scaling, self._dropout, self._window = scaling, dropout, window

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gqa = query.shape[1] != key.shape[1]
        return self._sdpa(query, key, value, is_causal=True, enable_gqa=gqa)

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self._sdpa(query, key, value, attn_mask=mask)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        if self._window is not None and key.shape[2] > self._window:
            raise ValueError(
                f"sequences of up to {key.shape[2]} tokens exceed the sliding window of "
                f"{self._window}: shorten them, windows are not supported"
            )
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=self._dropout, scale=self._scaling, **how
        )


def _decode(
    sdpa: _Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    rows, heads, _, head_dim = query.shape
    # The query heads that share a key head stand in for query positions: no copies of keys.
    grouped = query.reshape(rows, key.shape[1], -1, head_dim)
    return sdpa.masked(grouped, key, value, mask).reshape(rows, 1, heads, value.shape[3])


def _packed(
    sdpa: _Attend, query: Tensor, key: Tensor, value: Tensor, offsets: Sequence[int]
) -> Tensor:
    tokens = query.shape[2]
    if query.shape[0] != 1 or key.shape[2] != tokens or offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(
            f"cu_seq_lens_q: expected one row of {offsets[-1]} queries and keys from offset 0, "
            f"got queries {tuple(query.shape)}, keys {tuple(key.shape)}, first offset {offsets[0]}"
        )
    parts = []
    for start, count, length in _runs(offsets):
        run = slice(start, start + count * length)
        batch = (x[0, :, run].reshape(x.shape[1], count, length, -1) for x in (query, key, value))
        out = sdpa.causal(*(x.transpose(0, 1) for x in batch))
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def _runs(offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    """Start, count and length of each run of neighbours of equal length: one batch each."""
    runs: list[tuple[int, int, int]] = []
    for start, end in pairwise(offsets):
        length = end - start
        if runs and runs[-1][2] == length:
            first, count, _ = runs[-1]
            runs[-1] = (first, count + 1, length)
        elif length:
            runs.append((start, 1, length))
    return runs


def pyrl_attention_mask(
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **unused: Any,
) -> Tensor | None:
    """No mask is built: causality and packing are structural, padding does not occur.

    Returns a one-element mark if positions start anew within a row, which `pyrl_attention` accepts
    only along with `cu_seq_lens_q`. ValueError for padding and for models with masks of their own.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask: expected no padding (all ones); pack unequal rows instead"
        )
    if use_vmap:
        raise ValueError("models that add a mask of their own to the causal one are not supported")
    packed = local_size is None and mask_function is not causal_mask_function
    return torch.ones(1, 1, 1, 1, dtype=torch.bool) if packed else None


AttentionInterface.register(NAME, pyrl_attention)
AttentionMaskInterface.register(NAME, pyrl_attention_mask)
