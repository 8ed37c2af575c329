"""Flex: attention of a packed row of trees in one kernel, on devices that compile FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pyrl._core.tree import block_mask
from pyrl.attention.layout import Layout

BLOCK = 128
"""Tokens on a side of the kernel's blocks."""

FEW = 4
"""Parts of a row up to which a call for each costs less than the kernel's blocks."""


def use_flex(layout: Layout, window: int | None, query: Tensor) -> bool:
    """Whether the device compiles FlexAttention and the row is more than a few parts."""
    return (
        query.is_cuda
        and query.dtype != torch.float64
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and len(layout.parts(window, query.device)) > FEW
    )


def flex_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """The pairs that see each other, straight from the layout's intervals.

    With a window every block that a tree would see is masked pair by pair.
    """
    blocks = block_mask(layout.end_J, BLOCK)
    count = len(blocks.partial_count_B)
    partial_BB, full_BB = (x.reshape(count, count) for x in (blocks.partial_BB, blocks.full_BB))
    partial_B, full_B = blocks.partial_count_B, blocks.full_count_B
    if window is not None:
        rows = [
            np.sort(np.concatenate([p[:m], f[:n]]))
            for p, m, f, n in zip(partial_BB, partial_B, full_BB, full_B, strict=True)
        ]
        partial_BB, partial_B = np.zeros_like(partial_BB), partial_B + full_B
        for b, row in enumerate(rows):
            partial_BB[b, : len(row)] = row
        full_B = np.zeros_like(full_B)
    end_J = torch.from_numpy(layout.end_J).to(device)
    position_J = torch.from_numpy(layout.position_J).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < end_J[key])
        return seen if window is None else seen & (position_J[query] - position_J[key] < window)

    def on_device(values: Any) -> Tensor:
        return torch.from_numpy(values).to(device)[None, None]

    return BlockMask.from_kv_blocks(
        on_device(partial_B),
        on_device(partial_BB),
        on_device(full_B),
        on_device(full_BB),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(len(layout), len(layout)),
    )


@cache
def compiled() -> Callable[..., Tensor]:
    """The kernel, compiled once for rows of any length."""
    return torch.compile(flex_attention, dynamic=True)
