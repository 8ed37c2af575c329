"""Rows as a tree, against the prefixes that they have in common, written out one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tree.test_pack import grown

from pyrl._core.tree import PackedTree, block_mask, pack_flat, pack_rows, pack_tree
from pyrl.forest import Forest, StaleHandleError
from pyrl.pack import offsets

Prefix = tuple[int, ...]

ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 9)),
    min_size=1,
    max_size=9,
)
"""Rows of three letters, with the length that a prompt would like to have."""


def packed(rows: list[list[int]], prompt_N: list[int]) -> PackedTree:
    token_I = np.array([token for row in rows for token in row], np.int64)
    return pack_rows(
        token_I, offsets(np.array([len(row) for row in rows])), np.array(prompt_N, np.int64)
    )


def end_of_inputs(tree: PackedTree) -> NDArray[np.int64]:
    """One past the last input below each, by the segment that holds it."""
    end_J = np.zeros(len(tree.input_J), np.int64)
    for begin, end in zip(tree.begin_S, tree.end_S, strict=True):
        end_J[begin:end] = end  # inner segments come later and write over
    return end_J


def prefixes(tree: PackedTree) -> list[Prefix]:
    """The tokens that each input sees, itself included, by the rule of attention."""
    end_J = end_of_inputs(tree)
    seen = [[k for k in range(q + 1) if q < end_J[k]] for q in range(len(end_J))]
    return [tuple(tree.input_J[k].item() for k in keys) for keys in seen]


def check(tree: PackedTree, rows: list[list[int]], prompt_N: list[int]) -> None:
    """Each prefix once, each response token once, and the way from rows to them."""
    inner = {tuple(row[:end]) for row in rows for end in range(1, len(row))}
    found = prefixes(tree)
    assert len(found) == len(inner)
    assert set(found) == inner
    assert tree.position_J.tolist() == [len(prefix) - 1 for prefix in found]
    responses = [
        tuple(row[:end])
        for row, prompt in zip(rows, prompt_N, strict=True)
        for end in range(prompt + 1, len(row) + 1)
    ]
    of_U = [
        (*found[p], label) for p, label in zip(tree.predictor_U, tree.label_U.tolist(), strict=True)
    ]
    assert len(set(of_U)) == len(of_U) == len(set(responses))
    assert [of_U[u] for u in tree.unique_T] == responses


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_each_prefix_is_an_input_once_and_each_response_token_has_its_prefix(drawn: Any) -> None:
    rows = [row for row, _ in drawn]
    prompt_N = [min(prompt, len(row)) for row, prompt in drawn]
    tree = packed(rows, prompt_N)
    check(tree, rows, prompt_N)
    order = tree.order_N.tolist()
    assert sorted(order) == list(range(len(rows)))
    before: set[Prefix] = set()
    for n in order:
        own = {tuple(rows[n][: end + 1]) for end in range(len(rows[n]))}
        assert tree.added_N[n] == len(own - before)
        before |= own


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_any_part_of_the_rows_in_their_order_adds_up(drawn: Any) -> None:
    rows = [row for row, _ in drawn]
    tree = packed(rows, [1] * len(rows))
    for start in range(len(rows)):
        for stop in range(start + 1, len(rows) + 1):
            part = [rows[n] for n in tree.order_N[start:stop]]
            tokens = len({tuple(row[: end + 1]) for row in part for end in range(len(row))})
            added = tree.added_N[tree.order_N[start + 1 : stop]].sum()
            assert tokens == len(rows[tree.order_N[start]]) + added


def test_rows_that_share_nothing_stand_as_they_came_and_labels_alone_are_no_inputs() -> None:
    tree = packed([[5, 6, 7], [1, 2], [9, 3, 3, 3]], [2, 1, 4])
    assert tree.input_J.tolist() == [5, 6, 1, 9, 3, 3]
    assert tree.begin_S.tolist() == [0, 2, 3]
    assert tree.end_S.tolist() == [2, 3, 6]
    assert tree.parent_S.tolist() == [-1, -1, -1]
    assert tree.predictor_U.tolist() == [1, 2]
    assert tree.label_U.tolist() == [7, 2]
    assert tree.unique_T.tolist() == [0, 1]
    assert tree.order_N.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(8))
def test_a_forest_gives_the_tree_of_its_rows(seed: int) -> None:
    forest = grown(12, seed)
    leaf_N = np.random.default_rng(seed).permutation(forest.leaves())[:10]
    tree, flat = pack_tree(forest, leaf_N), pack_flat(forest, leaf_N)
    prompt_N = [len(forest.prompt(t)) for t in forest.leaf_table(leaf_N).tree_N]
    found = prefixes(tree)
    of_U = [(*found[p], y) for p, y in zip(tree.predictor_U, tree.label_U.tolist(), strict=True)]
    rows = np.split(flat.input_I, flat.cu_seqlens[1:-1])
    responses = [
        tuple(row[:end].tolist())
        for row, prompt in zip(rows, prompt_N, strict=True)
        for end in range(prompt + 1, len(row) + 1)
    ]
    assert [of_U[u] for u in tree.unique_T] == responses
    assert tree.position_J.tolist() == [len(prefix) - 1 for prefix in found]
    # Each place of the tree once: a forest may hold the same tokens twice, where rows meet again.
    table = forest.segments(leaf_N)
    assert len(tree.label_U) == table.length_S[table.parent_S >= 0].sum()
    assert sorted(tree.order_N.tolist()) == list(range(10))


def test_a_branch_that_is_the_start_of_another_and_one_without_tokens() -> None:
    forest = Forest()
    trunk = forest.add_trunk(forest.add_tree(np.array([7, 8], np.int32)), 1)
    for token in (1, 2, 3):
        zero = np.zeros(1, np.float32)
        forest.append(np.array([trunk]), np.array([token], np.int32), zero, zero, zero)
    short, empty = (
        forest.fork(trunk, 2, np.array([5], np.uint64))[0],
        forest.fork(trunk, 0, np.array([6], np.uint64))[0],
    )
    tree = pack_tree(forest, np.array([trunk, short, empty]))
    assert tree.input_J.tolist() == [7, 8, 1, 2]
    assert tree.predictor_U.tolist() == [1, 2, 3]
    assert tree.label_U.tolist() == [1, 2, 3]
    assert tree.unique_T.tolist() == [0, 1, 2, 0, 1]
    alone = pack_tree(forest, np.array([empty]))
    assert alone.input_J.tolist() == [7]
    assert len(alone.label_U) == len(alone.unique_T) == 0


def test_nothing_gives_nothing() -> None:
    for tree in (packed([], []), pack_tree(Forest(), np.zeros(0, np.int64))):
        assert (
            len(tree.input_J) == len(tree.begin_S) == len(tree.unique_T) == len(tree.order_N) == 0
        )


def test_bad_rows_are_named() -> None:
    one = np.array([3, 4], np.int64)
    with pytest.raises(ValueError, match=r"expected 2 offsets, one more than prompts, got 3"):
        pack_rows(one, np.array([0, 1, 2]), np.array([1]))
    with pytest.raises(ValueError, match=r"expected offsets from 0 to 2, got 0 and 1"):
        pack_rows(one, np.array([0, 1]), np.array([1]))
    with pytest.raises(ValueError, match=r"expected a prompt of 1 to 2 tokens, .* row 0, got 0"):
        pack_rows(one, np.array([0, 2]), np.array([0]))
    with pytest.raises(ValueError, match=r"expected a prompt of 1 to 2 tokens, .* row 0, got 3"):
        pack_rows(one, np.array([0, 2]), np.array([3]))
    with pytest.raises(ValueError, match=r"expected token ids from 0 to 2\^31 - 1, got -1 at 1"):
        pack_rows(np.array([3, -1]), np.array([0, 2]), np.array([1]))
    forest = grown(3, 2)
    leaf_N = forest.leaves()
    with pytest.raises(ValueError, match=f"expected distinct leaves, got {leaf_N[0]} twice"):
        pack_tree(forest, leaf_N[[0, 1, 0]])
    forest.prune(int(leaf_N[0]), 1)
    with pytest.raises(StaleHandleError):
        pack_tree(forest, leaf_N)


def torch_blocks(end_J: NDArray[np.int64], block: int) -> tuple[Any, Any, list[Any], list[Any]]:
    """Counts and indices by `create_block_mask`, which looks at every pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    end = torch.from_numpy(end_J)

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q < end[k])

    tokens = len(end_J)
    mask = create_block_mask(sees, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)
    partial, full = mask.kv_num_blocks[0, 0], mask.full_kv_num_blocks[0, 0]
    rows = range(len(partial))
    return (
        partial.tolist(),
        full.tolist(),
        [mask.kv_indices[0, 0, r, : partial[r]].tolist() for r in rows],
        [mask.full_kv_indices[0, 0, r, : full[r]].tolist() for r in rows],
    )


