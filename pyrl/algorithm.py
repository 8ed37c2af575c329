"""Algorithm: one field for each choice that a method makes. The configuration is what runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyrl.advantage import Stage
from pyrl.engine import Sampling
from pyrl.fork import Flat, Fork
from pyrl.loss import Loss
from pyrl.prune import Keep, Prune
from pyrl.reward import Reward, VoteReward
from pyrl.select import First, Select
from pyrl.vote import Majority, Vote


@dataclass(frozen=True)
class Sample:
    """How many answers a question gets, and from which distribution."""

    votes: int = 64
    """Leaves per question; all of them vote."""
    train: int = 32
    """Of these, the leaves that train."""
    max_tokens: int = 1024
    """Response tokens at most."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.train <= self.votes:
            raise ValueError(
                f"sample: expected 1 <= train <= votes, got train={self.train}, votes={self.votes}"
            )
        if self.max_tokens < 1:
            raise ValueError(f"sample.max_tokens: expected at least 1, got {self.max_tokens}")
        if self.temperature <= 0:
            raise ValueError(f"sample.temperature: expected > 0, got {self.temperature}")

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Algorithm:
    """A method of test-time RL. `repr` records it; `dataclasses.replace` derives the next one."""

    advantage: tuple[Stage, ...]
    """Applied in order; the first one turns rewards into advantages."""
    sample: Sample = field(default_factory=Sample)
    fork: Fork = field(default_factory=Flat)
    prune: Prune = field(default_factory=Keep)
    vote: Vote = field(default_factory=Majority)
    reward: Reward = field(default_factory=VoteReward)
    select: Select = field(default_factory=First)
    loss: Loss = field(default_factory=Loss)
