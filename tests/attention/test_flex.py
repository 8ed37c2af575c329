"""FlexAttention's blocks from intervals: torch's own, and the attention of the other way."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pyrl._core.tree import pack_rows
from pyrl.attention import Layout, flex, interface
from pyrl.pack import offsets


def some_tree(tokens: int, seed: int) -> Layout:
    rng = np.random.default_rng(seed)
    rows = [np.append(np.arange(40), rng.integers(0, 2, rng.integers(1, 30))) for _ in range(30)]
    tree = pack_rows(np.concatenate(rows), offsets(np.array(list(map(len, rows)))), np.full(30, 5))
    assert len(tree.input_J) >= tokens
    return Layout.of_tree(tree)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_sees_what_the_other_way_sees(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eager mode, which reads the mask alone; forward, since a CPU has no backward for it."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    layout = some_tree(100, 0)
    torch.manual_seed(0)
    query = torch.randn(1, 6, len(layout), 16, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, len(layout), 16, dtype=torch.float64)
    mask = flex.flex_mask(layout, window, torch.device("cpu"))
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
    torch.testing.assert_close(
        flex_attention(query, key, value, block_mask=mask, enable_gqa=True).transpose(1, 2),
        interface._packed(attend, query, key, value, layout, window),
    )


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_those_of_create_block_mask_and_a_window_only_masks_more(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "BLOCK", 16)
    layout = some_tree(100, seed)
    J = len(layout)
    ours = flex.flex_mask(layout, None, torch.device("cpu"))
    theirs = create_block_mask(ours.mask_mod, None, None, J, J, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.q_num_blocks, theirs.q_num_blocks)
    assert torch.equal(ours.full_q_num_blocks, theirs.full_q_num_blocks)
    assert int(ours.full_kv_num_blocks.sum()) > 0
    windowed = flex.flex_mask(layout, 4, torch.device("cpu"))
    assert int(windowed.full_kv_num_blocks.sum()) == 0
    assert torch.equal(windowed.to_dense(), theirs.to_dense())
