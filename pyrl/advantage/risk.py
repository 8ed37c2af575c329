"""Risk: advantages that weigh the low end of the rewards more, and drop their high end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pyrl.advantage import Floats, known_groups
from pyrl.checks import at_least, finite, one_of, ordered, shares
from pyrl.leaves import Scored


@dataclass(frozen=True)
class MixedRisk:
    """RiskPO: the mixed value at risk of bundles of answers (arXiv:2510.00911).

    A bundle is the j-th leaf of each of some consecutive prompts, its score R the sum of their
    rewards. q_low and q_high follow quantiles of R over the run. With c = -(q_low - R)+ and g =
    (R - q_low)+ - (R - q_high)+, a bundle's advantage is (weight c / low + g / (high - low)) /
    (weight + 1), over the deviation of R among the bundles of the same prompts. The input is
    ignored. Of prompts of other sizes, leaves without a bundle get 0, and so do all where no reward
    is known, which leaves the quantiles as they are. How the rest of a division into bundles
    counts (as a bundle, its score scaled to a full one) is ours.
    """

    bundle: int = 5
    """Prompts of a bundle."""
    low: float = 0.2
    """Share of the bundles below which R counts `weight` times more."""
    high: float = 0.8
    """Share of the bundles above which R makes no difference."""
    weight: float = 1.5
    """Of the low end; 0: none."""
    form: Literal["released", "exact"] = "released"
    """"exact" is (1 + weight) c + g, the gradient of the printed objective, where `weight` is the
    paper's omega (0.5)."""
    constant: bool = False
    """Add the g of a score at q_low, q_low - q_high, as the formula has it: then no g is above 0.
    The released script leaves it out."""
    quantiles: Literal["track", "batch", "mix"] = "track"
    """Those of the run, those of this step, or the mean of both."""
    rate: float = 0.1
    """Step of a tracked quantile, as a multiple of the distance of its level."""
    credit: Literal["uniform", "score", "sum"] = "sum"
    """What a leaf gets of its bundle's advantage: all of it; half of it where its reward is above
    0, else 1.5 times; or its share in the sum of the differences to their prompts' means."""
    cap: float = 1.0
    """Largest size of such a share; inf as released, where a small sum explodes it. A sum near 0,
    or of the other sign than the advantage, gives each leaf an equal share."""
    eps: float = 1e-6
    """Added to what divides."""

    def __post_init__(self) -> None:
        finite(self, "weight", "rate", "eps")
        shares(self, "low", "high")
        ordered(self, self.low, self.high)
        at_least(1, self, "bundle")
        at_least(0, self, "weight", "rate", "cap")
        if not self.eps > 0:
            raise ValueError(f"MixedRisk.eps: expected a number above 0, got {self.eps}")
        one_of(self.form, ("released", "exact"), "form of MixedRisk")
        one_of(self.quantiles, ("track", "batch", "mix"), "choice of MixedRisk.quantiles")
        one_of(self.credit, ("uniform", "score", "sum"), "credit of MixedRisk")

    def initial(self) -> dict[str, Any]:
        """The tracked quantiles; None before the first score."""
        return {"low": None, "high": None}

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        advantage_N = np.zeros(len(scored.reward_N))
        tracked, (low, high) = self._quantiles(scored)
        scored.state.update(zip(("low", "high"), tracked, strict=True))
        mean_N = np.zeros(len(scored.reward_N))
        for known in known_groups(scored):
            mean_N[known] = scored.reward_N[known].mean()
        for leaf_RB in self._bundles(scored):
            score_R = self._scores(scored, leaf_RB)
            if len(score_R) < 2 or score_R.min() == score_R.max():
                continue
            whole_R = self.of_scores(score_R, low, high) / (score_R.std(ddof=1) + self.eps)
            reward_RB = scored.reward_N[leaf_RB]
            advantage_N[leaf_RB] = self.credited(whole_R, reward_RB, reward_RB - mean_N[leaf_RB])
        return advantage_N[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        _, (low, high) = self._quantiles(scored)
        scores = [self._scores(scored, leaf_RB) for leaf_RB in self._bundles(scored)]
        score = np.concatenate([*scores, np.zeros(0)])
        return {
            "advantage/risk_low": low,
            "advantage/risk_high": high,
            "advantage/risk_below": float((score < low).mean()) if score.size else 0.0,
        }

    def of_scores(self, score_R: Floats, low: float, high: float) -> Floats:
        """The advantages of bundles with these scores, before they are divided."""
        under = -np.maximum(low - score_R, 0)
        inside = np.maximum(score_R - low, 0) - np.maximum(score_R - high, 0)
        if self.constant or self.form == "exact":
            inside = inside + low - high
        if self.form == "exact":
            return np.asarray((1 + self.weight) * under + inside)
        width = self.high - self.low
        mixed: Floats = self.weight * under / (self.low + self.eps) + inside / (width + self.eps)
        return mixed / (self.weight + 1)

    def credited(self, whole_R: Floats, reward_RB: Floats, over_RB: Floats) -> Floats:
        """What each leaf gets of its bundle's advantage; `over`: its reward less the prompt's."""
        if self.credit == "uniform":
            return np.broadcast_to(whole_R[:, None], reward_RB.shape)
        if self.credit == "score":
            return np.asarray(whole_R[:, None] * np.where(reward_RB > 0, 0.5, 1.5))
        total_R = over_RB.sum(axis=1)
        fair_R = (np.abs(total_R) >= 1e-6) & (np.isinf(self.cap) | (total_R * whole_R >= 0))
        share_RB = over_RB / np.where(fair_R, total_R, 1.0)[:, None]
        share_RB = np.clip(share_RB, -self.cap, self.cap)
        share_RB = np.where(fair_R[:, None], share_RB, 1 / over_RB.shape[1])
        return np.asarray(whole_R[:, None] * share_RB)

    def _bundles(self, scored: Scored) -> Iterator[NDArray[np.int64]]:
        """The leaves of the bundles of the same prompts: a row for each bundle, of one each."""
        groups = [*known_groups(scored)]
        for first in range(0, len(groups), self.bundle):
            some = groups[first : first + self.bundle]
            rows = min(map(len, some))
            yield np.stack([known[:rows] for known in some], axis=1)

    def _scores(self, scored: Scored, leaf_RB: NDArray[np.int64]) -> Floats:
        return np.asarray(scored.reward_N[leaf_RB].mean(axis=1) * self.bundle)

    def _quantiles(self, scored: Scored) -> tuple[list[float | None], tuple[float, float]]:
        """The tracked quantiles after this step, and those that its advantages use."""
        before: list[float | None] = [scored.state["low"], scored.state["high"]]
        scores = [self._scores(scored, leaf_RB) for leaf_RB in self._bundles(scored)]
        if not scores:
            return before, (before[0] or 0.0, before[1] or 0.0)
        score, levels = np.concatenate(scores), (self.low, self.high)
        own = [float(q) for q in np.quantile(score, levels)]
        if before[0] is None or before[1] is None:
            tracked = own
        else:
            pairs = zip((before[0], before[1]), levels, strict=True)
            tracked = [q + self.rate * (level - float((score < q).mean())) for q, level in pairs]
        mixed = [(q + b) / 2 for q, b in zip(tracked, own, strict=True)]
        used = {"track": tracked, "batch": own, "mix": mixed}[self.quantiles]
        return [*tracked], (used[0], used[1])
