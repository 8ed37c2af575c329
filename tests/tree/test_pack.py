"""Flat rows against the paths that they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from pyrl._core.tree import pack_flat
from pyrl.forest import Forest, StaleHandleError


def grown(leaves: int, seed: int) -> Forest:
    """Two trees with random forks and lengths, 0 among them; all branches are finished."""
    rng, forest = np.random.default_rng(seed), Forest()
    for prompt in ([3, 4, 5], [6]):
        forest.add_trunk(forest.add_tree(np.array(prompt, np.int32)), 1)
    for step in range(leaves):
        branch_B = forest.open()
        for _ in range(int(rng.integers(0, 70))):
            B = len(branch_B)
            column_3B = rng.random((3, B)).astype(np.float32)
            token_B, forced_B = rng.integers(0, 9, B).astype(np.int32), rng.random(B) < 0.2
            forest.append(branch_B, token_B, *column_3B, version=step, forced=forced_B)
        source = int(rng.choice(branch_B))
        at = int(rng.integers(0, forest.length(source) + 1))
        forest.fork(source, at, np.array([step], np.uint64))
    branch_B = forest.open()
    forest.finish(branch_B, np.ones(len(branch_B), np.uint8))
    return forest


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_the_prompt_and_path_of_each_leaf_in_the_order_given(seed: int) -> None:
    forest = grown(12, seed)
    leaf_N = np.random.default_rng(seed).permutation(forest.leaves())[:10]
    rows = pack_flat(forest, leaf_N)
    table, paths = forest.leaf_table(leaf_N), [forest.path(leaf) for leaf in leaf_N]
    prompts = [forest.prompt(tree) for tree in table.tree_N]
    inputs = [np.concatenate([p, t.tokens]) for p, t in zip(prompts, paths, strict=True)]
    assert rows.input_I.tolist() == np.concatenate(inputs).tolist()
    assert rows.position_I.tolist() == [i for row in inputs for i in range(len(row))]
    assert rows.cu_seqlens.tolist() == np.cumsum([0, *map(len, inputs)]).tolist()
    assert rows.leaf_T.tolist() == np.repeat(np.arange(10), table.length_N).tolist()
    for column_T, name in (
        (rows.label_T, "tokens"),
        (rows.logprob_T, "logprob"),
        (rows.entropy_T, "entropy"),
        (rows.confidence_T, "confidence"),
        (rows.forced_T, "forced"),
    ):
        assert column_T.tolist() == np.concatenate([getattr(p, name) for p in paths]).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_segments_of_tokens_follow_the_tree_of_these_leaves(seed: int) -> None:
    forest = grown(12, seed)
    leaf_N = forest.leaves()[::2]
    rows, segments = pack_flat(forest, leaf_N), forest.segments(leaf_N)
    for n in range(len(leaf_N)):
        entries = slice(*segments.entry_offset_N1[n : n + 2])
        own = np.repeat(segments.entry_segment_E[entries], segments.entry_length_E[entries])
        assert rows.segment_T[rows.leaf_T == n].tolist() == own.tolist()


def test_shared_tokens_occur_once_per_leaf_with_equal_numbers() -> None:
    forest = grown(10, 0)
    rows = pack_flat(forest, forest.leaves(0))
    first_T = np.searchsorted(rows.leaf_T, rows.leaf_T)
    key_T = rows.segment_T * 10**6 + np.arange(len(rows.label_T)) - first_T
    for key in np.unique(key_T):
        same = key_T == key
        assert len(np.unique(rows.logprob_T[same])) == len(np.unique(rows.label_T[same])) == 1


def test_no_leaf_gives_no_row_and_an_empty_response_no_token() -> None:
    forest = Forest()
    nothing = pack_flat(forest, forest.leaves())
    assert nothing.cu_seqlens.tolist() == [0]
    assert len(nothing.input_I) == len(nothing.label_T) == 0
    leaf = forest.add_trunk(forest.add_tree(np.array([7, 8], np.int32)), 1)
    empty = pack_flat(forest, np.array([leaf]))
    assert empty.input_I.tolist() == [7, 8]
    assert empty.cu_seqlens.tolist() == [0, 2]
    assert len(empty.label_T) == len(empty.segment_T) == 0


def test_columns_have_the_types_that_torch_and_attention_kernels_take() -> None:
    rows = pack_flat(grown(3, 1), grown(3, 1).leaves())
    for name in ("input_I", "position_I", "label_T", "leaf_T", "segment_T"):
        assert getattr(rows, name).dtype == np.int64
    for name in ("logprob_T", "entropy_T", "confidence_T"):
        assert getattr(rows, name).dtype == np.float32
    assert rows.cu_seqlens.dtype == np.int32
    assert rows.forced_T.dtype == np.bool_


def test_a_pruned_or_repeated_leaf_is_an_error() -> None:
    forest = grown(3, 2)
    leaf_N = forest.leaves()
    with pytest.raises(ValueError, match=f"expected distinct leaves, got {leaf_N[0]} twice"):
        pack_flat(forest, leaf_N[[0, 1, 0]])
    forest.prune(int(leaf_N[0]), 1)
    with pytest.raises(StaleHandleError):
        pack_flat(forest, leaf_N)
