"""From leaves to a tree of unique tokens, and to FlexAttention's blocks, beside the peers.

    OMP_NUM_THREADS=1 python benchmarks/bench_pack.py    (needs: pip install trl)

Shapes are prompt, trunks x their length, leaves of each x their length. Rates are million tokens of
all rows, prompts included (raw tokens), a second of CPU time, medians; the call from Python counts,
and giving back the memory of its result. In turn: a round runs every variant once, each after a
garbage collection, so that caches hold what others left there. Warm: calls one after the other.
"/ pyrl" is how many times as long a peer takes as pyrl from the same rows, the median of rounds in
turn. Exit code 1 if a gate is missed, in turn or warm.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from measure import Times, Variant, conditions, gate, interleaved, ratio, table
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
"""Milliseconds at most for a row of so many tokens, in turn and warm."""


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


def warm(run: Callable[[], object], calls: int = 31) -> float:
    """Median of the CPU seconds of calls one right after the other."""
    seconds = []
    for _ in range(calls):
        begin = time.process_time()
        run()
        seconds.append(time.process_time() - begin)
    return median(seconds[1:])


def bench_shape(shape: tuple[int, int, int, int, int], rounds: int) -> list[bool]:
    forest = grown(*shape)
    leaf_N = forest.leaves()
    flat = pack_flat(forest, leaf_N)
    offset_N1 = flat.cu_seqlens.astype(np.int64)
    prompt_N = np.full(len(leaf_N), shape[0])
    rows = np.split(flat.input_I, offset_N1[1:-1])
    ours: dict[str, Callable[[], object]] = {
        "forest": lambda: pack_tree(forest, leaf_N),
        "rows": lambda: pack_rows(flat.input_I, offset_N1, prompt_N),
    }
    peers: dict[str, Callable[[], object]] = {
        "flat copy": lambda: pack_flat(forest, leaf_N),
        "TRL": trl(rows, shape[0]),
        "dict a token": dict_trie(rows, shape[0]),
        "numpy radix": numpy_radix(rows, shape[0]),
    }
    times = interleaved({name: Variant(run) for name, run in (ours | peers).items()}, rounds)
    tree = pack_rows(flat.input_I, offset_N1, prompt_N)
    assert numpy_radix(rows, shape[0])() == dict_trie(rows, shape[0])()
    raw, unique = len(flat.input_I), len(tree.input_J)
    print(f"\n{shape}: {raw} raw tokens, {unique} inputs, {len(tree.label_U)} response tokens\n")
    lines, kept = [], []
    for name, run in (ours | peers).items():
        rates = [raw / median(times[name].cpu) / 1e6]
        if name in ours:
            rates.append(raw / warm(run) / 1e6)
        slower = ratio(times[name], times["rows"])
        reached = slower if name in peers else min(rates)
        least = GATES.get(name, 0)
        kept.append(reached >= least)
        shown = [f"{rate:.1f}" for rate in rates] + [""] * (name in peers)
        lines.append([name, *shown, f"{slower:.1f}", gate(reached, least=least) if least else ""])
    print(table(["", "M tokens/s in turn", "warm", "/ pyrl", "gate"], lines))
    return kept


def tree_of(tokens: int) -> PackedTree:
    """A tree of 64 leaves with about so many tokens, and its first tokens when it has more."""
    part = tokens // 80
    forest = grown(part, 16, part, 4, part + 1)
    return pack_tree(forest, forest.leaves())


def bench_mask(tokens: int, rounds: int) -> tuple[list[str], bool]:
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
    took = [1e3 * median(times["intervals"].cpu), 1e3 * warm(variants["intervals"].run)]
    peer = times.get("create_block_mask")
    line = [
        str(size),
        *(str(int(count_B.sum())) for count_B in (mask.partial_count_B, mask.full_count_B)),
        f"{1e3 * median(peer.cpu):.1f}" if peer else "",
        *(f"{milliseconds:.3f}" for milliseconds in took),
        gate(max(took), most=MASKS[tokens]),
    ]
    return line, max(took) <= MASKS[tokens]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(conditions())
    kept = [gate for shape in SHAPES for gate in bench_shape(shape, rounds)]
    print()
    masks = [bench_mask(tokens, rounds) for tokens in MASKS]
    head = ["tokens", "partial", "full", "torch ms", "ms in turn", "warm ms", "gate"]
    print(table(head, [line for line, _ in masks]))
    kept += [good for _, good in masks]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
