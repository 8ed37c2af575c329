"""The packed batch against loops over its leaves, and its rows against plain forwards."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl._core.tree import pack_flat
from pyrl.forest import Forest
from pyrl.pack import TokenBatch, gather, offsets, pack


def batch_of(prompt_N: list[int], response_N: list[int], seed: int = 0) -> TokenBatch:
    """Leaves with these lengths; every column is random."""
    rng = np.random.default_rng(seed)
    length_N = np.add(prompt_N, response_N)
    inputs, tokens = int(sum(length_N)), sum(response_N)
    return TokenBatch(
        input_I=rng.integers(2, 31, inputs),
        label_T=rng.integers(2, 31, tokens),
        old_logprob_T=rng.normal(size=tokens).astype(np.float32),
        entropy_T=rng.random(tokens).astype(np.float32),
        confidence_T=rng.random(tokens).astype(np.float32),
        mask_T=rng.random(tokens) < 0.8,
        advantage_T=rng.normal(size=tokens),
        input_offset_N1=offsets(length_N),
        token_offset_N1=offsets(np.array(response_N)),
        reward_N=rng.random(len(prompt_N)),
        group_N=rng.integers(0, 3, len(prompt_N)),
        columns={"second_logprob_T": rng.normal(size=tokens)},
    )


def leaf_columns(batch: TokenBatch, leaf: int) -> dict[str, list[float]]:
    """What one leaf holds, column by column."""
    spans = {
        "I": slice(*batch.input_offset_N1[leaf : leaf + 2]),
        "T": slice(*batch.token_offset_N1[leaf : leaf + 2]),
        "N": slice(leaf, leaf + 1),
    }
    names = [f.name for f in fields(batch) if f.name.rpartition("_")[2] in spans]
    columns = {name: getattr(batch, name) for name in names} | dict(batch.columns)
    return {n: c[spans[n[-1]]].tolist() for n, c in columns.items() if c is not None}


def grown_forest(seed: int) -> Forest:
    """Two trees with forks inside their trunks and forced tokens; all branches are finished."""
    rng, forest = np.random.default_rng(seed), Forest()
    for prompt in ([3, 4, 5, 12], [6, 7]):
        forest.add_trunk(forest.add_tree(np.array(prompt, np.int32)), 1)
    for step in range(4):
        branch_B = forest.open()
        for _ in range(int(rng.integers(1, 6))):
            rows = len(branch_B)
            column_3B = rng.random((3, rows)).astype(np.float32)
            token_B, forced_B = rng.integers(2, 12, rows).astype(np.int32), rng.random(rows) < 0.3
            forest.append(branch_B, token_B, *column_3B, version=step, forced=forced_B)
        source = int(rng.choice(branch_B))
        at = int(rng.integers(1, forest.length(source) + 1))
        forest.fork(source, at, np.array([step], np.uint64))
    branch_B = forest.open()
    forest.finish(branch_B, np.ones(len(branch_B), np.uint8))
    return forest


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, data=st.data())
def test_taken_leaves_keep_all_their_columns(
    lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    batch = batch_of(*map(list, zip(*lengths, strict=True)))
    leaf_N = data.draw(st.permutations(range(len(batch))).map(lambda x: x[: (len(x) + 1) // 2]))
    taken = batch.take(np.array(leaf_N, np.int64))
    assert len(taken) == len(leaf_N)
    assert [leaf_columns(taken, n) for n in range(len(taken))] == [
        leaf_columns(batch, leaf) for leaf in leaf_N
    ]


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, data=st.data())
def test_gathered_rows_are_the_spans_one_after_the_other(
    lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    offset_N1 = offsets(np.array([response for _, response in lengths]))
    leaf_N = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6))
    rows = [i for leaf in leaf_N for i in range(offset_N1[leaf], offset_N1[leaf + 1])]
    assert gather(offset_N1, np.array(leaf_N, np.int64)).tolist() == rows


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS)
def test_tokens_know_their_leaf(lengths: list[tuple[int, int]]) -> None:
    batch = batch_of(*map(list, zip(*lengths, strict=True)))
    assert batch.leaf_T.tolist() == [
        leaf for leaf, (_, response) in enumerate(lengths) for _ in range(response)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_packed_leaves_of_a_forest_are_their_paths(seed: int) -> None:
    forest = grown_forest(seed)
    leaf_N = np.random.default_rng(seed).permutation(forest.leaves())
    rows = pack_flat(forest, leaf_N)
    advantage_T = np.arange(len(rows.label_T), dtype=np.float64)
    batch = pack(rows, advantage_T, np.arange(len(leaf_N)) / 2)
    assert len(batch) == len(leaf_N)
    start = 0
    for leaf, tree, handle in zip(
        range(len(leaf_N)), forest.leaf_table(leaf_N).tree_N, leaf_N, strict=True
    ):
        prompt, path = forest.prompt(tree).tolist(), forest.path(handle)
        end = start + len(path.tokens)
        assert leaf_columns(batch, leaf) == {
            "input_I": prompt + path.tokens.tolist(),
            "label_T": path.tokens.tolist(),
            "old_logprob_T": path.logprob.tolist(),
            "entropy_T": path.entropy.tolist(),
            "confidence_T": path.confidence.tolist(),
            "mask_T": (~path.forced).tolist(),
            "advantage_T": list(range(start, end)),
            "reward_N": [leaf / 2],
        }
        start = end
    assert batch.leaf_T.tolist() == rows.leaf_T.tolist()


def test_an_advantage_for_each_token_is_expected() -> None:
    forest = grown_forest(0)
    rows = pack_flat(forest, forest.leaves())
    tokens = len(rows.label_T)
    with pytest.raises(ValueError, match=f"expected {tokens} advantages, got {tokens - 1}"):
        pack(rows, np.zeros(tokens - 1))
