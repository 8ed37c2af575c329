"""Slow and obvious versions of the numeric kernels, in float64, and how to compare with them."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl.logits.sampling import Sampling
from pyrl.logits.token_stats import TokenStats

FIELDS = ("logprob", "entropy", "logsumexp", "confidence")


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & 0xFFFFFFFF,
            (first >> 32) ^ c3 ^ k1,
            first & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    key = (seed & 0xFFFFFFFF, seed >> 32)
    high, low, _, _ = philox((position & 0xFFFFFFFF, position >> 32, 0, 0), key)
    return float(((high << 32 | low) >> 11) / 2**53)


def probabilities(logits_V: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Distribution that tokens are drawn from, truncation included."""
    result_V = np.zeros(len(logits_V))
    if sampling.temperature == 0:
        result_V[np.argmax(logits_V)] = 1
        return result_V
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    weight_V = np.exp(scaled_V)
    order = sorted(range(len(logits_V)), key=lambda v: (-logits_V[v], v))
    kept = [v for v in order if weight_V[v] > 0 and weight_V[v] >= sampling.min_p]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    mass = math.fsum(weight_V[kept])
    nucleus, cumulative = [], 0.0
    for v in kept:
        if cumulative >= sampling.top_p * mass and sampling.top_p < 1:
            break
        nucleus.append(v)
        cumulative += weight_V[v]
    if sampling.top_h < 1:
        entropy, whole = entropies(weight_V[nucleus]), entropies(weight_V[weight_V > 0])[-1]
        nucleus = nucleus[: max(1, int((entropy <= sampling.top_h * whole).sum()))]
    result_V[nucleus] = weight_V[nucleus] / math.fsum(weight_V[nucleus])
    return result_V


def entropies(weight_V: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy (nats) of the first 1, 2, ... of these, renormalised."""
    mass_V = np.cumsum(weight_V)
    return np.log(mass_V) - np.cumsum(weight_V * np.log(weight_V)) / mass_V


def draw(probability_V: NDArray[np.float64], number: float) -> int:
    """Inverse distribution function in vocabulary order."""
    return int(np.argmax(np.cumsum(probability_V) > number))


def token_stats(
    logits_TV: Tensor, label_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, logsumexp and confidence; differentiable; zeros where the label is -100."""
    scaled_TV = logits_TV.double() / temperature
    logprob_TV = scaled_TV.log_softmax(dim=1)
    kept_T = label_T != -100
    chosen_T = logprob_TV.gather(1, label_T.clamp(min=0)[:, None])[:, 0]
    finite_TV = logprob_TV.masked_fill(logprob_TV == -math.inf, 0.0)
    entropy_T = -(logprob_TV.exp() * finite_TV).sum(dim=1)
    top_TK = logprob_TV.exp().topk(min(5, logits_TV.shape[1]), dim=1).values
    stats = (chosen_T, entropy_T, scaled_TV.logsumexp(dim=1), top_TK.sum(dim=1).detach())
    chosen, entropy, logsumexp, confidence = (value.where(kept_T, 0.0) for value in stats)
    return chosen, entropy, logsumexp, confidence


def policy_loss(
    logprob_T: Tensor,
    entropy_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    clip_low_T: Tensor,
    clip_high_T: Tensor,
    dual_clip: float | None,
    ref_logprob_T: Tensor,
    kl: str,
    kl_coef: float,
    entropy_coef: float,
) -> Tensor:
    """Loss of each token, differentiable."""
    ratio_T = (logprob_T - old_logprob_T).clamp(-20, 20).exp()
    clipped_T = torch.minimum(torch.maximum(ratio_T, 1 - clip_low_T), 1 + clip_high_T)
    loss_T = torch.maximum(-advantage_T * ratio_T, -advantage_T * clipped_T)
    if dual_clip is not None:
        capped_T = torch.minimum(loss_T, -advantage_T * dual_clip)
        loss_T = torch.where(advantage_T < 0, capped_T, loss_T)
    difference_T = logprob_T - ref_logprob_T
    clamped_T = difference_T.clamp(-20, 20)
    penalty_T = {
        "k1": difference_T,
        "k2": difference_T**2 / 2,
        "k3": (torch.exp(-clamped_T) + clamped_T - 1).clamp(-10, 10),
    }[kl]
    return loss_T + kl_coef * penalty_T - entropy_coef * entropy_T


def weighted_sum(logprob_T: Tensor, entropy_T: Tensor, logsumexp_T: Tensor) -> Tensor:
    """A scalar with a different upstream gradient for each token and output."""
    weight_T = torch.arange(1.0, len(logprob_T) + 1, dtype=torch.float64, device=logprob_T.device)
    return (weight_T * (logprob_T - 0.7 * entropy_T + 0.4 * logsumexp_T / weight_T)).sum()


def assert_stats(stats: TokenStats, expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, value in zip(FIELDS, expected, strict=True):
        ours = getattr(stats, name).detach().double().cpu()
        torch.testing.assert_close(ours, value.detach(), rtol=1e-6, atol=tolerance, msg=name)
