"""Table: an engine's branches, their fixed facts and the columns that change with each token."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pyrl.engine import NO_TOKENS

TAP = "pyrl"
"""Key in a request's extra arguments: [ticket, seed, first token's position, prompt's tokens,
excluded first tokens]."""
FORK = "pyrl_fork"
"""Key in a request's extra arguments: [ticket of its source, number of tokens that both share]."""


@dataclass(eq=False)
class Branch:
    """The fixed facts of a branch."""

    branch: int
    ticket: int
    """The name of its request: tickets count up and are never used again."""
    prompt: NDArray[np.int32]
    seed: int
    limit: int
    retain: bool
    source: int
    """Ticket of the branch that it shares its first tokens with; -1: there is none."""
    shared: int
    """Number of shared tokens that the source computes."""
    forked_at: int = 0
    """Response tokens that it entered with."""
    exclude: NDArray[np.int32] = field(default_factory=lambda: NO_TOKENS)
    """Tokens that its draw there does not give."""


class BranchTable:
    """Responses of all branches since the engine was idle; a row is a ticket minus `base`."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.branch_R = np.empty(0, np.int64)
        self.limit_R = np.empty(0, np.int64)
        self.length_R = np.empty(0, np.int64)
        self.running_R = np.empty(0, bool)
        self._token_RT = np.empty((0, 0), np.int32)

    def add(self, entry: Branch, tokens: NDArray[np.int32]) -> None:
        """Add a branch whose response has these tokens so far."""
        row = entry.ticket - self.base
        self._reserve(row + 1, len(tokens))
        self.branch_R[row], self.limit_R[row] = entry.branch, entry.limit
        self.length_R[row], self.running_R[row] = len(tokens), True
        self._token_RT[row, : len(tokens)] = tokens

    def append(self, row_B: NDArray[np.int64], token_B: NDArray[np.int32]) -> None:
        """Append a token to each of some branches."""
        length_B = self.length_R[row_B]
        self._reserve(0, int(length_B.max(initial=0)) + 1)
        self._token_RT[row_B, length_B] = token_B
        self.length_R[row_B] = length_B + 1

    def tokens(self, ticket: int, count: int) -> NDArray[np.int32]:
        """The first tokens of a response."""
        return self._token_RT[ticket - self.base, :count].copy()

    def _reserve(self, rows: int, width: int) -> None:
        """Make room for that many; sizes double, so that growing costs little per token."""
        had_rows, had_width = self._token_RT.shape
        if rows <= had_rows and width <= had_width:
            return
        rows = had_rows if rows <= had_rows else max(64, 2 * rows)
        width = had_width if width <= had_width else max(64, 2 * width)
        more = rows - had_rows
        self._token_RT = np.pad(self._token_RT, ((0, more), (0, width - had_width)))
        self.branch_R = np.pad(self.branch_R, (0, more))
        self.limit_R = np.pad(self.limit_R, (0, more))
        self.length_R = np.pad(self.length_R, (0, more))
        self.running_R = np.pad(self.running_R, (0, more))
