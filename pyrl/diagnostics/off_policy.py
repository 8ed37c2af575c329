"""What the updated policy would earn, from the rows of the one before: no new samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrl.leaves import Scored
from pyrl.pack import TokenBatch

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Means over one distribution from N samples of another."""

    mean_K: Floats
    error_K: Floats
    """Their standard errors."""
    samples: float
    """As many samples of the distribution itself would tell as much of its mean (Kish)."""


def estimate(value_KN: Floats, weight_N: Floats) -> Estimate:
    """Importance sampling of several means at once, w - 1 as the control variate of each.

    mean(w f) - b (mean(w) - 1) with b = Cov(w f, w) / Var(w), the best one for these samples: one
    sample and one control serve all means (arXiv:2212.00568, without its further samples of an
    adapted distribution). Equal weights give the plain mean.
    """
    weighted_KN = value_KN * weight_N
    off_N = weight_N - weight_N.mean()
    spread = float((off_N**2).mean())
    b_K = (weighted_KN * off_N).mean(axis=1) / spread if spread else np.zeros(len(value_KN))
    mean_K = weighted_KN.mean(axis=1) - b_K * (weight_N.mean() - 1)
    rest_KN = weighted_KN - b_K[:, None] * weight_N
    error_K = rest_KN.std(axis=1) / np.sqrt(max(1, len(weight_N) - 1))
    samples = weight_N.sum() ** 2 / (weight_N**2).sum() if weight_N.any() else 0.0
    return Estimate(mean_K, error_K, float(samples))


def updated_policy(batch: TokenBatch, scored: Scored, logprob_T: Floats) -> dict[str, float]:
    """Reward, entropy and distance of the policy after the update, from the step's rows.

    `logprob_T` is its log-probs. A row weighs what its response is more likely now; that is exact
    where tokens were drawn from the whole distribution, and errors are as if leaves were
    independent. Rows whose reward is unknown are left out.
    """
    change_T = np.where(batch.mask_T, logprob_T - batch.old_logprob_T, 0.0)
    change_N = np.bincount(batch.leaf_T, change_T, minlength=len(batch))
    known_N = ~np.isnan(scored.reward_N)
    if not known_N.any():
        return {}
    names = ("reward", "entropy", "kl")
    value_KN = np.stack([scored.reward_N, scored.entropy_N, change_N])[:, known_N]
    found = estimate(value_KN, np.exp(change_N[known_N]))
    metrics = {"off_policy/samples": found.samples}
    for name, mean, error in zip(names, found.mean_K, found.error_K, strict=True):
        metrics |= {f"off_policy/{name}": float(mean), f"off_policy/{name}_error": float(error)}
    return metrics
