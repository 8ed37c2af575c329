"""Padded: pyrl's losses on a host's rows, which are padded to [N, L] and aggregated by the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrl.loss import ClipCov, Loss, LossState, SeqMeanTokenMean, TokenMean
from pyrl.loss.aggregate import SeqMeanTokenSum, SeqMeanTokenSumNorm, TokenSum
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.result import PolicyLoss

Total = Callable[[Tensor, Tensor], Tensor]
"""How a host sums losses [N, L] up under a mask [N, L]: linear in the losses."""

MODES: dict[type, str] = {
    TokenMean: "token-mean",
    TokenSum: "token-sum",
    SeqMeanTokenMean: "seq-mean-token-mean",
    SeqMeanTokenSum: "seq-mean-token-sum",
    SeqMeanTokenSumNorm: "seq-mean-token-sum-norm",
}
"""What hosts call our aggregates."""

WORDS = {
    "entropy_T": "the entropy of each token",
    "nucleus_entropy_T": "the entropy of each token's nucleus",
    "rollout_logprob_T": "the log-probs of the engine that sampled",
    "ref_logprob_T": "the log-probs of the first model",
    "proxy_logprob_T": "log-probs without the least probable tokens",
    "second_logprob_T": "log-probs at a second temperature",
    "expert_logprob_T": "the log-probs of an expert's response",
    "sum_p2_T": "sums over the vocabulary",
    "sum_p2_logp_T": "sums over the vocabulary",
    "reward_T": "the rewards of responses",
    "group_N": "the question of each response",
    "clip_low_T": "radii of each token",
    "clip_high_T": "radii of each token",
}
"""What a loss can need, in the words of messages."""


def missing(loss: Loss, known: Collection[str]) -> str:
    """What a loss needs that a host does not give its losses, in words; empty if nothing is."""
    names = [need.name for need in loss.needs if need.name not in {*known, "offset_N1"}]
    if loss.entropy:
        names.append("entropy_T")
    if not names:
        return ""
    return WORDS.get(names[0], f"{names[0].removeprefix('state.')} of earlier steps")


def mode_of(loss: Loss) -> str:
    """What hosts call the loss's own aggregate; empty for one that they do not have."""
    return MODES.get(type(loss.aggregate), "")


@dataclass(frozen=True)
class HostWeights:
    """The host's aggregation as a weight per response: the gradient of its sum, which is linear.

    What the host knows of other micro-batches and ranks is in it.
    """

    total: Total
    length: int
    """L."""
    device: torch.device
    needs = ("offset_N1",)

    def __call__(self, tokens_N: Tensor) -> Tensor:
        place_L = torch.arange(self.length, device=self.device)
        mask_NL = place_L < tokens_N.to(self.device)[:, None]
        with torch.enable_grad():
            loss_NL = torch.zeros(
                mask_NL.shape, dtype=torch.float64, device=self.device, requires_grad=True
            )
            total = self.total(loss_NL, mask_NL)
        (weight_NL,) = torch.autograd.grad(total, loss_NL)
        return weight_NL.amax(dim=1).cpu()


@dataclass(frozen=True)
class Given:
    """A factor of the policy term that the host computed, such as its importance weights."""

    factor_T: Tensor
    needs = ()

    def __call__(self, columns: Any, state: LossState) -> Tensor:
        return self.factor_T


def padded_loss(
    loss: Loss,
    logprob_NL: Tensor,
    columns: Mapping[str, Tensor],
    mask_NL: Tensor,
    total: Total,
    factor_NL: Tensor | None = None,
) -> PolicyLoss:
    """The loss of N rows of L tokens, aggregated as `total` does.

    `columns` [N, L] by the names of `pyrl.policy_loss`; tokens outside the mask take no part.
    `factor_NL` multiplies the policy term and nothing else. Differentiable in `logprob_NL`.
    """
    rows, length = logprob_NL.shape
    aggregate = HostWeights(total, length, logprob_NL.device)
    used = replace(loss, aggregate=aggregate)
    if factor_NL is not None:
        used = replace(used, behaviour=Given(factor_NL.detach().double().flatten()))
    logprob_T = _column(logprob_NL)
    named: dict[str, Any] = {name: _column(value.detach()) for name, value in columns.items()}
    return policy_loss(
        logprob_T,
        torch.zeros_like(logprob_T),
        loss=used,
        mask_T=mask_NL.bool().flatten(),
        offset_N1=torch.arange(rows + 1) * length,
        state=LossState(seed=_seed(loss)),
        **named,
    )


def _column(value_NL: Tensor) -> Tensor:
    """One row after the other, in float32 at least."""
    return value_NL.to(torch.promote_types(value_NL.dtype, torch.float32)).flatten()


def _seed(loss: Loss) -> int:
    """A new seed from torch's generator for a loss that draws tokens; else 0."""
    draws = any(isinstance(keep, ClipCov) for keep in loss.keep)
    return int(torch.randint(1 << 62, ())) if draws else 0
