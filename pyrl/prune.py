"""Prune: which branches stop early. A pruned branch neither votes nor trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import Observed, SignalSpec, Threshold
from pyrl.checks import at_least, finite, shares


class Prune(Protocol):
    """Looks at running branches after each token."""

    def lower(self, spec: SignalSpec) -> bool:
        """Write the rule into the C++ signals; False: nothing is ever pruned."""

    def reason(self, observed: Observed) -> NDArray[np.uint8]:
        """0 to keep, otherwise a reason from 1 to 4, for each observed branch."""

    def respawns(self, votes: int) -> int:
        """Pruned branches of a prompt that are replaced by new trunks, at most."""


@dataclass(frozen=True)
class Keep:
    """Every branch runs to its end."""

    def lower(self, spec: SignalSpec) -> bool:
        return False

    def reason(self, observed: Observed) -> NDArray[np.uint8]:
        return observed.prune_B

    def respawns(self, votes: int) -> int:
        return 0


@dataclass(frozen=True)
class Doubt(Keep):
    """ECHO's three online rules, by quantiles of the last steps (arXiv:2602.02150).

    (1) the lowest group confidence so far is below that of most finished samples, (2) tail
    confidence has fallen for many tokens in a row and is low, (3) entropy has leapt several times
    in a row.
    """

    confidence_low: float = 0.1
    """Quantile, over samples, of their lowest group confidence."""
    tail_low: float = 0.1
    """Quantile of tail confidence below which it counts as low."""
    decline_run: int = 64
    """Tokens in a row over which tail confidence has fallen."""
    spike: float = 0.99
    """Quantile of the rise of entropy over its moving average."""
    spike_run: int = 3
    """Leaps of entropy in a row."""
    tail_window: int = 64
    """Tokens whose mean confidence is the tail confidence."""
    respawn_share: float = 0.25
    """Pruned branches that are replaced at most, as a share of the wanted leaves."""

    def __post_init__(self) -> None:
        shares(self, "confidence_low", "tail_low", "spike")
        at_least(0, self, "respawn_share")
        at_least(1, self, "decline_run", "spike_run", "tail_window")

    def threshold(self, value: float) -> Threshold:
        """What a field of a threshold stands for."""
        return Threshold(q=value)

    def lower(self, spec: SignalSpec) -> bool:
        spec.prune = True
        spec.confidence_low = self.threshold(self.confidence_low)
        spec.tail_low = self.threshold(self.tail_low)
        spec.entropy_spike = self.threshold(self.spike)
        spec.decline_run = self.decline_run
        spec.spike_run = self.spike_run
        spec.tail_window = self.tail_window
        return True

    def respawns(self, votes: int) -> int:
        return round(votes * self.respawn_share)


@dataclass(frozen=True)
class FixedDoubt(Doubt):
    """ECHO's three rules by fixed numbers (arXiv:2602.02150).

    The leaps and the runs are the released code's. Its confidence is in another unit, so those
    numbers are ours. Beside `FixedEntropyConfidence` they hold from the first token of a run on.
    """

    confidence_low: float = 0.4
    """Group confidence, a mass in (0, 1], below which a branch is dropped."""
    tail_low: float = 0.4
    """Tail confidence below which it counts as low."""
    decline_run: int = 3
    """Tokens in a row over which tail confidence has fallen."""
    spike: float = 0.5
    """Rise of entropy (nats) over its moving average that is a leap."""
    tail_window: int = 8
    """Tokens whose mean confidence is the tail confidence."""

    def __post_init__(self) -> None:
        shares(self, "confidence_low", "tail_low")
        finite(self, "spike")
        at_least(0, self, "respawn_share")
        at_least(1, self, "decline_run", "spike_run", "tail_window")

    def threshold(self, value: float) -> Threshold:
        return Threshold(value=value)
