"""Policy result: the value of a policy loss, its gradients and what a run reports about it."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

from torch import Tensor

TOTALS = (
    *("weight", "clipped_low", "clipped_high", "clipped_dual", "kl_old", "penalty", "ratio"),
    "ratio_max",
)
"""Fields of the core's PolicyLossTotals, in the order of `PolicyLoss.totals`."""


@dataclass(frozen=True)
class PolicyLoss:
    """The loss and what a run reports about it; shares and means are weighted as tokens are.

    Without a token of positive weight the shares, means and the largest ratio are NaN.
    """

    loss: Tensor
    """Sum over tokens of weight times loss, differentiable in logprob and the entropies."""
    loss_T: Tensor | None
    """Per token, before aggregation; detached. 0 where the token takes no part; None if not asked
    for."""
    logprob_grad_T: Tensor
    """d loss / d logprob_T, detached: the memory that a backward pass hands on, so read only."""
    entropy_grad_T: Tensor
    """d loss / d entropy_T, likewise."""
    nucleus_grad_T: Tensor | None
    """d loss / d nucleus_entropy_T, detached; None without such a term."""
    totals: Tensor
    """float64 [8] on the CPU: the weight, six sums times the weight, the largest ratio; the numbers
    below, which are read from here when asked for."""
    has_reference: bool
    """`ref_logprob_T` was given."""

    @property
    def weight(self) -> float:
        """Sum of the weights: what to weigh these numbers by when micro-batches are combined."""
        return self._total("weight")

    @property
    def clipped_low(self) -> float:
        """Share with a negative advantage and a ratio below the bounds."""
        return self._mean("clipped_low")

    @property
    def clipped_high(self) -> float:
        """Share with a positive advantage and a ratio above the bounds."""
        return self._mean("clipped_high")

    @property
    def clipped_dual(self) -> float:
        """Share with a negative advantage whose loss is capped by the dual clip."""
        return self._mean("clipped_dual")

    @property
    def kl_old(self) -> float:
        """Mean of r - 1 - log r of the loss's ratio r, an estimate of KL(old || current) (nats).

        Of the policy, the response or the prefix that `Loss.ratio` names; 0 where it names none.
        """
        return self._mean("kl_old")

    @property
    def kl_ref(self) -> float:
        """Mean of the estimator of the KL divergence to the reference (nats); NaN without."""
        return self._mean("penalty") if self.has_reference else nan

    @property
    def ratio_mean(self) -> float:
        """Mean of the loss's ratio."""
        return self._mean("ratio")

    @property
    def ratio_max(self) -> float:
        """Over tokens with a positive weight."""
        return self._total("ratio_max") if self.weight else nan

    def _total(self, name: str) -> float:
        return self.totals[TOTALS.index(name)].item()

    def _mean(self, name: str) -> float:
        weight = self.weight
        return self._total(name) / weight if weight else nan
