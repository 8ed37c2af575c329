"""Policy losses composed of torch operations, as trainers write them: [responses, tokens], no mask.

The peer of bench_policy_loss.py. Gradients are autograd's; ratios of several tokens go straight
through to the token, as in the released code of GSPO and CTPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrl import loss as axes
from pyrl.loss.aggregate import (
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
)

Columns = dict[str, Tensor]
GROUP = 8
"""Responses of a question."""


@dataclass(frozen=True)
class Ratio:
    value: Tensor
    log: Tensor


def torch_loss(loss: axes.Loss, c: Columns, state: axes.LossState) -> Tensor:
    """The aggregated loss, differentiable in logprob_T, entropy_T and nucleus_entropy_T."""
    advantage = reshaped(loss, c, state)
    ratio = ratio_of(loss, c, advantage)
    value = surrogate(loss, c, advantage, ratio)
    if isinstance(loss.bounds, axes.PositionClip):
        cap = -advantage * torch.exp(loss.bounds.dual * positions(ratio.value) ** loss.bounds.power)
        value = torch.where(advantage < 0, torch.minimum(value, cap), value)
    elif loss.dual is not None:
        capped = torch.minimum(value, -advantage * loss.dual)
        value = torch.where(advantage < 0, capped, value)
    for factor in (loss.behaviour, loss.weight):
        if factor is not None:
            value = value * factor_of(factor, c, advantage, ratio)
    kept: Tensor | None = None
    for keep in loss.keep:
        stays = keep_of(keep, loss, c, advantage, ratio)
        value = value * stays
        if keep.shrink:
            kept = stays if kept is None else kept * stays
    for penalty in loss.penalties:
        value = value + penalty_of(penalty, c, advantage, state)
    if loss.entropy:
        value = value - loss.entropy * c["entropy_T"]
    return aggregated(loss, value, kept)


def positions(like: Tensor) -> Tensor:
    return torch.arange(1, like.shape[1] + 1, dtype=like.dtype)


def heat_of(entropy: Tensor) -> Tensor:
    x = entropy.clamp(min=1e-8).log()
    pivot = x.flatten().kthvalue(1 + round(0.8 * (x.numel() - 1))).values
    h = x - pivot
    return torch.where(h > 0, h / h.max(), h / h.min().abs())


def reshaped(loss: axes.Loss, c: Columns, state: axes.LossState) -> Tensor:
    advantage = c["advantage_T"]
    for reshape in loss.reshape:
        match reshape:
            case axes.EntropyZ(scale):
                entropy = c["entropy_T"].detach()
                z = (entropy - entropy.mean()) / entropy.std()
                advantage = advantage * (1 + scale * z)
            case axes.Blend(target, limit):
                share = (c["reward_T"][:, 0] > 0).double().mean().item()
                assert state.entropy is not None
                a = min(abs(target - state.entropy), limit) / share
                rho = torch.exp(c["second_logprob_T"] - c["old_logprob_T"])
                alpha = a / (1 + a)
                advantage = (1 - alpha) * advantage + alpha * c["reward_T"] * rho
            case axes.TokenGroup():
                reward = c["reward_T"].view(-1, GROUP * c["reward_T"].shape[1])
                mean, std = reward.mean(1, keepdim=True), reward.std(1, False, keepdim=True)
                advantage = ((reward - mean) / (std + 1e-6)).view_as(advantage)
            case axes.EntropyBand() as band:
                low, high = band.band(state.progress)
                entropy = c["entropy_T"].detach().mean().item()
                if entropy > high:
                    advantage = c["reward_T"].clamp(min=0)
                elif entropy < low:
                    advantage = c["reward_T"].clamp(max=0)
    return advantage


def ratio_of(loss: axes.Loss, c: Columns, advantage: Tensor) -> Ratio:
    logprob = c["logprob_T"]
    if loss.ratio.of == "one":
        return Ratio(torch.ones_like(logprob), logprob)
    d = logprob - c[f"{loss.ratio.to}_logprob_T"]
    if loss.ratio.of == "token":
        d = d.clamp(-20, 20)
        return Ratio(d.exp(), d)
    if loss.ratio.pre_clip is not None:  # GMPO, which is differentiated as it is
        e, sign = loss.ratio.pre_clip, advantage.sign()
        cut = sign * torch.minimum(sign * d, sign * d.clamp(-e, e))
        log = cut.mean(1, keepdim=True).expand_as(d)
        return Ratio(log.exp(), log)
    fixed = d.detach()
    match loss.ratio.of:
        case "seq_geo":
            log = fixed.mean(1, keepdim=True)
        case "seq_prod":
            log = fixed.sum(1, keepdim=True)
        case "cum_prod":
            log = fixed.clamp(-20, 20).cumsum(1)
        case "cum_geo":
            log = fixed.clamp(-20, 20).cumsum(1) / positions(d)
        case "min_prefix":
            least = fixed.cummin(1).values
            log = fixed + torch.nn.functional.pad(least[:, :-1], (1, 0))
    log = (log + (logprob - logprob.detach())).clamp(max=10)
    return Ratio(log.exp(), log)


def surrogate(loss: axes.Loss, c: Columns, advantage: Tensor, ratio: Ratio) -> Tensor:
    r = ratio.value
    low, high = limits(loss, c, ratio)
    logprob = c["logprob_T"]
    match loss.surrogate:
        case axes.Clipped():
            if low is None:
                value = r
            elif loss.redistribute:
                return hapo(loss, c, advantage, r, low, high)
            else:
                return torch.maximum(-advantage * r, -advantage * torch.clamp(r, low, high))
        case axes.MaskedLogp(cap):
            weight = r.detach() if cap is None else r.detach().clamp(max=cap)
            if inside := masked(loss, c, advantage, r.detach()):
                weight = torch.where(inside[0], weight, 0.0)
            value = weight * logprob
        case axes.ClampedLogp():
            value = torch.clamp(r, low, high).detach() * logprob
        case axes.SoftClipped(outer_low, outer_high, scaled):
            through = r / r.detach()
            below = (advantage < 0) & (r < low)
            above = (advantage > 0) & (r > high)
            shown = low if scaled is False else outer_low * low
            floor = outer_low * low * through + (shown - outer_low * low)
            value = torch.where(below, floor, torch.where(above, outer_high * high * through, r))
        case axes.Sigmoid(positive, other):
            tau = torch.where(advantage > 0, advantage.new_tensor(positive), other)
            value = 4 / tau * torch.sigmoid(tau * (r - 1))
    return -advantage * value


def limits(loss: axes.Loss, c: Columns, ratio: Ratio) -> tuple:
    match loss.bounds:
        case axes.Clip(low, high):
            return 1 - low, 1 + high
        case axes.Range(low, high):
            return low, high
        case axes.PositionClip(low, high, _, power):
            grown = positions(ratio.value) ** power
            return torch.exp(-low * grown), torch.exp(high * grown)
        case axes.EntropyClip(low, high, alpha):
            heat = heat_of(c["entropy_T"].detach())
            return 1 - low * (1 - alpha * heat.clamp(max=0)), 1 + high * (
                1 + alpha * heat.clamp(min=0)
            )
    return None, None


def hapo(loss, c, advantage, r, low, high) -> Tensor:
    heat = heat_of(c["entropy_T"].detach())
    inside = (r > (1 + low) / 2) & (r < (1 + high) / 2)
    chosen = torch.where(heat > 0, ~inside, inside)
    advantage = torch.where(chosen, advantage * (1 + loss.redistribute * heat), advantage).detach()
    value = torch.maximum(-advantage * r, -advantage * torch.clamp(r, low, high))
    return torch.where(advantage < 0, torch.minimum(value, -advantage * loss.dual), value)


def masked(loss: axes.Loss, c: Columns, advantage: Tensor, r: Tensor) -> tuple[Tensor] | None:
    logprob, old = c["logprob_T"].detach(), c["old_logprob_T"]
    match loss.bounds:
        case axes.Clip(low, high):
            tested = (logprob - old).clamp(-20, 20).exp() if loss.trust == "old" else r
            least, most = 1 - low, 1 + high
        case axes.TotalVariation(delta):
            tested, least, most = logprob.exp() - old.exp(), -delta, delta
        case axes.BinaryKL(delta):
            p, q = logprob.exp(), old.exp()
            others = torch.log((1 - q).clamp(min=1e-12)) - torch.log((1 - p).clamp(min=1e-12))
            kl = q * (old - logprob) + (1 - q) * others
            tested, least, most = torch.where(p < q, -kl, kl), -delta, delta
        case _:
            return None
    return (~((advantage > 0) & (tested > most) | (advantage < 0) & (tested < least)),)


def factor_of(factor, c: Columns, advantage: Tensor, ratio: Ratio) -> Tensor:
    match factor:
        case axes.TIS(cap, level, floor, _):
            x = c["old_logprob_T"] - c["rollout_logprob_T"]
            x = x if level == "token" else x.sum(1, keepdim=True)
            return x.clamp(-20, 20).exp().clamp(floor, cap)
        case axes.IcePop(low, high):
            rho = (c["old_logprob_T"] - c["rollout_logprob_T"]).clamp(-20, 20).exp()
            return torch.where((rho >= low) & (rho <= high), rho, 0.0)
        case axes.Steer("linear", least, most):
            logprob, entropy = c["logprob_T"].detach(), c["entropy_T"].detach()
            r = ratio.value.detach()
            omega = (r * advantage * (1 - logprob.exp()) * (logprob + entropy)).abs()
            span = (omega - omega.min()) / (omega.max() - omega.min())
            return (most - span * (most - least)).clamp(least, most)
    raise AssertionError(factor)


def keep_of(keep, loss: axes.Loss, c: Columns, advantage: Tensor, ratio: Ratio) -> Tensor:
    logprob, entropy = c["logprob_T"].detach(), c["entropy_T"].detach()
    match keep:
        case axes.Matched(low, high, _, level):
            x = c["old_logprob_T"] - c["rollout_logprob_T"]
            x = x if level == "token" else x.mean(1, keepdim=True).expand_as(x)
            rho = x.exp()
            return ((rho >= low) & (rho <= high)).to(x.dtype)
        case axes.NearGenerator(gamma):
            kl = (c["rollout_logprob_T"] - c["old_logprob_T"]).sum(1, keepdim=True)
            return ((advantage > 0) | (kl < gamma)).to(kl.dtype)
        case axes.ClipCov(low, high, share):
            cov = (advantage - advantage.mean()) * (logprob - logprob.mean())
            r = ratio.value.detach()
            clipped = (advantage > 0) & (r > 2) | (advantage < 0) & (r < 0)
            found = ((cov > low) & (cov < high) & ~clipped).flatten().nonzero()[:, 0]
            count = max(1, int(share * cov.numel()))
            keep = torch.ones_like(cov)
            keep.view(-1)[found[torch.randperm(len(found))[:count]]] = 0
            return keep
        case axes.ClipB(mu):
            old = c["old_logprob_T"]
            score = old.exp() * (entropy + old)
            least = score.mean() - mu * score.std(False)
            return (~((advantage < 0) & (score < least))).to(score.dtype)
        case axes.ClipV(mu, max_share):
            old = c["old_logprob_T"]
            x = entropy * c["sum_p2_T"] + c["sum_p2_logp_T"] - old.exp() * (entropy + old)
            drop = (~(advantage > 0) & (x > mu * x.std(False))).flatten()
            count = max(1, int(max_share * x.numel()))
            keep = torch.ones_like(x)
            worst = torch.where(drop, x.flatten(), -torch.inf).topk(count)
            keep.view(-1)[worst.indices[worst.values > -torch.inf]] = 0
            return keep
        case axes.TopEntropy(share):
            # torch.quantile refuses more than 2^24 numbers and sorts; kthvalue selects.
            position = (1 - share) * (entropy.numel() - 1)
            below, above = (
                entropy.flatten().kthvalue(int(k) + 1).values for k in (position, position + 1)
            )
            threshold = below + (position - int(position)) * (above - below)
            return (entropy >= threshold).to(entropy.dtype)
    raise AssertionError(keep)


def penalty_of(penalty, c: Columns, advantage: Tensor, state: axes.LossState) -> Tensor:
    logprob = c["logprob_T"]
    match penalty:
        case axes.ExpertLeak(coef, slope, passed):
            side = torch.where(c["reward_T"] > passed, logprob.new_tensor(-1.0), 1.0)
            x = side * (logprob - c["expert_logprob_T"])
            return coef * advantage.abs() * torch.nn.functional.leaky_relu(x, slope)
        case axes.EntropySmoothing(coef, height, low, high):
            entropy, mean = c["entropy_T"].detach(), state.entropy
            assert mean is not None
            inside = (entropy > low * mean) & (entropy < high * mean)
            return coef * height * (~inside).to(entropy.dtype)
        case axes.NucleusAnchor(coef, quantile):
            nucleus = c["nucleus_entropy_T"]
            least = torch.quantile(nucleus.detach(), quantile, dim=1, keepdim=True)
            mask = (nucleus.detach() > least).to(nucleus.dtype)
            mean = ((nucleus * mask).sum(1) / mask.sum(1)).mean()
            assert state.nucleus_entropy is not None
            # As an addend of each token, whatever the aggregation: of a whole mini-batch.
            return coef * (mean - state.nucleus_entropy) ** 2 * scale_of(logprob)
        case axes.Penalty(coef, "k2", "old"):
            return coef * (logprob - c["old_logprob_T"]) ** 2 / 2
        case axes.Penalty(coef, "abs", "old", axes.TopCovariance(share)):
            now = logprob.detach()
            cov = ((advantage - advantage.mean()) * (now - now.mean())).flatten()
            chosen = cov.topk(max(1, int(share * cov.numel()))).indices
            select = torch.zeros_like(cov)
            select[chosen] = 1
            return coef * (logprob - c["old_logprob_T"]).abs() * select.view_as(logprob)
        case axes.Penalty(coef, "k3", "proxy", axes.Improbable(share)):
            now, proxy = logprob.detach(), c["proxy_logprob_T"]
            negative = now[advantage < 0]
            k = max(1, int(share * negative.numel()))
            chosen = (advantage < 0) & (now <= negative.kthvalue(k).values) & (now < proxy)
            q = torch.where(chosen, proxy - logprob, 0.0).clamp(-20, 20)
            return coef * (q.exp() - q - 1).clamp(-10, 10)
    raise AssertionError(penalty)


def scale_of(like: Tensor) -> float:
    """Undoes `SeqMeanTokenSumNorm`, which siren aggregates with."""
    return 1024.0 / like.shape[1]


def aggregated(loss: axes.Loss, value: Tensor, kept: Tensor | None) -> Tensor:
    rows = len(value)
    match loss.aggregate:
        case TokenMean():
            return value.mean() if kept is None else value.sum() / kept.sum()
        case SeqMeanTokenMean():
            return value.mean(1).mean()
        case SeqMeanTokenSum():
            return value.sum(1).mean()
        case SeqMeanTokenSumNorm(length):
            return value.sum() / (rows * length)
    raise AssertionError(loss.aggregate)