@pytest.mark.parametrize(("tokens", "block"), [(1, 2), (64, 8), (61, 8), (40, 16), (7, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_those_that_torch_finds_pair_by_pair(tokens: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 2, rng.integers(1, 40)).tolist() for _ in range(30)]
    tree = packed([[9, *row, 3] for row in rows], [1] * 30)
    end_J = np.minimum(end_of_inputs(tree)[:tokens], tokens)
    mask = block_mask(end_J, block)
    blocks = len(mask.partial_count_B)
    assert blocks == -(-tokens // block)
    partial_BB, full_BB = mask.partial_BB.reshape(blocks, -1), mask.full_BB.reshape(blocks, -1)
    assert (
        mask.partial_count_B.tolist(),
        mask.full_count_B.tolist(),
        [row[:n].tolist() for row, n in zip(partial_BB, mask.partial_count_B, strict=True)],
        [row[:n].tolist() for row, n in zip(full_BB, mask.full_count_B, strict=True)],
    ) == torch_blocks(end_J, block)


def test_a_bad_end_is_named() -> None:
    with pytest.raises(ValueError, match="expected an end from 2 to 2 for token 1, got 1"):
        block_mask(np.array([2, 1]), 128)
    with pytest.raises(ValueError, match="expected blocks of at least 2 tokens, got 1"):
        block_mask(np.array([2, 2]), 1)
