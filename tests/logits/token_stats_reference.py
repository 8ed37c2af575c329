"""Slow and obvious statistics of tokens, in float64, differentiable by torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrl.logits.token_stats import STATS, TokenStats

DIFFERENTIABLE = STATS[:5]
EVERYTHING = {
    "top_k": 5,
    "self_certainty": True,
    "max_probability": True,
    "squares": True,
    "kept_share": 0.02,
    "second_temperature": 1.3,
    "nucleus": 0.8,
}
"""Asks token_stats for every statistic."""


def capped(logits_TV: Tensor, softcap: float | None) -> Tensor:
    """A mask stays a mask."""
    wide_TV = logits_TV.double()
    if softcap is None:
        return wide_TV
    return (softcap * torch.tanh(wide_TV / softcap)).where(wide_TV > -math.inf, -math.inf)


def token_stats(
    logits_TV: Tensor,
    label_T: Tensor,
    temperature: float = 1.0,
    *,
    softcap: float | None = None,
    top_k: int = 5,
    kept_share: float = 0.02,
    second_temperature: float = 1.3,
    nucleus: float = 0.8,
    nucleus_keeps_crossing: bool = True,
) -> dict[str, Tensor]:
    """Every statistic; 0 where the label is -100, NaN where it is outside the vocabulary."""
    z_TV = capped(logits_TV, softcap)
    vocabulary = z_TV.shape[1]
    logprob_TV = (z_TV / temperature).log_softmax(dim=1)
    p_TV = logprob_TV.exp()
    finite_TV = logprob_TV.masked_fill(logprob_TV == -math.inf, 0.0)
    index_T1 = label_T.clamp(0, vocabulary - 1)[:, None]
    logsumexp_T = (z_TV / temperature).logsumexp(dim=1)
    second_TV = (z_TV / second_temperature).log_softmax(dim=1)
    inside_TV = nucleus_of(z_TV, p_TV, nucleus, nucleus_keeps_crossing)
    stats = {
        "logprob": logprob_TV.gather(1, index_T1)[:, 0],
        "entropy": -(p_TV * finite_TV).sum(dim=1),
        "logsumexp": logsumexp_T,
        "self_certainty": logsumexp_T - (z_TV / temperature).mean(dim=1) - math.log(vocabulary),
        **nucleus_stats(z_TV, logprob_TV, inside_TV),
        "confidence": p_TV.topk(min(top_k, vocabulary), dim=1).values.sum(dim=1),
        "max_probability": p_TV.amax(dim=1),
        "sum_p2": (p_TV**2).sum(dim=1),
        "sum_p2_logp": (p_TV**2 * finite_TV).sum(dim=1),
        "kept_mass": p_TV.where(z_TV >= kept_from(z_TV, kept_share, temperature), 0).sum(dim=1),
        "second_logprob": second_TV.gather(1, index_T1)[:, 0],
    }
    outside_T = (label_T != -100) & ((label_T < 0) | (label_T >= vocabulary))
    return {
        name: value.where(label_T != -100, 0.0).where(~outside_T, math.nan)
        for name, value in stats.items()
    }


def kept_from(z_TV: Tensor, kept_share: float, temperature: float) -> Tensor:
    """The smallest logit [T, 1] with p >= kept_share * max p."""
    return z_TV.amax(dim=1, keepdim=True) + math.log(kept_share) * temperature


def nucleus_of(z_TV: Tensor, p_TV: Tensor, mass: float, keeps_crossing: bool) -> Tensor:
    """Which tokens are inside: token by token from the most probable one."""
    inside_TV = torch.zeros(z_TV.shape, dtype=torch.bool)
    for t in range(z_TV.shape[0]):
        order = z_TV[t].argsort(descending=True)
        reached = p_TV[t, order].cumsum(0) >= mass
        crossing = order[int(reached.int().argmax())] if reached.any() else order[-1]
        if keeps_crossing:
            inside_TV[t] = z_TV[t] >= z_TV[t, crossing]
        else:
            inside_TV[t] = z_TV[t] > z_TV[t, crossing]
    return inside_TV & (z_TV > -math.inf)


def nucleus_stats(z_TV: Tensor, logprob_TV: Tensor, inside_TV: Tensor) -> dict[str, Tensor]:
    """An empty nucleus has no entropy, no mass and no token at or above its threshold."""
    entropy_T, threshold_T, log_mass_T = [], [], []
    for z_V, logprob_V, inside_V in zip(z_TV, logprob_TV, inside_TV, strict=True):
        logq_N = logprob_V[inside_V].log_softmax(dim=0)
        entropy_T.append(-(logq_N.exp() * logq_N).sum())
        threshold_T.append(z_V[inside_V].amin() if inside_V.any() else z_V.new_tensor(math.inf))
        log_mass_T.append(logprob_V[inside_V].logsumexp(dim=0))
    columns = (entropy_T, threshold_T, log_mass_T)
    names = ("nucleus_entropy", "nucleus_threshold", "nucleus_log_mass")
    return {
        name: torch.stack(column) if column else z_TV.new_empty(0)
        for name, column in zip(names, columns, strict=True)
    }


def given(stats: TokenStats) -> dict[str, Tensor]:
    """The statistics that were asked for."""
    values = {name: getattr(stats, name) for name in STATS}
    return {name: value for name, value in values.items() if value is not None}


def assert_stats(stats: TokenStats, expected: dict[str, Tensor], tolerance: float) -> None:
    """Every statistic that was asked for is the reference's, absolutely or to one in a million."""
    for name, value in given(stats).items():
        torch.testing.assert_close(
            value.detach().cpu(),
            expected[name].detach(),
            rtol=1e-6,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def weighted_sum(stats: dict[str, Tensor]) -> Tensor:
    """A scalar with another upstream gradient for each token and differentiable statistic."""
    total = torch.zeros((), dtype=torch.float64)
    for k, name in enumerate(DIFFERENTIABLE):
        if name in stats:
            weight_T = torch.linspace(0.3 + k, 2.0 - k, stats[name].shape[0], dtype=torch.float64)
            total = total + (weight_T.to(stats[name].device) * stats[name]).sum().cpu()
    return total
