"""Reshape: other advantages for the tokens of a mini-batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

from pyrl.logits.token_stats import Options
from pyrl.loss.axis import LossState
from pyrl.loss.columns import LossColumns, checked, segments


@dataclass(frozen=True)
class EntropyZ:
    """A (1 + scale z), z the entropy standardised over the batch (arXiv:2510.14545)."""

    scale: float = 0.2
    """Change of an advantage for each deviation of entropy."""
    needs = ("advantage_T", "entropy_T")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        entropy_T, whole = columns["entropy_T"], columns.whole
        deviation = whole.deviation(entropy_T, unbiased=True)
        slope = torch.where(deviation > 1e-12, self.scale / deviation, 0.0)
        return columns["advantage_T"] * (1 + slope * (entropy_T - whole.mean(entropy_T)))


@dataclass(frozen=True)
class Blend:
    """DCPO: mixes in reward times the ratio of a second temperature to the first.

    (1 - alpha) A + alpha R rho, alpha = a / (1 + a), a = min(|target - entropy|, limit) / share of
    responses with a reward; alpha = 0 without any.
    """

    target: float = 0.5
    """Wanted entropy (nats)."""
    limit: float = 0.1
    """Largest distance from the target that counts (nats)."""
    hotter: float = 1.2
    """The second temperature as a multiple of the first, while the entropy is not above its
    target."""
    cooler: float = 0.8
    """The same above it."""
    needs = (
        *("state.entropy", "advantage_T", "reward_T", "second_logprob_T", "old_logprob_T"),
        "offset_N1",
    )

    def asks(self, temperature: float, state: LossState) -> Options:
        assert state.entropy is not None
        times = self.hotter if state.entropy <= self.target else self.cooler
        return Options(second_temperature=times * temperature)

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        assert state.entropy is not None
        reward_T, responses = columns["reward_T"], columns.responses
        rewarded = (responses.largest(reward_T) > 0).sum()
        share = rewarded / responses.any_P.sum().double()
        distance = min(abs(self.target - state.entropy), self.limit)
        a = torch.where(rewarded > 0, distance / share, 0.0)
        alpha = a / (1 + a)
        ratio_T = (columns["second_logprob_T"] - columns["old_logprob_T"]).clamp(-20, 20).exp()
        return (1 - alpha) * columns["advantage_T"] + alpha * reward_T * ratio_T


@dataclass(frozen=True)
class TokenGroup:
    """HAPO: rewards normalised over all tokens of a question (arXiv:2509.16591).

    A question keeps its advantages if a normalised reward is `limit` or more.
    """

    limit: float = 5.0
    """Normalised reward from which on a question keeps its advantages."""
    needs = ("advantage_T", "reward_T", "offset_N1", "group_N")

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        assert columns.group_N is not None
        reward_T, responses, group_N = columns["reward_T"], columns.responses, columns.group_N
        ordered_N, order_N = group_N.sort(stable=True)
        groups = torch.arange(len(group_N) + 1, device=group_N.device)
        offset_G1 = torch.searchsorted(ordered_N, groups)

        def of_group(value_N: Tensor, reduce: str = "sum") -> Tensor:
            """Reduced over the responses of each one's question."""
            return segments(value_N[order_N], reduce, offset_G1)[group_N]

        count_N = of_group(responses.count_P).clamp(min=1)
        mean_N = of_group(responses.sum(reward_T)) / count_N
        centred_T = reward_T - responses.spread(mean_N)
        deviation_N = (of_group(responses.sum(centred_T.square())) / count_N).sqrt()
        scale_N = 1 / (deviation_N + 1e-6)  # the released code's epsilon
        most_N = of_group(responses.largest(centred_T.abs()), "max")
        kept_T = responses.spread(most_N * scale_N >= self.limit)
        return torch.where(kept_T, columns["advantage_T"], centred_T * responses.spread(scale_N))


@dataclass(frozen=True)
class Band:
    """A band of the batch's entropy, which moves over the run; equal ends: it stays."""

    low: tuple[float, float] = (0.6, 0.4)
    """Lower end of the band (nats), at the beginning and at the end of the run."""
    high: tuple[float, float] = (0.7, 0.5)
    """Upper end of the band (nats), at the beginning and at the end of the run."""
    cosine: bool = False
    """Move by a cosine, not linearly."""

    def band(self, progress: float) -> tuple[float, float]:
        """Ends of the band at a share of the run (nats)."""
        share = 0.5 * (1 - cos(pi * progress)) if self.cosine else progress
        low, high = (start + (end - start) * share for start, end in (self.low, self.high))
        return low, high

    def outside(self, columns: LossColumns, state: LossState) -> tuple[Tensor, Tensor]:
        """Whether the entropy of these tokens is below the band, and whether it is above."""
        low, high = self.band(state.progress)
        entropy = columns.whole.mean(columns["entropy_T"])
        return entropy < low, entropy > high


@dataclass(frozen=True)
class EntropyBand(Band):
    """Entrocraft: only positive rewards above a band of the batch's entropy, only negative below.

    Rewards must be -1 or 1. The band moves from its first to its second pair over the run.
    """

    needs = ("advantage_T", "entropy_T", "reward_T")
    rewards = frozenset({-1.0, 1.0})
    """What it can work with: a run with other rewards is refused before it begins."""

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        reward_T = columns["reward_T"]
        reward_T = checked(
            reward_T,
            columns.used(reward_T.abs() != 1),
            "EntropyBand: expected rewards of -1 or 1, got {} at {} (VoteReward(wrong=-1, "
            "no_answer=-1) has such)",
        )
        below, above = self.outside(columns, state)
        negative_T = torch.where(below, reward_T.clamp(max=0), columns["advantage_T"])
        return torch.where(above, reward_T.clamp(min=0), negative_T)


@dataclass(frozen=True)
class SignFilter:
    """Keeps advantages of one sign; the others become 0."""

    keep: Literal["positive", "negative"] = "positive"
    """Which advantages stay."""
    needs = ("advantage_T",)

    def __call__(self, columns: LossColumns, state: LossState) -> Tensor:
        advantage_T = columns["advantage_T"]
        return advantage_T.clamp(min=0) if self.keep == "positive" else advantage_T.clamp(max=0)
