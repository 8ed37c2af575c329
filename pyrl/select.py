"""Select: which of the leaves that voted also train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl.leaves import Leaves


class Select(Protocol):
    """Picks the leaves that train."""

    def __call__(self, leaves: Leaves, train: int) -> NDArray[np.int64]:
        """Ordinals of at most `train` leaves of each group, ascending."""


@dataclass(frozen=True)
class First:
    """The first ones in order: unbiased for independent samples (arXiv:2504.16084)."""

    def __call__(self, leaves: Leaves, train: int) -> NDArray[np.int64]:
        start_G = np.searchsorted(leaves.group_N, np.arange(leaves.groups))
        return np.flatnonzero(np.arange(len(leaves.group_N)) - start_G[leaves.group_N] < train)


@dataclass(frozen=True)
class Stratified:
    """Round-robin over the trunks, their own leaves first: the first n would be whole trees."""

    def __call__(self, leaves: Leaves, train: int) -> NDArray[np.int64]:
        turn_N = np.zeros(len(leaves.leaf_N), np.int64)
        seen: dict[tuple[int, int], int] = {}
        for n, key in enumerate(zip(leaves.group_N.tolist(), leaves.trunk_N.tolist(), strict=True)):
            turn_N[n] = seen.get(key, 0)
            seen[key] = int(turn_N[n]) + 1
        order_N = np.lexsort((leaves.trunk_N, turn_N, leaves.group_N))
        start_G = np.searchsorted(leaves.group_N, np.arange(leaves.groups))
        rank_N = np.arange(len(order_N)) - start_G[leaves.group_N[order_N]]
        return np.sort(order_N[rank_N < train])
