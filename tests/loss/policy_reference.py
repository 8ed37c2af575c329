"""Policy losses, slow and obvious: tokens that take part, response by response, torch's autograd.

Every token outside the mask is removed first, so that nothing here knows of masks.
"""

from __future__ import annotations

import math

import torch
from policy_reference_axes import (
    Batch,
    estimate,
    factor_of,
    facts,
    heat_of,
    keeps,
    number,
    penalty_of,
    reshaped,
    spread,
)
from torch import Tensor

from pyrl import loss as axes
from pyrl.loss.aggregate import (
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)


def reference_loss(loss: axes.Loss, batch: Batch) -> Tensor:
    """The aggregated loss, differentiable in logprob, entropy and nucleus entropy."""
    if not len(batch):
        return torch.zeros((), dtype=torch.float64)
    whole = batch
    for reshape in loss.reshape:
        advantage = reshaped(reshape, batch)
        batch = Batch({**batch.columns, "advantage_T": advantage}, *rest(batch))
    factor = torch.ones(len(batch), dtype=torch.float64)
    for axis in (loss.behaviour, loss.weight):
        if axis is not None:
            factor = factor * factor_of(axis, batch)
    leaves = [True] * len(batch)
    for keep in loss.keep:
        stays = [
            keeps(keep, batch, t, found)
            for found in [facts(keep, batch)]
            for t in range(len(batch))
        ]
        if keep.shrink:
            leaves = [a and b for a, b in zip(leaves, stays, strict=True)]
        else:
            factor = factor * torch.tensor(stays, dtype=torch.float64)
    extra = [penalty_of(p, batch) for p in loss.penalties]
    heat = heat_of(batch["entropy"]) if "entropy_T" in batch.columns else factor
    whole = batch
    batch = batch.only(leaves)
    if not len(batch):
        return sum((e for e in extra if e.ndim == 0), torch.zeros((), dtype=torch.float64))
    rows = [t for t in range(len(whole)) if leaves[t]]
    value = surrogate(loss, batch, heat[rows]) * factor[rows]
    for e in extra:
        value = value + (e[rows] if e.ndim else 0.0)
    if loss.kl.coef:
        value = value + loss.kl.coef * estimate(loss.kl.estimator, batch["logprob"] - batch["ref"])
    value = value - loss.entropy * batch["entropy"]
    return (weights(loss, batch) * value).sum() + sum(e for e in extra if e.ndim == 0)


def rest(batch: Batch) -> tuple[list[int], list[int], list[int], axes.LossState]:
    return batch.leaf, batch.index, batch.group, batch.state


def weights(loss: axes.Loss, batch: Batch) -> Tensor:
    n = len(batch.responses())
    match loss.aggregate:
        case TokenMean():
            return torch.full((len(batch),), 1 / len(batch), dtype=torch.float64)
        case TokenSum():
            return torch.ones(len(batch), dtype=torch.float64)
        case SeqMeanTokenMean():
            return spread(
                batch,
                [torch.tensor(1 / (n * len(r)), dtype=torch.float64) for r in batch.responses()],
            )
        case SeqMeanTokenSum():
            return torch.full((len(batch),), 1 / n, dtype=torch.float64)
        case SeqMeanTokenSumNorm(length):
            return torch.full((len(batch),), 1 / (n * length), dtype=torch.float64)
    raise AssertionError(loss.aggregate)


