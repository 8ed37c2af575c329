"""Tally: the metrics of a mini-batch, summed over its passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pyrl.logits.token_stats import TokenStats
from pyrl.loss.result import PolicyLoss
from pyrl.loss.terms import Terms
from pyrl.pack import TokenBatch


class Tally:
    """Weighted sums over passes, so that metrics are those of the whole mini-batch."""

    def __init__(self, effects: Mapping[str, float]) -> None:
        self.effects = effects
        """What is known of the whole mini-batch already."""
        self.loss = 0.0
        self.weight = 0.0
        self.sums: dict[str, float] = {}
        self.ratio = 0.0
        self.gap = 0.0
        """Largest difference between a token's log-probs at sampling and here (nats)."""
        self.sampled = self.learned = 0.0
        """The two log-probs of that token."""
        self.gaps, self.tokens = 0.0, 0
        """The sum of these differences, and of how many tokens."""

    def add(self, out: PolicyLoss, stats: TokenStats, batch: TokenBatch, terms: Terms) -> None:
        """A pass; at least one of its tokens has a positive weight."""
        self.loss += float(out.loss.detach())
        self.weight += out.weight
        self.ratio = max(self.ratio, out.ratio_max)
        gap = self._compare(batch, stats.logprob.detach().cpu().numpy())
        entropy_T = stats.entropy.detach().cpu().numpy()
        means = {
            "clip_ratio/low_mean": out.clipped_low,
            "clip_ratio/high_mean": out.clipped_high,
            "clip_ratio/dual_mean": out.clipped_dual,
            "sampling/importance_sampling_ratio/mean": out.ratio_mean,
            "sampling/sampling_logp_difference/mean": gap,
            "entropy/trained": float(np.average(entropy_T, weights=terms.weight_T.cpu().numpy())),
        }
        if not math.isnan(out.kl_ref):  # there is a reference
            means["kl"] = out.kl_ref
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + out.weight * mean

    def _compare(self, batch: TokenBatch, logprob_T: NDArray[np.floating]) -> float:
        """Note the token whose log-probs differ most; the mean difference of the sampled ones."""
        sampled, learned = batch.old_logprob_T[batch.mask_T], logprob_T[batch.mask_T]
        gap = np.abs(learned - sampled)
        worst = int(gap.argmax())
        if gap[worst] > self.gap:
            self.gap = float(gap[worst])
            self.sampled, self.learned = float(sampled[worst]), float(learned[worst])
        self.gaps += float(gap.sum())
        self.tokens += gap.size
        return float(gap.mean())

    def join(self, others: Sequence[Tally]) -> None:
        """Take in the passes of other processes."""
        for other in others:
            self.loss += other.loss
            self.weight += other.weight
            self.ratio = max(self.ratio, other.ratio)
            if other.gap > self.gap:
                self.gap, self.sampled, self.learned = other.gap, other.sampled, other.learned
            self.gaps += other.gaps
            self.tokens += other.tokens
            for name, total in other.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + total

    def mean_gap(self) -> float:
        """The mean difference of a token's log-probs; 0 without tokens."""
        return self.gaps / max(1, self.tokens)

    def metrics(self) -> dict[str, float]:
        """Without a token only the loss, which is 0, and the effects."""
        whole = {"loss": self.loss, **self.effects}
        if not self.weight:
            return whole
        return (
            whole
            | {name: value / self.weight for name, value in self.sums.items()}
            | {
                "sampling/importance_sampling_ratio/max": self.ratio,
                "sampling/sampling_logp_difference/max": self.gap,
            }
        )


def averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the mini-batches that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    mean = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
    # Only before the first update are sampler and learner the same policy.
    gap = "sampling/sampling_logp_difference"
    before = next((row for row in rows if f"{gap}/max" in row), {})
    return mean | {name: value for name, value in before.items() if name.startswith(gap)}
