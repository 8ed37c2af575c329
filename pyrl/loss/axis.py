"""Axes: what a choice of a loss reads beside its columns, and the protocols of such choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl._core.loss import LossColumns


@dataclass(frozen=True)
class LossState:
    """What an axis takes from the run, beside the tokens."""

    seed: int = 0
    """Of random choices; a token's number depends on it and on its index alone."""
    progress: float = 0.0
    """Share of the run that is done, in [0, 1]."""
    entropy: float | None = None
    """Mean entropy measured over earlier updates (nats); None: not measured."""
    nucleus_entropy: float | None = None
    """The aggregate that `NucleusAnchor` holds on to: that of the first step (nats)."""
    epoch: float | None = None
    radii: tuple[float, float] = (np.inf, np.inf)
    """Of `Loss.bounds`, set by `loss_terms`."""


class Reshape(Protocol):
    """Other advantages for the tokens."""

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Advantages [T]."""


class Factor(Protocol):
    """A detached factor of the policy term, clipped as it is."""

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.float64]:
        """Factors [T], an array of its own: it is written to."""


class Keep(Protocol):
    """A choice of the tokens whose policy term counts."""

    @property
    def shrink(self) -> bool:
        """A dropped token leaves the response: denominators, scans and penalties too."""

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """True [T] where the token stays."""


class Select(Protocol):
    """The tokens that a penalty is put on."""

    def __call__(self, columns: LossColumns, state: LossState) -> NDArray[np.bool_]:
        """True [T] where it is."""
