"""What bench_pack.py compares: other ways from rows of token ids to the tree that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Rows = Sequence[NDArray[np.int64]]


def trl(rows: Rows, prompt: int) -> Callable[[], int]:
    """TRL's packer (trl.experimental.async_grpo), from the samples that it takes."""
    from trl.experimental.async_grpo.packing import TreeRow

    samples = [
        {
            "input_ids": torch.from_numpy(row),
            "completion_mask": torch.arange(len(row)) >= prompt,
            "old_log_probs": torch.zeros(len(row)),
            "advantage": 1.0,
            "group_id": 0,
        }
        for row in rows
    ]

    def pack() -> int:
        tree = TreeRow()
        for sample in samples:
            tree.add(sample)
        return len(tree.pack()["input_ids"])

    return pack


def dict_trie(rows: Rows, prompt: int) -> Callable[[], int]:
    """A dict for each token, and the same columns as pyrl's."""

    def pack() -> int:
        roots: dict[int, int] = {}
        child: list[dict[int, int]] = []
        token: list[int] = []
        nodes_of: list[list[int]] = []
        for row in rows:
            level, nodes = roots, []
            for value in row.tolist():
                node = level.get(value)
                if node is None:
                    node = level[value] = len(token)
                    token.append(value)
                    child.append({})
                nodes.append(node)
                level = child[node]
            nodes_of.append(nodes)
        place, position, order = [0] * len(token), [0] * len(token), 0
        stack = [(node, 0) for node in reversed(roots.values())]
        while stack:
            node, depth = stack.pop()
            place[node], position[node], order = order, depth, order + 1
            stack.extend((below, depth + 1) for below in reversed(child[node].values()))
        input_J = np.empty(order, np.int64)
        input_J[place] = token
        unique_T = np.array([place[node] for nodes in nodes_of for node in nodes[prompt:]])
        return len(input_J) if len(unique_T) else 0

    return pack


def numpy_radix(rows: Rows, prompt: int) -> Callable[[], int]:
    """Segments found by comparing whole arrays, row by row."""

    def pack() -> int:
        parts: list[NDArray[np.int64]] = []
        child: list[dict[int, int]] = []
        roots: dict[int, int] = {}
        ends: list[list[int]] = []
        for row in rows:
            level, at, path = roots, 0, []
            while at < len(row):
                node = level.get(int(row[at]))
                if node is None:
                    level[int(row[at])] = node = len(parts)
                    parts.append(row[at:])
                    child.append({})
                    path.append(node)
                    break
                part = parts[node]
                most = min(len(part), len(row) - at)
                differ = np.flatnonzero(part[:most] != row[at : at + most])
                common = int(differ[0]) if len(differ) else most
                if common < len(part):
                    lower = len(parts)
                    parts.append(part[common:])
                    child.append(child[node])
                    parts[node], child[node] = part[:common], {int(part[common]): lower}
                    for known in ends:
                        if node in known:
                            known.insert(known.index(node) + 1, lower)
                path.append(node)
                level, at = child[node], at + common
            ends.append(path)
        begin, order = np.zeros(len(parts), np.int64), 0
        laid: list[NDArray[np.int64]] = []
        stack = list(reversed(roots.values()))
        while stack:
            node = stack.pop()
            begin[node], order = order, order + len(parts[node])
            laid.append(parts[node])
            stack.extend(reversed(child[node].values()))
        input_J = np.concatenate(laid)
        unique_T = [
            np.concatenate([begin[n] + np.arange(len(parts[n])) for n in path])[prompt:]
            for path in ends
        ]
        return len(input_J) if sum(map(len, unique_T)) else 0

    return pack
