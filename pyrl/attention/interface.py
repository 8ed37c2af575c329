"""How the model attends: one function for the sampler and the learner, on the same model object.

Rows are never padded. Training rows and prompts are packed, `[1, J]` with a `Layout`; decoding has
one query per row against the slot cache; equal-length rows need neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from pyrl.attention.flex import compiled, flex_mask, use_flex
from pyrl.attention.layout import Layout, Run

NAME = "pyrl"

_CAUSAL_LAYERS = {"full_attention", "sliding_attention"}


def use_pyrl_attention(model: PreTrainedModel) -> None:
    """Let `model` attend through `pyrl_attention`, in training and in sampling.

    Pass a `layout` to the model's forward for packed rows, with its positions as `position_ids`.
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
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Within, `model` attends through `pyrl_attention`, and afterwards as before.

    A backward pass that computes layers again (gradient checkpointing) belongs inside as well.
    ValueError as of `use_pyrl_attention`.
    """
    before = model.config.get_text_config()._attn_implementation
    use_pyrl_attention(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
    layout: Layout | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention of `[B, heads, T, head_dim]` queries; returns `[B, T, heads, head_dim]`.

    Keys and values may have fewer heads; they are never repeated in memory. The mask is boolean
    `[B, 1, 1, K]`, True where a decoding row has a key. With a sliding window a query sees the
    keys fewer than that many tokens above it. ValueError for logit soft-capping, attention sinks
    and position biases.
    """
    for name, found in (("softcap", softcap), ("sinks", s_aux), ("position_bias", position_bias)):
        if found is not None:
            raise ValueError(f"attention with {name} is not supported, found in {type(module)}")
    attend = partial(
        F.scaled_dot_product_attention,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if layout is not None:
        _check_layout(layout, query, key)
        if use_flex(layout, sliding_window, query):
            device = query.device
            make = partial(flex_mask, layout, sliding_window, device)
            mask = layout.keep(("flex", sliding_window, device), make)
            gqa = query.shape[1] != key.shape[1]
            out = compiled()(query, key, value, scale=scaling, block_mask=mask, enable_gqa=gqa)
            return out.transpose(1, 2), None
        return _packed(attend, query, key, value, layout, sliding_window), None
    if query.shape[2] == 1:
        return _decode(attend, query, key, value, attention_mask, sliding_window), None
    if attention_mask is not None:
        raise ValueError("positions start anew within a row: pass a layout for packed rows")
    tokens = query.shape[2]
    if tokens != key.shape[2]:
        raise ValueError(f"expected as many queries as keys, got {query.shape} and {key.shape}")
    if sliding_window is None or tokens <= sliding_window:
        out = attend(query, key, value, is_causal=True)
    else:
        band = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        out = attend(query, key, value, attn_mask=band.triu(1 - sliding_window))
    return out.transpose(1, 2), None


def _check_layout(layout: Layout, query: Tensor, key: Tensor) -> None:
    if query.shape[0] != 1 or query.shape[2] != len(layout) or key.shape[2] != len(layout):
        raise ValueError(
            f"layout: expected one row of {len(layout)} queries and keys, got queries "
            f"{tuple(query.shape)}, keys {tuple(key.shape)}"
        )


def _decode(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int | None,
) -> Tensor:
    rows, heads, _, head_dim = query.shape
    if window is not None and key.shape[2] > window:
        if mask is None:
            key, value = key[:, :, -window:], value[:, :, -window:]
        else:
            ordinal_K = torch.arange(key.shape[2], device=key.device)
            mask = mask & (ordinal_K >= mask.sum(-1, keepdim=True) - window)
    # The query heads that share a key head stand in for query positions: no copies of keys.
    grouped = query.reshape(rows, key.shape[1], -1, head_dim)
    out = attend(grouped, key, value, attn_mask=mask)
    return out.reshape(rows, 1, heads, value.shape[3])


def _packed(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: int | None,
) -> Tensor:
    outs = []
    for part in layout.parts(window, query.device):
        if isinstance(part, Run):
            run = slice(part.start, part.start + part.count * part.length)
            batch = (
                x[0, :, run].reshape(x.shape[1], part.count, part.length, -1).transpose(0, 1)
                for x in (query, key, value)
            )
            out = attend(*batch, is_causal=True).transpose(1, 2).flatten(0, 1)
        else:
            seen = (x[:, :, part.key] for x in (key, value))
            out = attend(query[:, :, part.query], *seen, attn_mask=part.mask)[0].transpose(0, 1)
        outs.append(out)
    return torch.cat(outs)[None]


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
    only along with a layout. ValueError for padding and for models with masks of their own.
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
