"""The packed batch against loops over its leaves, and its rows against plain forwards."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pyrl import demo
from pyrl._core.tree import pack_flat
from pyrl.attention import use_pyrl_attention
from pyrl.forest import Forest
from pyrl.logits.token_stats import token_stats
from pyrl.pack import TokenBatch, gather, offsets, pack


def batch_of(prompt_N: list[int], response_N: list[int], seed: int = 0) -> TokenBatch:
    """Leaves with these lengths; every column is random."""
    rng = np.random.default_rng(seed)
    length_N = np.add(prompt_N, response_N)
    inputs, tokens = int(sum(length_N)), sum(response_N)
    return TokenBatch(
        input_I=rng.integers(2, 31, inputs),
        position_I=np.concatenate([np.arange(n) for n in length_N]),
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
def test_tokens_know_their_leaf_and_the_row_that_predicts_them(
    lengths: list[tuple[int, int]],
) -> None:
    batch = batch_of(*map(list, zip(*lengths, strict=True)))
    expected_leaf, expected_row, start = [], [], 0
    for leaf, (prompt, response) in enumerate(lengths):
        expected_leaf += [leaf] * response
        expected_row += [start + prompt - 1 + t for t in range(response)]
        start += prompt + response
    assert batch.leaf_T.tolist() == expected_leaf
    assert batch.predictor_T.tolist() == expected_row


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60))
def test_passes_hold_each_leaf_once_longest_first_and_are_full(
    lengths: list[tuple[int, int]], tokens: int
) -> None:
    batch = batch_of(*map(list, zip(*lengths, strict=True)))
    length_N = np.diff(batch.input_offset_N1)
    passes = [leaf_N.tolist() for leaf_N in batch.passes(tokens)]
    order = [leaf for leaf_N in passes for leaf in leaf_N]
    assert sorted(order) == list(range(len(batch)))
    # Equal lengths in the order of the leaves: passes do not depend on anything else.
    assert order == sorted(order, key=lambda leaf: (-length_N[leaf], leaf))
    for leaf_N, following in zip(passes, [*passes[1:], None], strict=True):
        assert length_N[leaf_N].sum() <= tokens or len(leaf_N) == 1
        if following:
            assert length_N[leaf_N].sum() + length_N[following[0]] > tokens


def test_a_batch_without_leaves_has_no_pass() -> None:
    batch = batch_of([2, 3], [4, 5])
    nothing = batch.take(np.array([], np.int64))
    assert len(nothing) == 0
    assert list(nothing.passes(10)) == []


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
            "position_I": list(range(len(prompt) + len(path.tokens))),
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


def test_packed_rows_predict_what_a_plain_forward_of_each_leaf_predicts() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float64)
    plain = AutoModelForCausalLM.from_pretrained(
        demo.MODEL, dtype=torch.float64, attn_implementation="sdpa"
    )
    use_pyrl_attention(model)
    forest = grown_forest(1)
    rows = pack_flat(forest, forest.leaves())
    batch = pack(rows, np.zeros(len(rows.label_T)))
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.input_I)[None],
            position_ids=torch.from_numpy(batch.position_I)[None],
            cu_seq_lens_q=torch.from_numpy(batch.input_offset_N1),
            logits_to_keep=torch.from_numpy(batch.predictor_T),
            use_cache=False,
        ).logits[0]
        packed_T = token_stats(logits, torch.from_numpy(batch.label_T)).logprob
        expected: list[float] = []
        for leaf in forest.leaves().tolist():
            tree = int(forest.leaf_table(np.array([leaf])).tree_N[0])
            prompt, tokens = forest.prompt(tree), forest.path(leaf).tokens
            row = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
            logprob_IV = plain(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
            expected += [
                float(logprob_IV[len(prompt) + t - 1, int(token)]) for t, token in enumerate(tokens)
            ]
    assert packed_T.tolist() == pytest.approx(expected, abs=1e-10)
