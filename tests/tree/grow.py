"""Small forests for tests, and the arrays that they take."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyrl.forest import Forest


def handles(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def seeds(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def append(forest: Forest, branch: int, entropies: list[float], version: int = 0) -> None:
    """Tokens 0, 1, 2, ... with these entropies; logprob and confidence follow from them."""
    for entropy in entropies:
        forest.append(
            handles(branch),
            np.array([forest.length(branch)], np.int32),
            np.array([-entropy], np.float32),
            np.array([entropy], np.float32),
            np.array([1 / (1 + entropy)], np.float32),
            version,
        )


def trunk(length: int = 0) -> tuple[Forest, int]:
    """A forest of one tree and one branch with `length` tokens."""
    forest = Forest()
    branch = forest.add_trunk(forest.add_tree(np.array([5, 6], np.int32)), 1)
    append(forest, branch, [float(i % 7) for i in range(length)])
    return forest, branch


def finish(forest: Forest, *branches: int, reason: int = 1) -> None:
    forest.finish(handles(*branches), np.full(len(branches), reason, np.uint8))
