"""Layout: which tokens of a packed row attend to which.

Trees stand one after the other, each depth first: key k is seen by the queries from k to the last
token below it. A row of its own is a tree that never forks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl._core.tree import PackedTree

Made = TypeVar("Made")

BLOCK = 128
"""Queries of a block, at least: the pairs that a mask hides cost less than a call for each part."""


@dataclass(frozen=True)
class Run:
    """Neighbouring trees of one length that never fork: a batch under plain causal attention."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Block:
    """Neighbouring queries of one tree, and every key that one of them sees."""

    query: slice
    key: slice | Tensor
    """A range of the row, or indices into it."""
    mask: Tensor
    """Boolean [queries, keys], True where the key is seen."""


class Layout:
    """Trees of J tokens in S segments, as `PackedTree` has them."""

    def __init__(
        self,
        begin_S: NDArray[np.int64],
        end_S: NDArray[np.int64],
        parent_S: NDArray[np.int64],
        position_J: NDArray[np.int64],
    ) -> None:
        self._begin_S, self._end_S, self._parent_S = begin_S, end_S, parent_S
        self._position_J = position_J
        # Depth first: the segment that follows, if it is below this one, ends this one's tokens.
        self._own_end_S = np.minimum(np.append(begin_S[1:], len(position_J)), end_S)
        self._kept: dict[Hashable, Any] = {}

    @classmethod
    def of_tree(cls, tree: PackedTree) -> Layout:
        """The tree that `pyrl.pack.pack_tree` or `pack_rows` has laid out, depth first."""
        return cls(tree.begin_S, tree.end_S, tree.parent_S, tree.position_J)

    @classmethod
    def of_rows(cls, length_N: NDArray[np.int64]) -> Layout:
        """Rows of these lengths (at least 1), one after the other, that share nothing."""
        end_N = np.cumsum(length_N, dtype=np.int64)
        begin_N = end_N - length_N
        position_J = np.arange(end_N[-1]) - np.repeat(begin_N, length_N)
        return cls(begin_N, end_N, np.full(len(end_N), -1, np.int64), position_J)

    def __len__(self) -> int:
        return len(self._position_J)

    @property
    def position_J(self) -> NDArray[np.int64]:
        """Tokens above each token."""
        return self._position_J

    @cached_property
    def end_J(self) -> NDArray[np.int64]:
        """One past the last token below each."""
        return np.repeat(self._end_S, self._own_end_S - self._begin_S)

    def keep(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returned for this key: the layers of a model share it."""
        if key not in self._kept:
            self._kept[key] = make()
        made: Made = self._kept[key]
        return made

    def parts(self, window: int | None, device: torch.device) -> list[Run | Block]:
        """Runs and blocks that cover the row in order.

        With a window, a key is seen by the queries fewer than `window` tokens below it.
        """
        return self.keep(("parts", window, device), lambda: list(self._cut(window, device)))

    def _cut(self, window: int | None, device: torch.device) -> Iterator[Run | Block]:
        run: Run | None = None
        for root in np.flatnonzero(self._parent_S < 0):
            start, end = int(self._begin_S[root]), int(self._end_S[root])
            chain = end == self._own_end_S[root] and (window is None or end - start <= window)
            if chain and run is not None and run.length == end - start:
                run = Run(run.start, run.count + 1, run.length)
                continue
            if run is not None:
                yield run
            run = Run(start, 1, end - start) if chain else None
            if not chain:
                yield from self._blocks(int(root), window, device)
        if run is not None:
            yield run

    def _blocks(self, root: int, window: int | None, device: torch.device) -> Iterator[Run | Block]:
        start, end = int(self._begin_S[root]), int(self._end_S[root])
        trunk = int(self._own_end_S[root]) - start
        if trunk >= BLOCK and (window is None or trunk <= window):
            yield Run(start, 1, trunk)
            start += trunk
        while start < end:
            stop = self._stop(start, end)
            query_Q = np.arange(start, stop)
            # The queries may turn back up the tree: what the highest of them sees counts.
            highest = int(self._position_J[start:stop].min())
            first = 0 if window is None else max(0, highest - window + 1)
            key_K = np.concatenate([*self._above(start, first), query_Q])
            seen_QK = (key_K <= query_Q[:, None]) & (query_Q[:, None] < self.end_J[key_K])
            if window is not None:
                depth_QK = self._position_J[query_Q][:, None] - self._position_J[key_K]
                seen_QK &= depth_QK < window
            whole = key_K[-1] - key_K[0] + 1 == len(key_K)
            key = slice(int(key_K[0]), stop) if whole else torch.from_numpy(key_K).to(device)
            yield Block(slice(start, stop), key, torch.from_numpy(seen_QK).to(device))
            start = stop

    def _stop(self, start: int, end: int) -> int:
        """Where a block ends: keys above it are copied once a block, so deep blocks are larger."""
        depth = self._position_J[start]
        stop = min(start + max(BLOCK, int(depth) // 2), end)
        # Beyond a turn back up the tree, keys just above this block are seen by no query.
        first, last = np.searchsorted(self._begin_S, (start + BLOCK, stop))
        turns = self._begin_S[first:last]
        turns = turns[self._position_J[turns] < depth]
        return int(turns[0]) if len(turns) else stop

    def _above(self, token: int, first: int) -> list[NDArray[np.int64]]:
        """The tokens above one from position `first` on, from the root down."""
        ranges: list[NDArray[np.int64]] = []
        segment, stop = int(np.searchsorted(self._begin_S, token, side="right")) - 1, token
        while segment >= 0:
            begin = int(self._begin_S[segment])
            begin += max(0, first - int(self._position_J[begin]))
            if begin < stop:
                ranges.append(np.arange(begin, stop))
            segment = int(self._parent_S[segment])
            stop = int(self._own_end_S[segment])
        return ranges[::-1]
