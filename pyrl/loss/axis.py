"""Axes: what a choice of a loss reads beside its columns, and the protocols of such choices.

A choice names in `needs` the columns that it reads, "offset_N1", "group_N" and fields of the state
("state.entropy"): one check compares them with what is there. A function of the caller's own that
names nothing is asked for nothing; a column that it reads in vain is then named by `LossColumns`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, fields
from math import inf
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pyrl.loss.columns import LossColumns


@dataclass(frozen=True)
class LossState:
    """What an axis takes from the run, beside the tokens."""

    seed: int = 0
    """The seed of random choices; a token's number depends on it and on its index alone."""
    progress: float = 0.0
    """Share of the run that is done, in [0, 1]."""
    entropy: float | None = None
    """Mean entropy of the step before this one (nats); None: not measured."""
    mean_entropy: float | None = None
    """The mean of that over all earlier steps (nats); None: there are none."""
    nucleus_entropy: float | None = None
    """The aggregate that `NucleusAnchor` holds on to: that of the first step (nats)."""
    epoch: float | None = None
    radii: tuple[float, float] = (inf, inf)
    """Clip radii of `Loss.bounds`, set by `loss_terms`."""

    @property
    def known(self) -> set[str]:
        """The fields that have a value, as `needs` names them."""
        return {f"state.{f.name}" for f in fields(self) if vars(self)[f.name] is not None}


class Need(NamedTuple):
    """Something without which a choice cannot be computed."""

    axis: str
    name: str

    def __str__(self) -> str:
        what = self.name if self.name.startswith("state.") else f"the column {self.name}"
        return f"{self.axis}: needs {what}{_MEANING.get(self.name, '')}"


_MEANING = {
    "state.entropy": ", the entropy of the last step",
    "state.nucleus_entropy": ", what it holds on to",
    "clip_low_T": ", as it returns them",
    "clip_high_T": ", as it returns them",
}


def needs_of(axis: Any, unsaid: tuple[str, ...] = ()) -> list[Need]:
    """What a choice names, or `unsaid` where it names nothing; none of None."""
    if axis is None:
        return []
    names = axis.needs if hasattr(axis, "needs") else unsaid
    return [Need(type(axis).__name__, name) for name in names]


def check_needs(needs: Iterable[Need], known: Container[str]) -> None:
    """ValueError names the first that is not known."""
    for need in needs:
        if need.name not in known:
            raise ValueError(str(need))


class Reshape(Protocol):
    """Other advantages for the tokens."""

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        """Advantages [T]."""


class Factor(Protocol):
    """A detached factor of the policy term, clipped as it is."""

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        """Factors, float64 [T]."""


class Keep(Protocol):
    """A choice of the tokens whose policy term counts."""

    @property
    def shrink(self) -> bool:
        """A dropped token leaves the response: denominators, scans and penalties too."""

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        """True [T] where the token stays."""


class Select(Protocol):
    """A choice of the tokens that a penalty is put on."""

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        """True [T] where the token is chosen."""
