"""Information: segments of a tree by what they tell of a right answer, and how sure they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyrl.advantage import Floats, known_groups, known_tokens
from pyrl.checks import at_least, finite
from pyrl.leaves import Scored


@dataclass(frozen=True)
class InformationScore:
    """IB-TPO: (V(s) - V(root)) / std + lam eta(s) pi(s), for each segment s (arXiv:2605.28109).

    V is the mean reward of the leaves below; eta(s) = p(s) / p(parent) - (1 + 1 / beta), p the
    share of right leaves below (a reward above 0), pi(s) = exp of the mean log-prob of the
    segment's tokens by the first model. A parent without a right leaf counts as p(s) / p = 0: ours,
    as is the mean in pi. The source's steps are split by blank lines, pyrl's by forks. The input is
    ignored. Without the source's growth of trees at nodes of high score: it needs rewards of leaves
    while a tree grows.
    """

    lam: float = 0.1
    """Weight of the information term; 0: none. The source reports collapse at 0.5."""
    beta: float = 5.0
    """Of the information bottleneck: the larger, the more a gain counts."""
    ddof: Literal[0, 1] = 1
    """1 divides the variance by the leaves less 1."""
    eps: float = 1e-6
    """Added to the deviation."""
    needs = ("segments", "ref_logprob_T")

    def __post_init__(self) -> None:
        finite(self, "lam", "beta", "eps")
        at_least(0, self, "eps")
        if not self.beta > 0:
            raise ValueError(f"InformationScore.beta: expected a number above 0, got {self.beta}")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        parent_S = scored.segments.parent_S
        root_S = np.arange(len(parent_S))
        for segment in range(len(parent_S)):
            if parent_S[segment] >= 0:
                root_S[segment] = root_S[parent_S[segment]]
        value_S = below(scored, scored.reward_N)
        told_S = self.lam * self._gain_S(scored) * self._sure_S(scored)
        advantage_S = np.zeros(len(parent_S))
        for known in known_groups(scored):
            reward = scored.reward_N[known]
            if reward.min() == reward.max():
                continue
            inside_S = root_S == root_S[scored.segments.leaf_segment_N[known[0]]]
            far_S = value_S[inside_S] - value_S[root_S[inside_S]]
            advantage_S[inside_S] = far_S / (reward.std(ddof=self.ddof) + self.eps)
            advantage_S[inside_S] += told_S[inside_S]
        return np.where(known_tokens(scored), advantage_S[scored.segment_T], 0.0)

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        """The mean score of the nodes: (1 + beta) times the mean of eta pi over their children."""
        parent_S = scored.segments.parent_S
        right_S = below(scored, (scored.reward_N > 0).astype(np.float64))
        child = np.flatnonzero((parent_S >= 0) & ~np.isnan(right_S))
        if not child.size:
            return {"advantage/ib_score": 0.0}
        product = self._gain_S(scored)[child] * self._sure_S(scored)[child]
        children = np.bincount(parent_S[child])
        score = np.bincount(parent_S[child], product)[children > 0] / children[children > 0]
        return {"advantage/ib_score": float((1 + self.beta) * score.mean())}

    def _gain_S(self, scored: Scored) -> Floats:
        """eta of each segment; that of a root is of no use."""
        right_S = below(scored, (scored.reward_N > 0).astype(np.float64))
        before_S = right_S[scored.segments.parent_S]
        ratio_S = np.divide(right_S, before_S, out=np.zeros_like(right_S), where=before_S > 0)
        return np.asarray(np.nan_to_num(ratio_S) - (1 + 1 / self.beta))

    def _sure_S(self, scored: Scored) -> Floats:
        """pi of each segment; 1 of one without tokens."""
        segments = len(scored.segments.parent_S)
        count_S = np.bincount(scored.segment_T, minlength=segments)
        total_S = np.bincount(scored.segment_T, scored.ref_logprob_T, minlength=segments)
        return np.asarray(np.exp(total_S / np.maximum(count_S, 1)))


def below(scored: Scored, value_N: Floats) -> Floats:
    """The mean [S] over the leaves of known reward at or below each segment; NaN for none."""
    parent_S = scored.segments.parent_S
    total_S, count_S = np.zeros(len(parent_S)), np.zeros(len(parent_S))
    known_N = ~np.isnan(scored.reward_N)
    at = scored.segments.leaf_segment_N[known_N]
    np.add.at(total_S, at, value_N[known_N])
    np.add.at(count_S, at, 1)
    for segment in reversed(range(len(parent_S))):
        if parent_S[segment] >= 0:
            total_S[parent_S[segment]] += total_S[segment]
            count_S[parent_S[segment]] += count_S[segment]
    mean_S: Floats = np.full(len(parent_S), np.nan)
    np.divide(total_S, count_S, out=mean_S, where=count_S > 0)
    return mean_S
