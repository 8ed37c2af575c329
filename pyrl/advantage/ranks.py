"""Ranks: advantages from the order of rewards, and not from their distances."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pyrl.advantage import Floats, known_groups
from pyrl.leaves import Scored


@dataclass(frozen=True)
class RankNormal:
    """G2RPO: rewards become normal scores in each prompt, then over the step (arXiv:2604.08539).

    Of N values the j-th in order gets the quantile (j - 1/2) / N of the standard normal
    distribution, and equal ones share the mean of theirs. The input is ignored. The source makes
    the second pass over the samples of one kind of task: here the step is one. Prompts whose
    rewards are all equal, which the source filters out, take no part and get 0.
    """

    across: bool = True
    """Make the second pass, over all prompts of the step."""

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        return self._score_N(scored)[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        return {"advantage/rank_max": float(self._score_N(scored).max(initial=0.0))}

    def _score_N(self, scored: Scored) -> Floats:
        score_N = np.zeros(len(scored.reward_N))
        ranked = [
            known
            for known in known_groups(scored)
            if scored.reward_N[known].min() < scored.reward_N[known].max()
        ]
        for known in ranked:
            score_N[known] = normal_scores(scored.reward_N[known])
        if self.across and ranked:
            every = np.concatenate(ranked)
            score_N[every] = normal_scores(score_N[every])
        return score_N


def normal_scores(value: Floats) -> Floats:
    """The quantiles of the normal distribution for the ranks of these values; [0] for one value.

    Scores that are equal but for rounding become the same number, so that they tie later on.
    """
    size = value.size
    quantile = [NormalDist().inv_cdf((j + 0.5) / size) for j in range(size)]
    score = np.empty(size)
    score[np.argsort(value, kind="stable")] = quantile
    _, same = np.unique(value, return_inverse=True)
    mean = np.bincount(same, score) / np.bincount(same)
    return np.round(mean, 12)[same]
