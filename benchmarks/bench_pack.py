"""From leaves to a tree of unique tokens, and to FlexAttention's blocks, beside the peers.

    OMP_NUM_THREADS=1 python benchmarks/bench_pack.py    (needs: pip install trl)

Shapes are prompt, trunks x their length, leaves of each x their length. Rates are million tokens of
the rows (raw tokens) a second of CPU time, medians of rounds in turn; "/ pyrl" is how many times as
long a peer takes as pyrl from the same rows. Exit code 1 if a gate is missed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from statistics import median

import numpy as np
import torch
from measure import Times, Variant, conditions, interleaved, ratio
from numpy.typing import NDArray
from pack_peers import dict_trie, numpy_radix, trl
from torch.nn.attention.flex_attention import create_block_mask

from pyrl._core.tree import PackedTree, block_mask, pack_flat, pack_rows, pack_tree
from pyrl.attention import Layout
from pyrl.forest import Forest

SHAPES = [
    (512, 16, 2048, 1, 0),
    (512, 8, 2048, 8, 2048),
    (512, 16, 4096, 4, 4096),
    (2048, 4, 8192, 8, 8192),
]
GATES = {"forest": 300.0, "rows": 50.0, "TRL": 100.0}
MASKS = {4352: 0.05, 65024: 0.5}
"""Milliseconds at most for a row of so many tokens."""


def grown(prompt: int, trunks: int, trunk: int, leaves: int, leaf: int, seed: int = 0) -> Forest:
    rng = np.random.default_rng(seed)
    forest = Forest()
    tree = forest.add_tree(rng.integers(0, 50_000, prompt).astype(np.int32))

    def append(branch_B: NDArray[np.int64], tokens: int) -> None:
        zero_B = np.zeros(len(branch_B), np.float32)
        for _ in range(tokens):
            token_B = rng.integers(0, 50_000, len(branch_B)).astype(np.int32)
            forest.append(branch_B, token_B, zero_B, zero_B, zero_B)

    trunk_B = np.array([forest.add_trunk(tree, seed) for seed in range(trunks)])
    append(trunk_B, trunk)
    if leaves > 1:
        seed_B = np.arange(leaves - 1, dtype=np.uint64)
        for branch in trunk_B.tolist():
            forest.fork(branch, trunk, seed_B)
        append(forest.open(), leaf)
    branch_B = forest.open()
    forest.finish(branch_B, np.ones(len(branch_B), np.uint8))
    return forest


def bench_shape(shape: tuple[int, int, int, int, int], rounds: int) -> list[bool]:
    forest = grown(*shape)
    leaf_N = forest.leaves()
    flat = pack_flat(forest, leaf_N)
    offset_N1 = flat.cu_seqlens.astype(np.int64)
    prompt_N = np.full(len(leaf_N), shape[0])
    rows = np.split(flat.input_I, offset_N1[1:-1])
    times = interleaved(
        {
            "forest": Variant(lambda: pack_tree(forest, leaf_N)),
            "rows": Variant(lambda: pack_rows(flat.input_I, offset_N1, prompt_N)),
            "flat copy": Variant(lambda: pack_flat(forest, leaf_N)),
            "TRL": Variant(trl(rows, shape[0])),
            "dict a token": Variant(dict_trie(rows, shape[0])),
            "numpy radix": Variant(numpy_radix(rows, shape[0])),
        },
        rounds,
    )
    tree = pack_rows(flat.input_I, offset_N1, prompt_N)
    assert numpy_radix(rows, shape[0])() == dict_trie(rows, shape[0])()
    raw, unique = len(flat.input_I), len(tree.input_J)
    print(f"\n{shape}: {raw} raw tokens, {unique} inputs, {len(tree.label_U)} response tokens\n")
    print("|  | M tokens/s | / pyrl |\n|---|---:|---:|")
    for name, time in times.items():
        rate = raw / median(time.cpu) / 1e6
        print(f"| {name} | {rate:.1f} | {ratio(time, times['rows']):.1f} |")
    return [
        raw / median(times["forest"].cpu) / 1e6 >= GATES["forest"],
        raw / median(times["rows"].cpu) / 1e6 >= GATES["rows"],
        ratio(times["TRL"], times["rows"]) >= GATES["TRL"],
    ]


def tree_of(tokens: int) -> PackedTree:
    """A tree of 64 leaves with about so many tokens, and its first tokens when it has more."""
    part = tokens // 80
    forest = grown(part, 16, part, 4, part + 1)
    return pack_tree(forest, forest.leaves())


def bench_mask(tokens: int, rounds: int) -> bool:
    end_J = np.minimum(Layout.of_tree(tree_of(tokens)).end_J[:tokens], tokens)
    end = torch.from_numpy(end_J)

    def sees(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < end[key])

    variants = {"intervals": Variant(lambda: block_mask(end_J, 128))}
    size = len(end_J)
    if size <= 8192:  # create_block_mask holds every pair: 4 GB at 65,024 tokens
        make = partial(create_block_mask, sees, None, None, size, size, device="cpu")
        variants["create_block_mask"] = Variant(make)
        theirs, ours = make(), block_mask(end_J, 128)
        assert theirs.kv_num_blocks[0, 0].tolist() == ours.partial_count_B.tolist()
        assert theirs.full_kv_num_blocks[0, 0].tolist() == ours.full_count_B.tolist()
    times: dict[str, Times] = interleaved(variants, rounds)
    mask = block_mask(end_J, 128)
    print(
        f"block mask, {size} tokens: {int(mask.partial_count_B.sum())} partial and "
        f"{int(mask.full_count_B.sum())} full blocks; milliseconds: "
        + ", ".join(f"{name} {median(time.cpu) * 1e3:.3f}" for name, time in times.items())
    )
    return median(times["intervals"].cpu) * 1e3 <= MASKS[tokens]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(conditions())
    kept = [gate for shape in SHAPES for gate in bench_shape(shape, rounds)]
    print()
    kept += [bench_mask(tokens, 5 * rounds) for tokens in MASKS]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
