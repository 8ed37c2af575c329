"""Clipped policy-gradient loss of tokens and the weights that aggregate tokens into one number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl import _core

KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
"""With D = logprob - ref_logprob: D, D^2 / 2 and exp(-D) + D - 1 (arXiv:2402.03300 uses k3)."""


@dataclass(frozen=True)
class PolicyLoss:
    """The loss and what a run reports about it; shares and means are weighted by `weight_T`.

    Without a token of positive weight the shares, means and the largest ratio are NaN.
    """

    loss: Tensor
    """Sum over tokens of weight times loss, differentiable in logprob and entropy."""
    loss_T: Tensor
    """Per token, before aggregation; detached. 0 where the weight is 0."""
    logprob_grad_T: Tensor
    """d loss / d logprob_T, detached."""
    entropy_grad_T: Tensor
    """d loss / d entropy_T, detached."""
    weight: float
    """Sum of the weights: what to weigh these numbers by when micro-batches are combined."""
    clipped_low: float
    """Share with a negative advantage whose ratio is below 1 - clip_low."""
    clipped_high: float
    """Share with a positive advantage whose ratio is above 1 + clip_high."""
    clipped_dual: float
    """Share with a negative advantage whose loss is capped by the dual clip."""
    kl_old: float
    """Mean of r - 1 - log r, an estimate of KL(old || current) (nats)."""
    kl_ref: float
    """Mean of the chosen estimator of the KL divergence to the reference (nats); NaN without."""
    ratio_mean: float
    ratio_max: float
    """Over tokens with a positive weight."""


def policy_loss(
    logprob_T: Tensor,
    entropy_T: Tensor,
    *,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    clip_low_T: Tensor | float,
    clip_high_T: Tensor | float,
    dual_clip: float | None = None,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k3",
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """PPO loss (arXiv:1707.06347) with a clip radius per token and side, dual clip and KL penalty.

    The loss of a token is max(-A r, -A clip(r, 1 - low, 1 + high)), capped at -A dual_clip where
    A < 0 (arXiv:1912.09729), plus kl_coef times the KL estimate, minus entropy_coef times the
    entropy; formulas and clamps: csrc/policy_loss.h. `weight_T` is an aggregation's weight per
    token, for example `TokenMean()(...)`: the loss is the weighted sum. A token of weight 0 takes
    no part, whatever its other entries are. Sums run in float64 in token order. The pass over
    [T] runs on the CPU: tensors of another device are copied there and back.

    All tensors are float32 or all float64, of one length, on one device. Raises ValueError
    otherwise, and for a weight or radius below 0, an advantage that is not finite, a dual clip
    <= 1, an unknown estimator, or a KL penalty without a reference.
    """
    _check(logprob_T, "logprob_T", logprob_T)
    low_T, high_T = _per_token(clip_low_T, logprob_T), _per_token(clip_high_T, logprob_T)
    named = {
        "entropy_T": entropy_T,
        "old_logprob_T": old_logprob_T,
        "advantage_T": advantage_T,
        "weight_T": weight_T,
        "clip_low_T": low_T,
        "clip_high_T": high_T,
    }
    if ref_logprob_T is not None:
        named["ref_logprob_T"] = ref_logprob_T
    for name, tensor in named.items():
        _check(tensor, name, logprob_T)
    if kl not in KL_ESTIMATORS:
        raise ValueError(f"kl: expected one of {list(KL_ESTIMATORS)}, got {kl!r}")
    loss, loss_T, logprob_grad_T, entropy_grad_T, totals = _loss_op(
        logprob_T,
        entropy_T,
        *(t.detach() for t in (old_logprob_T, advantage_T, weight_T, low_T, high_T)),
        None if ref_logprob_T is None else ref_logprob_T.detach(),
        float("inf") if dual_clip is None else dual_clip,
        KL_ESTIMATORS[kl],
        kl_coef,
        entropy_coef,
    )
    return _record(loss, loss_T, logprob_grad_T, entropy_grad_T, totals, ref_logprob_T is not None)


def _record(
    loss: Tensor,
    loss_T: Tensor,
    logprob_grad_T: Tensor,
    entropy_grad_T: Tensor,
    totals: Tensor,
    has_reference: bool,
) -> PolicyLoss:
    nan = float("nan")
    weight, *sums, ratio_max = totals.tolist()
    low, high, dual, kl_old, kl_ref, ratio = (s / weight if weight else nan for s in sums)
    return PolicyLoss(
        loss=loss,
        loss_T=loss_T,
        logprob_grad_T=logprob_grad_T,
        entropy_grad_T=entropy_grad_T,
        weight=weight,
        clipped_low=low,
        clipped_high=high,
        clipped_dual=dual,
        kl_old=kl_old,
        kl_ref=kl_ref if has_reference else nan,
        ratio_mean=ratio,
        ratio_max=ratio_max if weight else nan,
    )


def _per_token(value: Tensor | float, like_T: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(like_T, value).detach()


def _check(tensor: Tensor, name: str, logprob_T: Tensor) -> None:
    if logprob_T.ndim != 1 or logprob_T.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "logprob_T: expected float32[T] or float64[T], "
            f"got {logprob_T.dtype}{list(logprob_T.shape)}"
        )
    if tensor.shape != logprob_T.shape or tensor.dtype != logprob_T.dtype:
        raise ValueError(
            f"{name}: expected {logprob_T.dtype}{list(logprob_T.shape)} like logprob_T, "
            f"got {tensor.dtype}{list(tensor.shape)}"
        )
    if tensor.device != logprob_T.device:
        raise ValueError(f"{name}: expected a tensor on {logprob_T.device}, got {tensor.device}")


# -- the op --


@torch.library.custom_op("pyrl::policy_loss", mutates_args=())
def _loss_op(
    logprob: Tensor,
    entropy: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    clip_low: Tensor,
    clip_high: Tensor,
    ref_logprob: Tensor | None,
    dual_clip: float,
    kl: int,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    float32 = logprob.dtype == torch.float32
    kernel: Callable[..., Any] = _core.policy_loss_float32 if float32 else _core.policy_loss_float64
    loss_T, logprob_grad_T, entropy_grad_T, (loss, *totals) = kernel(
        logprob_T=_host(logprob),
        entropy_T=_host(entropy),
        old_logprob_T=_host(old_logprob),
        advantage_T=_host(advantage),
        weight_T=_host(weight),
        clip_low_T=_host(clip_low),
        clip_high_T=_host(clip_high),
        ref_logprob_T=_host(logprob[:0] if ref_logprob is None else ref_logprob),
        dual_clip=dual_clip,
        kl=kl,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
    )
    device = logprob.device
    return (
        torch.tensor(loss, dtype=logprob.dtype, device=device),
        torch.from_numpy(loss_T).to(device),
        torch.from_numpy(logprob_grad_T).to(device),
        torch.from_numpy(entropy_grad_T).to(device),
        torch.tensor(totals, dtype=torch.float64),
    )


def _host(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


@_loss_op.register_fake
def _(
    logprob: Tensor,
    entropy: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    clip_low: Tensor,
    clip_high: Tensor,
    ref_logprob: Tensor | None,
    dual_clip: float,
    kl: int,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss_T, logprob_grad_T, entropy_grad_T = (
        torch.empty(logprob.shape, dtype=logprob.dtype, device=logprob.device) for _ in range(3)
    )
    totals = torch.empty(8, dtype=torch.float64, device="cpu")
    return logprob.new_empty(()), loss_T, logprob_grad_T, entropy_grad_T, totals


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], output[3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True
        raise NotImplementedError(
            "policy_loss: expected to be differentiated once, got a request for second derivatives"
        )
    logprob_grad_T, entropy_grad_T = ctx.saved_tensors
    return (grad_loss * logprob_grad_T, grad_loss * entropy_grad_T, *[None] * 10)


_loss_op.register_autograd(_backward, setup_context=_save)


# -- aggregation: the weight of each token --


class Aggregate(Protocol):
    """The weight of each token in the loss, 0 outside the mask; B counts leaves with a token."""

    def __call__(
        self, leaf_T: NDArray[np.int64], mask_T: NDArray[np.bool_], n_leaves: int
    ) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class TokenMean:
    """Mean over all tokens: 1 / n (arXiv:2503.14476). Long responses weigh more."""

    def __call__(
        self, leaf_T: NDArray[np.int64], mask_T: NDArray[np.bool_], n_leaves: int
    ) -> NDArray[np.float64]:
        return _weights(mask_T, _tokens(leaf_T, mask_T, n_leaves).sum())


@dataclass(frozen=True)
class TokenSum:
    """Sum over all tokens."""

    def __call__(
        self, leaf_T: NDArray[np.int64], mask_T: NDArray[np.bool_], n_leaves: int
    ) -> NDArray[np.float64]:
        _tokens(leaf_T, mask_T, n_leaves)
        return _weights(mask_T, 1.0)


@dataclass(frozen=True)
class SeqMeanTokenMean:
    """Mean over leaves of the mean over their tokens: 1 / (B l_i) (arXiv:2402.03300)."""

    def __call__(
        self, leaf_T: NDArray[np.int64], mask_T: NDArray[np.bool_], n_leaves: int
    ) -> NDArray[np.float64]:
        tokens_N = _tokens(leaf_T, mask_T, n_leaves)
        return _weights(mask_T, np.count_nonzero(tokens_N) * tokens_N[leaf_T])


@dataclass(frozen=True)
class SeqMeanTokenSum:
    """Mean over leaves of the sum over their tokens: 1 / B."""

    def __call__(
        self, leaf_T: NDArray[np.int64], mask_T: NDArray[np.bool_], n_leaves: int
    ) -> NDArray[np.float64]:
        return _weights(mask_T, np.count_nonzero(_tokens(leaf_T, mask_T, n_leaves)))


@dataclass(frozen=True)
class SeqMeanTokenSumNorm:
    """Mean over leaves of the sum over their tokens / length: 1 / (B length) (arXiv:2503.20783).

    Divides by B, as newer verl does; older verl did not.
    """

    length: float
    """A constant, such as the largest response length: not the length of any leaf."""

    def __post_init__(self) -> None:
        if not self.length > 0:
            raise ValueError(f"length: expected > 0, got {self.length}")

    def __call__(
        self, leaf_T: NDArray[np.int64], mask_T: NDArray[np.bool_], n_leaves: int
    ) -> NDArray[np.float64]:
        leaves = np.count_nonzero(_tokens(leaf_T, mask_T, n_leaves))
        return _weights(mask_T, leaves * self.length)


def _tokens(
    leaf_T: NDArray[np.int64], mask_T: NDArray[np.bool_], n_leaves: int
) -> NDArray[np.int64]:
    """Tokens inside the mask of each leaf."""
    if leaf_T.ndim != 1 or leaf_T.dtype != np.int64:
        raise ValueError(f"leaf_T: expected int64[T], got {leaf_T.dtype}{list(leaf_T.shape)}")
    if mask_T.shape != leaf_T.shape or mask_T.dtype != np.bool_:
        raise ValueError(
            f"mask_T: expected bool{list(leaf_T.shape)} like leaf_T, "
            f"got {mask_T.dtype}{list(mask_T.shape)}"
        )
    if leaf_T.size and not (leaf_T.min() >= 0 and leaf_T.max() < n_leaves):
        raise ValueError(
            f"leaf_T: expected 0 <= leaf < {n_leaves}, got {leaf_T.min()} to {leaf_T.max()}"
        )
    return np.bincount(leaf_T[mask_T], minlength=n_leaves)


def _weights(mask_T: NDArray[np.bool_], divisor: Any) -> NDArray[np.float64]:
    weight_T = np.zeros(mask_T.shape)
    np.divide(1.0, divisor, out=weight_T, where=mask_T)
    return weight_T
