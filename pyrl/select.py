"""Select: which of the leaves that voted also train, and once advantages are known which tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyrl.checks import described
from pyrl.leaves import Leaves, Scored


class Select(Protocol):
    """Picks the leaves that get advantages and train.

    It may name what it reads of `Scored` in `needs`. One that remembers something from step to step
    has a method `initial`: see `pyrl.run.states`.
    """

    def __call__(self, leaves: Leaves, train: int) -> NDArray[np.int64]:
        """Ordinals of at most `train` leaves of each group, ascending."""


@runtime_checkable
class SelectAfter(Select, Protocol):
    """A selection that also picks tokens, or leaves with all of their tokens, after the advantages.

    A token that it drops takes no part in the loss: not in its sum, its penalties, its statistics
    and its denominators, nor in the mean entropy that later steps know. A response without a token
    left is none of those that a mean runs over.
    """

    def after(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.bool_]:
        """True [T] for the tokens that train."""


def selected(select: Select, leaves: Leaves, train: int, state: Any = None) -> NDArray[np.int64]:
    """Ordinals of the leaves that get advantages; `state` is what the selection remembers.

    ValueError if it gives something else.
    """
    kept_N = select(replace(leaves, state=state), train)
    size = len(leaves.leaf_N)
    good = isinstance(kept_N, np.ndarray) and kept_N.ndim == 1 and kept_N.dtype.kind in "iu"
    if not good or (np.diff(kept_N, prepend=-1, append=size) <= 0).any():
        raise ValueError(
            f"select: {type(select).__name__}: expected ascending ordinals of {size} leaves, "
            f"got {described(kept_N)}"
        )
    return kept_N


def tokens_that_train(
    select: Select, scored: Scored, advantage_T: NDArray[np.float64], state: Any = None
) -> tuple[NDArray[np.bool_], dict[str, float]]:
    """The tokens [T] that train, which forced ones never do, and the metrics of the selection.

    ValueError if it gives something else than a boolean for each token.
    """
    if not isinstance(select, SelectAfter):
        return ~scored.forced_T, {}
    chosen_T = select.after(replace(scored, state=state), advantage_T)
    good = isinstance(chosen_T, np.ndarray) and chosen_T.dtype == bool
    if not good or chosen_T.shape != advantage_T.shape:
        raise ValueError(
            f"select: {type(select).__name__}.after: expected a boolean for each of "
            f"{advantage_T.size} tokens, got {described(chosen_T)}"
        )
    train_T = chosen_T & ~scored.forced_T
    leaves = np.unique(scored.leaf_T[train_T]).size
    return train_T, {
        "select/tokens": int(train_T.sum()) / max(1, int((~scored.forced_T).sum())),
        "select/leaves": leaves / max(1, len(scored.group_N)),
    }


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
