"""Algorithm: one field for each choice that a method makes. The configuration is what runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyrl.advantage import Stage, check_stages
from pyrl.answers import Equivalence, Extractor
from pyrl.budget import Allowance
from pyrl.fork import Flat, Fork, WithoutReplacement
from pyrl.leaves import LEAVES, SCORED, Decode, check_needs, needs_of
from pyrl.logits.sampling import Sampling
from pyrl.loss import Loss
from pyrl.loss.loss import check_loss
from pyrl.poll import Poll
from pyrl.prune import Keep, Prune
from pyrl.replay import Replay
from pyrl.reward import Reward, VoteReward
from pyrl.select import First, Select
from pyrl.tempered import Tempered
from pyrl.vote import Majority, Mass, Vote


@dataclass(frozen=True)
class Sample:
    """How many answers a question gets, and from which distribution."""

    votes: int = 64
    """Leaves per question; all of them vote."""
    train: int = 32
    """How many of these leaves train."""
    max_tokens: int = 1024
    """Response tokens at most."""
    max_tokens_per_prompt: int = 0
    """Tokens sampled for one question in a step at most, forks and pruned branches included; what
    still runs then is cut off. 0: no limit."""
    max_seconds: float = 0.0
    """Seconds of sampling in a step at most; what still runs then is cut off, so that such a run
    does not replay from its seed. 0: no limit."""
    stop_when_decided: bool = False
    """Stop a question when no missing leaf can change its label; leaves that train go on."""
    even: bool = False
    """Draw the first tokens of a question's samples evenly over their distribution: each is a
    sample of the policy, together they miss less of it (after PROPS, arXiv:2311.08290)."""
    temperature: float = 1.0
    """What logits are divided by."""
    top_k: int = 0
    """Only the k most probable tokens are drawn; 0: all."""
    top_p: float = 1.0
    """Only the fewest tokens whose mass reaches this share are drawn; 1: all."""
    min_p: float = 0.0
    """Only tokens of at least this share of the largest probability are drawn; 0: all."""
    top_h: float = 1.0
    """Only as many of the most probable tokens are drawn as have, renormalised, at most this share
    of the entropy of all; 1: all."""

    def __post_init__(self) -> None:
        if not 1 <= self.train <= self.votes:
            raise ValueError(
                f"sample: expected 1 <= train <= votes, got train={self.train}, votes={self.votes}"
            )
        if self.max_tokens < 1:
            raise ValueError(f"sample.max_tokens: expected at least 1, got {self.max_tokens}")
        if self.max_tokens_per_prompt and self.max_tokens_per_prompt < self.votes:
            raise ValueError(
                f"sample.max_tokens_per_prompt: expected 0 (no limit) or at least a token for each "
                f"of the {self.votes} votes, got {self.max_tokens_per_prompt}"
            )
        if not 0 <= self.max_seconds < math.inf:
            raise ValueError(
                f"sample.max_seconds: expected >= 0 (0: no limit), got {self.max_seconds}"
            )
        if self.stop_when_decided and self.train == self.votes:
            raise ValueError(
                f"sample.stop_when_decided: expected train < votes (leaves that train are never "
                f"stopped), got {self.train} for both"
            )
        if not self.temperature > 0:
            raise ValueError(f"sample.temperature: expected > 0, got {self.temperature}")
        try:
            self.sampling()
        except ValueError as error:
            raise ValueError(f"sample.{error}") from error

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.top_h)

    @property
    def ends_early(self) -> bool:
        """Branches may be ended before they end by themselves."""
        limits = (self.max_tokens_per_prompt, self.max_seconds, self.stop_when_decided)
        return any(limits)

    def allowance(self) -> Allowance:
        return Allowance(self.max_tokens_per_prompt, self.max_seconds)


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
    temper: Tempered = field(default_factory=Tempered)
    """Answers at another temperature that train in the place of some of a step's own."""
    replay: Replay = field(default_factory=Replay)
    updates_per_step: int = 1
    """Optimizer updates that share the samples of a step, each of them for as many of its
    questions; the second and later ones are off-policy, and only there do ratios meet bounds."""

    def __post_init__(self) -> None:
        if self.updates_per_step < 1:
            raise ValueError(f"updates_per_step: expected >= 1, got {self.updates_per_step}")
        check_loss(self.loss)
        check_stages(self.advantage)
        check_needs("reward", self.reward, LEAVES)
        check_needs("select", self.select, {*SCORED, "advantage_T"})
        if self.sample.stop_when_decided and not isinstance(self.vote, Majority | Mass):
            raise ValueError(
                f"sample.stop_when_decided: expected vote=Majority() or Mass(), got {self.vote}: "
                f"what a missing leaf can change is only known where each leaf has one vote, or "
                f"the mass that is still unseen is known"
            )
        if self.replay.capacity and self.loss.learner_needs:
            raise ValueError(
                f"replay.capacity: expected 0 (--replay.capacity 0) with this loss, got "
                f"{self.replay.capacity}: {self.loss.learner_needs[0]}, which a response of an "
                f"earlier step does not bring along"
            )
        self._check_replacement()

    def _check_replacement(self) -> None:
        """Trees without replacement go with some choices alone, and these with no other trees."""
        unique = isinstance(self.fork, WithoutReplacement)
        if unique != isinstance(self.vote, Mass):
            raise ValueError(
                f"fork and vote: expected WithoutReplacement() and Mass() together, got "
                f"{self.fork} and {self.vote}: leaves weigh what they stand for there alone "
                f"(--fork without_replacement --vote mass)"
            )
        if unique and self.prune != Keep():
            raise ValueError(
                f"prune: expected Keep() beside fork=WithoutReplacement(), which drops branches "
                f"itself, got {self.prune}"
            )
        if unique and self.temper.share:
            raise ValueError(
                f"temper.share: expected 0 beside fork=WithoutReplacement(), whose leaves are no "
                f"independent samples, got {self.temper.share}"
            )
        if unique and self.sample.votes < 2:
            raise ValueError(
                f"sample.votes: expected at least 2 without replacement, got {self.sample.votes}"
            )

    @property
    def reads(self) -> dict[str, str]:
        """What stages and the selection name in `needs`, and the class that does."""
        choices = (*self.advantage, self.select)
        return {name: type(choice).__name__ for choice in choices for name in needs_of(choice)}

    @property
    def has_reference(self) -> bool:
        """The frozen first model is asked: by the loss, or by a choice that reads its log-probs."""
        return self.loss.has_reference or "ref_logprob_T" in self.reads

    def poll(self, decode: Decode, extractor: Extractor, equivalence: Equivalence) -> Poll | None:
        """The poll of one rollout; None unless `sample.stop_when_decided`."""
        if not self.sample.stop_when_decided:
            return None
        assert isinstance(self.vote, Majority | Mass)
        return Poll(self.vote, decode, extractor, equivalence, self.sample.train)
