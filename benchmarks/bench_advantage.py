"""Group and tree advantages against loops in numpy: python benchmarks/bench_advantage.py

Peers are run on fewer groups and compared per leaf. Exits with an error below 20 times their speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from pyrl import _core

GATE = 20
LEAVES = 64
DEPTH = 6  # a binary tree of 127 segments


def numpy_grpo(group_N: np.ndarray, reward_N: np.ndarray) -> np.ndarray:
    """The usual trainer: one group after the other."""
    advantage_N = np.empty_like(reward_N)
    bounds = np.flatnonzero(np.diff(group_N)) + 1
    for begin, end in zip([0, *bounds], [*bounds, group_N.size], strict=True):
        reward = reward_N[begin:end]
        advantage_N[begin:end] = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-6)
    return advantage_N


def numpy_tree_po(group_N: np.ndarray, reward_N: np.ndarray) -> np.ndarray:
    """Depth by depth with a mean for each subtree, for full binary trees."""
    advantage_N = np.empty_like(reward_N)
    for begin in range(0, group_N.size, LEAVES):
        reward = reward_N[begin : begin + LEAVES]
        total = np.zeros(LEAVES)
        for depth in range(DEPTH):
            size = LEAVES >> depth
            for first in range(0, LEAVES, size):
                part = reward[first : first + size]
                total[first : first + size] += part - part.mean()
        advantage_N[begin : begin + LEAVES] = total / DEPTH
    return advantage_N


def core_grpo(group_N: np.ndarray, reward_N: np.ndarray) -> np.ndarray:
    return _core.tree.group_advantage(group_N, reward_N, _core.tree.BaselineOptions())


def core_tree_po(group_N: np.ndarray, reward_N: np.ndarray) -> np.ndarray:
    node = np.arange(2 * LEAVES - 1)  # breadth-first: the parent of i is (i - 1) // 2
    trees = group_N.size // LEAVES
    first = np.arange(trees)[:, None] * node.size
    parent_S = np.where(node == 0, -1, first + (node - 1) // 2).ravel()
    leaf_segment_N = (first + node[LEAVES - 1 :]).ravel()
    return _core.tree.ancestor_advantage(
        parent_S,
        leaf_segment_N,
        group_N,
        reward_N,
        _core.tree.AncestorOptions(ancestors="all", weight="mean"),
    )


Function = Callable[[np.ndarray, np.ndarray], np.ndarray]


def ns_per_leaf(function: Function, groups: int, repeats: int) -> float:
    """The least CPU time of the repeats."""
    group_N = np.repeat(np.arange(groups), LEAVES)
    reward_N = np.random.default_rng(0).integers(0, 2, group_N.size).astype(np.float64)
    best = np.inf
    for _ in range(repeats):
        begin = time.process_time()
        function(group_N, reward_N)
        best = min(best, time.process_time() - begin)
    return best / group_N.size * 1e9


def main() -> None:
    cases: list[tuple[str, int, Function, Function, int]] = [
        ("GRPO, 64 leaves a group", 100_000, core_grpo, numpy_grpo, 10_000),
        ("TreePO, 127 segments a tree", 10_000, core_tree_po, numpy_tree_po, 500),
    ]
    print(f"{'case':30} {'groups':>8} {'pyrl ns/leaf':>13} {'numpy ns/leaf':>14} {'ratio':>7}")
    slow = []
    for name, groups, ours, peer, peer_groups in cases:
        group_N = np.repeat(np.arange(8), LEAVES)
        reward_N = np.random.default_rng(1).random(group_N.size)
        np.testing.assert_allclose(ours(group_N, reward_N), peer(group_N, reward_N), atol=1e-12)
        our_ns = ns_per_leaf(ours, groups, repeats=5)
        peer_ns = ns_per_leaf(peer, peer_groups, repeats=3)
        print(f"{name:30} {groups:8} {our_ns:13.2f} {peer_ns:14.1f} {peer_ns / our_ns:7.1f}")
        if peer_ns < GATE * our_ns:
            slow.append(name)
    if slow:
        raise SystemExit(f"below {GATE} times numpy: {', '.join(slow)}")


if __name__ == "__main__":
    main()