def log_ratio(loss: axes.Loss, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log of the ratio with a straight-through gradient, and of each token alone."""
    logprob = batch["logprob"]
    if loss.ratio.of == "one":
        return logprob - logprob, logprob - logprob
    own = logprob - batch[f"{loss.ratio.to}_logprob"]
    if loss.ratio.of == "token":
        return own.clamp(-20, 20), own
    d, e = own.detach().clone(), loss.ratio.pre_clip
    if e is not None:
        for t, a in enumerate(batch["advantage"].tolist()):
            d[t] = 0.0 if a == 0 else min(d[t], e) if a > 0 else max(d[t], -e)
    value = d.clone()
    for rows in batch.responses():
        part = [number(d[t]) for t in rows]
        near = [min(max(x, -20.0), 20.0) for x in part]
        for i, t in enumerate(rows):
            match loss.ratio.of:
                case "seq_geo":
                    value[t] = sum(part) / len(part)
                case "seq_prod":
                    value[t] = sum(part)
                case "cum_prod":
                    value[t] = sum(near[: i + 1])
                case "cum_geo":
                    value[t] = sum(near[: i + 1]) / (i + 1)
                case "min_prefix":
                    value[t] = part[i] + min(part[:i], default=0.0)
    result = value + logprob - logprob.detach()
    if loss.ratio.of == "min_prefix":
        return result.clamp(-20, 20), own
    return result.clamp(max=10), own


def surrogate(loss: axes.Loss, batch: Batch, heat: Tensor) -> Tensor:
    """The policy term of each token, after the dual clip."""
    log, own = log_ratio(loss, batch)
    logprob, advantage = batch["logprob"], batch["advantage"]
    out = []
    tested = (logprob - batch["old_logprob"]).clamp(-20, 20).exp().tolist()
    position = {t: i for rows in batch.responses() for i, t in enumerate(rows, 1)}
    for t in range(len(batch)):
        r, a, h = log[t].exp(), number(advantage[t]), number(heat[t])
        e, of_token = loss.ratio.pre_clip, logprob[t]
        if e is not None and (number(own[t]) > e if a > 0 else number(own[t]) < -e):
            r, of_token = r.detach(), of_token.detach()
        low, high, dual = -math.inf, math.inf, loss.dual or math.inf
        match loss.bounds:
            case axes.Clip(lo, hi):
                low, high = 1 - lo, 1 + hi
            case axes.Range(lo, hi):
                low, high = lo, hi
            case axes.PositionClip(lo, hi, cap, power):
                grown = position[t] ** power
                low, high = math.exp(-lo * grown), math.exp(hi * grown)
                dual = math.exp(cap * grown)
            case axes.EntropyClip(lo, hi, alpha):
                low = 1 - lo * (1 - alpha * min(h, 0.0))
                high = 1 + hi * (1 + alpha * max(h, 0.0))
        if loss.redistribute:
            inside = (1 + low) / 2 < number(r) < (1 + high) / 2
            if inside != (h > 0):
                a *= 1 + loss.redistribute * h
        seen = tested[t] if loss.trust == "old" else number(r)
        cut = (a > 0 and seen > high) or (a < 0 and seen < low)
        if isinstance(loss.bounds, axes.TotalVariation | axes.BinaryKL):
            cut = diverged(loss.bounds, number(logprob[t]), number(batch["old_logprob"][t]), a)
        value = one_surrogate(loss, r, a, low, high, cut, of_token)
        if a < 0 and number(value) > -a * dual:
            value = value * 0 - a * dual
        out.append(value)
    return torch.stack(out)


def one_surrogate(loss, r, a, low, high, cut, logprob) -> Tensor:
    bound = r.detach().clamp(low, high)
    match loss.surrogate:
        case axes.Clipped():
            return -a * (bound if cut else r)
        case axes.MaskedLogp(cap):
            weight = 0.0 if cut else min(number(r), math.inf if cap is None else cap)
            return -a * weight * logprob
        case axes.ClampedLogp():
            return -a * bound * logprob
        case axes.SoftClipped(outer_low, outer_high, scaled):
            if not cut:
                return -a * r
            outer = (outer_low if a < 0 else outer_high) * bound
            shown = outer if scaled else bound
            return -a * (outer * (logprob - logprob.detach()) + shown)
        case axes.Sigmoid(positive, other):
            tau = positive if a > 0 else other
            return -a * 4 / tau * torch.sigmoid(tau * (r - 1))
    raise AssertionError(loss.surrogate)


def diverged(bounds, logprob: float, old: float, a: float) -> bool:
    p, q = math.exp(logprob), math.exp(old)
    if isinstance(bounds, axes.TotalVariation):
        return (a > 0 and p - q > bounds.delta) or (a < 0 and p - q < -bounds.delta)
    kl = q * (old - logprob) + (1 - q) * math.log((1 - q) / (1 - p))
    return kl > bounds.delta and ((a > 0 and p > q) or (a < 0 and p < q))
