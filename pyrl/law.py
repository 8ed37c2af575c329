"""Law: trees that never draw a response twice, followed token by token (arXiv:1903.06059)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import Forest, Growth, draw_roots, grow, weigh


class Law:
    """What one rollout without replacement keeps, opens and drops; csrc/tree/without_replacement.h.

    A question keeps the `votes` nodes, running branches and leaves, of the largest Gumbel numbers.
    """

    def __init__(self, forest: Forest, votes: int) -> None:
        self.forest, self.votes = forest, votes
        self._taken: dict[int, tuple[int, list[int]]] = {}
        """Of each sibling: where it opened, and the tokens that it never draws there."""

    def begin(self, trunks: list[int]) -> None:
        """New trunks, one of each question, draw their Gumbel numbers."""
        draw_roots(self.forest, np.array(trunks, np.int64))

    def grow(
        self,
        branch_B: NDArray[np.int64],
        logprob_B: NDArray[np.float32],
        rest_logprob_B: NDArray[np.float32],
    ) -> Growth:
        """What the tokens that the forest has just taken decide; see `pyrl._core.tree.grow`."""
        return grow(self.forest, self.votes, branch_B, logprob_B, rest_logprob_B)

    def taken(self, parent: int, at: int) -> NDArray[np.int32]:
        """The tokens that a sibling of `parent` does not draw at its place."""
        opened, tokens = self._taken.get(parent, (-1, []))
        earlier = tokens if opened == at else []
        return np.array([*earlier, self.forest.path(parent).tokens[at]], np.int32)

    def open(
        self, child: int, at: int, taken: NDArray[np.int32], log_mass: float, gumbel: float
    ) -> None:
        """A sibling has opened there."""
        self.forest.stand(child, log_mass, gumbel)
        self._taken[child] = (at, taken.tolist())

    def refuse(self, branch: int) -> None:
        """A branch leaves that the law would have kept: the weights count it as refused."""
        self.forest.refuse(self.forest.tree_of(branch), self.forest.gumbel(branch))

    def close(self, tree: int) -> None:
        """Open no more siblings; each leaf weighs what its own mass is."""
        self.forest.refuse(tree, math.inf)

    def weigh(self) -> None:
        """Give every leaf its weight, 1 in sum over those of a question."""
        weigh(self.forest)
