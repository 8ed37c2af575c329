"""Policy losses, slow and obvious: tokens that take part, response by response, torch's autograd.

Every token outside the mask is removed first, so that nothing here knows of masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from kernel_reference import uniform
from torch import Tensor

from pyrl import loss as axes
from pyrl import loss_axes
from pyrl.aggregate import (
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)


@dataclass
class Batch:
    """Columns of the tokens that take part, and the response and index of each."""

    columns: dict[str, Tensor]
    leaf: list[int]
    index: list[int]
    group: list[int]
    state: axes.LossState

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[f"{name}_T"]

    def __len__(self) -> int:
        return len(self.leaf)

    def responses(self) -> list[list[int]]:
        return [[t for t in range(len(self)) if self.leaf[t] == n] for n in sorted(set(self.leaf))]

    def only(self, kept: list[bool]) -> Batch:
        rows = [t for t in range(len(self)) if kept[t]]
        return Batch(
            {name: value[rows] for name, value in self.columns.items()},
            [self.leaf[t] for t in rows],
            [self.index[t] for t in rows],
            self.group,
            self.state,
        )


def number(value: Tensor) -> float:
    return float(value.detach())


def spread(batch: Batch, value: list[Tensor]) -> Tensor:
    """One number per response as one per token."""
    out = torch.zeros(len(batch), dtype=torch.float64)
    for rows, one in zip(batch.responses(), value, strict=True):
        out = out.index_put((torch.tensor(rows),), one)
    return out


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
        e = loss.ratio.pre_clip
        if e is not None and (number(own[t]) > e if a > 0 else number(own[t]) < -e):
            r = r.detach()
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
        value = one_surrogate(loss, r, a, low, high, cut, logprob[t])
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


def estimate(name: str, d: Tensor) -> Tensor:
    near = d.clamp(-20, 20)
    k3 = (torch.exp(-near) + near - 1).clamp(-10, 10)
    value = {"k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": k3}[name.rstrip("+")]
    return value.detach() + (d**2 / 2 - (d**2 / 2).detach()) if name.endswith("+") else value


# -- once per mini-batch --


def reshaped(axis, batch: Batch) -> Tensor:
    advantage, state = batch["advantage"], batch.state
    match axis:
        case loss_axes.EntropyZ(scale):
            entropy = batch["entropy"].detach()
            deviation = number(entropy.std()) if len(entropy) > 1 else 0.0
            return advantage * (1 + scale * (entropy - entropy.mean()) / (deviation or math.inf))
        case loss_axes.Blend(target, limit):
            rewarded = sum(number(batch["reward"][r[0]]) > 0 for r in batch.responses())
            if not rewarded:
                return advantage
            a = min(abs(target - state.entropy), limit) / (rewarded / len(batch.responses()))
            rho = (batch["second_logprob"] - batch["old_logprob"]).exp()
            return (1 - a / (1 + a)) * advantage + a / (1 + a) * batch["reward"] * rho
        case loss_axes.TokenGroup(limit):
            result = advantage.clone()
            for group in set(batch.group):
                rows = [t for t in range(len(batch)) if batch.group[batch.leaf[t]] == group]
                reward = batch["reward"][rows]
                if not rows:
                    continue
                z = (reward - reward.mean()) / (reward.std(False) + 1e-6)
                if number(z.abs().max()) < limit:
                    result[rows] = z
            return result
        case loss_axes.EntropyBand():
            low, high = axis.band(state.progress)
            entropy = number(batch["entropy"].detach().mean())
            reward = batch["reward"]
            return (
                reward.clamp(min=0)
                if entropy > high
                else reward.clamp(max=0)
                if entropy < low
                else advantage
            )
        case loss_axes.SignFilter(keep):
            return advantage.clamp(min=0) if keep == "positive" else advantage.clamp(max=0)
    raise AssertionError(axis)


def heat_of(entropy: Tensor) -> Tensor:
    x = entropy.detach().clamp(min=1e-8).log()
    pivot = sorted(x.tolist())[max(math.ceil(0.8 * len(x) - 1e-9), 1) - 1]
    sigma = math.sqrt(number(((x - pivot) ** 2).mean())) or 1.0
    h = (x - pivot) / sigma
    return torch.where(h > 0, h / (number(h.max()) or 1.0), h / (abs(number(h.min())) or 1.0))


def factor_of(axis, batch: Batch) -> Tensor:
    match axis:
        case loss_axes.TIS(cap, level, floor, normalize):
            x = batch["old_logprob"] - batch["rollout_logprob"]
            if level == "token":
                rho = x.exp().clamp(floor, cap)
                return rho / rho.mean() if normalize else rho
            rho = [x[r].sum().clamp(-20, 20).exp().clamp(floor, cap) for r in batch.responses()]
            mean = sum(rho) / len(rho)
            return spread(batch, [v / mean if normalize else v for v in rho])
        case loss_axes.IcePop(low, high):
            rho = (batch["old_logprob"] - batch["rollout_logprob"]).exp()
            return torch.where((rho >= low) & (rho <= high), rho, 0.0)
        case loss_axes.Steer(shape, least, most):
            logprob, entropy = batch["logprob"].detach(), batch["entropy"].detach()
            r = (logprob - batch["old_logprob"]).clamp(-20, 20).exp()
            omega = (r * batch["advantage"] * (1 - logprob.exp()) * (logprob + entropy)).abs()
            if shape == "exp":
                k = -math.log(least) / max(number(omega.max()), 0.02)
                return (-k * omega).exp().clamp(least, 1.0)
            span = number(omega.max() - omega.min())
            return (most - (omega - omega.min()) / (span or math.inf) * (most - least)).clamp(
                least, most
            )
    raise AssertionError(axis)


def covariance(batch: Batch) -> list[float]:
    a, logprob = batch["advantage"], batch["logprob"].detach()
    return ((a - a.mean()) * (logprob - logprob.mean())).tolist()


def facts(axis, batch: Batch) -> object:
    """What the choice of a token needs of all."""
    match axis:
        case loss_axes.ClipCov(low, high, share):
            found = [t for t, c in enumerate(covariance(batch)) if low < c < high]
            found.sort(key=lambda t: uniform(batch.state.seed, batch.index[t]))
            return set(found[: max(1, int(share * len(batch)))])
        case loss_axes.ClipB(mu):
            score = batch["old_logprob"].exp() * (batch["entropy"] + batch["old_logprob"])
            score = score.detach()
            deviation = number(score.std(False))
            least = number(score.mean()) - mu * deviation if deviation > 1e-12 else -math.inf
            return score, least
        case loss_axes.ClipV(mu, share):
            old, entropy = batch["old_logprob"], batch["entropy"].detach()
            x = entropy * batch["sum_p2"] + batch["sum_p2_logp"] - old.exp() * (entropy + old)
            limit = mu * number(x.std(False)) if number(x.std(False)) > 1e-12 else math.inf
            found = [t for t in range(len(batch)) if batch["advantage"][t] <= 0 and x[t] > limit]
            found.sort(key=lambda t: (-number(x[t]), t))
            return set(found[: max(1, int(share * len(batch)))])
        case loss_axes.TopEntropy(share):
            return torch.quantile(batch["entropy"].detach(), 1 - share)
    return None


def keeps(axis, batch: Batch, t: int, found) -> bool:
    rows = next(r for r in batch.responses() if t in r)
    match axis:
        case loss_axes.ClipCov() | loss_axes.ClipV():
            return t not in found
        case loss_axes.ClipB():
            return not (batch["advantage"][t] < 0 and found[0][t] < found[1])
        case loss_axes.TopEntropy():
            return number(batch["entropy"][t]) >= number(found)
        case loss_axes.NearGenerator(gamma):
            kl = (batch["rollout_logprob"] - batch["old_logprob"])[rows].sum()
            return bool(batch["advantage"][t] > 0) or number(kl) < gamma
        case loss_axes.Matched(low, high, statistic, level):
            x = (batch["old_logprob"] - batch["rollout_logprob"])[rows]
            if level == "token":
                x = (batch["old_logprob"] - batch["rollout_logprob"])[t : t + 1]
            value = {"rho": x, "k1": x, "k2": x**2 / 2, "k3": x.exp() - 1 - x}[statistic]
            reduce = {"seq_mean": value.mean, "seq_max": value.max}.get(level, value.sum)
            reduced = number(reduce())
            return low <= (math.exp(reduced) if statistic == "rho" else reduced) <= high
    raise AssertionError(axis)


def penalty_of(axis, batch: Batch) -> Tensor:
    """Per token, or one number."""
    logprob = batch["logprob"]
    match axis:
        case axes.ExpertLeak(coef, slope, passed):
            side = torch.where(batch["reward"] > passed, -1.0, 1.0).double()
            x = side * (logprob - batch["expert_logprob"])
            return coef * batch["advantage"].abs() * torch.where(x > 0, x, slope * x)
        case axes.EntropySmoothing(coef, height, low, high):
            mean, entropy = batch.state.entropy, batch["entropy"].detach()
            inside = (entropy > low * mean) & (entropy < high * mean)
            return torch.where(inside, 0.0, coef * height).double()
        case axes.NucleusAnchor(coef, quantile):
            rows = []
            for r in batch.responses():
                nucleus = batch["nucleus_entropy"][r]
                peak = nucleus.detach() > torch.quantile(nucleus.detach(), quantile)
                rows += [nucleus[peak].mean()] if peak.any() else []
            if not rows:
                return torch.tensor(coef * batch.state.nucleus_entropy**2) * 0
            return coef * (sum(rows) / len(rows) - batch.state.nucleus_entropy) ** 2
        case axes.Penalty(coef, estimator, target, select):
            distance = logprob - batch[f"{target}_logprob"]
            chosen = range(len(batch)) if select is None else selected(select, batch)
            mask = torch.tensor([t in chosen for t in range(len(batch))])
            near = torch.where(mask, distance, 0.0)
            return torch.where(mask, coef * estimate(estimator, near), 0.0)
    raise AssertionError(axis)


def selected(axis, batch: Batch) -> set[int]:
    match axis:
        case loss_axes.TopCovariance(share):
            cov = covariance(batch)
            order = sorted(range(len(batch)), key=lambda t: (-cov[t], t))
            return set(order[: max(1, int(share * len(batch)))])
        case loss_axes.Improbable(share):
            negative = [t for t in range(len(batch)) if batch["advantage"][t] < 0]
            negative.sort(key=lambda t: (number(batch["logprob"][t]), t))
            k = max(1, int(share * len(negative)))
            proxy = batch["proxy_logprob"]
            return {t for t in negative[:k] if k > 1 and batch["logprob"][t] < proxy[t]}
    raise AssertionError(axis)
