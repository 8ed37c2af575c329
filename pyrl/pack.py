"""Leaves as training rows: flat, padding-free, one row per leaf."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyrl._core import Forest, PackedRows, pack_flat


def pack_rows(forest: Forest, leaf_N: NDArray[np.int64]) -> PackedRows:
    """Concatenate prompt and response of each leaf, in the order given.

    A shared token occurs once per leaf, so T is the sum of the leaves' lengths, and I adds each
    leaf's prompt. Raises StaleHandleError for a pruned leaf, ValueError for one given twice.
    """
    return pack_flat(forest, leaf_N)
