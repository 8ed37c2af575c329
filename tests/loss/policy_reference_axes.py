"""What a loss takes from the whole mini-batch, slow and obvious; see policy_reference.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from kernel_reference import uniform
from torch import Tensor

from pyrl import loss as axes


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


def estimate(name: str, d: Tensor) -> Tensor:
    near = d.clamp(-20, 20)
    k3 = (torch.exp(-near) + near - 1).clamp(-10, 10)
    value = {"k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": k3}[name.rstrip("+")]
    return value.detach() + (d**2 / 2 - (d**2 / 2).detach()) if name.endswith("+") else value


def reshaped(axis, batch: Batch) -> Tensor:
    advantage, state = batch["advantage"], batch.state
    match axis:
        case axes.EntropyZ(scale):
            entropy = batch["entropy"].detach()
            deviation = number(entropy.std()) if len(entropy) > 1 else 0.0
            return advantage * (1 + scale * (entropy - entropy.mean()) / (deviation or math.inf))
        case axes.Blend(target, limit):
            rewarded = sum(number(batch["reward"][r[0]]) > 0 for r in batch.responses())
            if not rewarded:
                return advantage
            a = min(abs(target - state.entropy), limit) / (rewarded / len(batch.responses()))
            rho = (batch["second_logprob"] - batch["old_logprob"]).exp()
            return (1 - a / (1 + a)) * advantage + a / (1 + a) * batch["reward"] * rho
        case axes.TokenGroup(limit):
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
        case axes.EntropyBand():
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
        case axes.SignFilter(keep):
            return advantage.clamp(min=0) if keep == "positive" else advantage.clamp(max=0)
    raise AssertionError(axis)


def heat_of(entropy: Tensor) -> Tensor:
    x = entropy.detach().clamp(min=1e-8).log()
    pivot = sorted(x.tolist())[round(0.8 * (len(x) - 1))]
    sigma = math.sqrt(number(((x - pivot) ** 2).mean())) or 1.0
    h = (x - pivot) / sigma
    return torch.where(h > 0, h / (number(h.max()) or 1.0), h / (abs(number(h.min())) or 1.0))


def factor_of(axis, batch: Batch) -> Tensor:
    match axis:
        case axes.TIS(cap, level, floor, normalize):
            x = batch["old_logprob"] - batch["rollout_logprob"]
            if level == "token":
                rho = x.exp().clamp(floor, cap)
                return rho / rho.mean() if normalize else rho
            rho = [x[r].sum().clamp(-20, 20).exp().clamp(floor, cap) for r in batch.responses()]
            mean = sum(rho) / len(rho)
            return spread(batch, [v / mean if normalize else v for v in rho])
        case axes.IcePop(low, high):
            rho = (batch["old_logprob"] - batch["rollout_logprob"]).exp()
            return torch.where((rho >= low) & (rho <= high), rho, 0.0)
        case axes.Steer(shape, least, most):
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
        case axes.ClipCov(low, high, share):
            ratio = (batch["logprob"].detach() - batch["old_logprob"]).exp()
            # Outside the bounds of the preset, Clip(1, 1), which leave negative advantages alone.
            clipped = ((batch["advantage"] > 0) & (ratio > 2)).tolist()
            cov = zip(covariance(batch), clipped, strict=True)
            found = [t for t, (c, gone) in enumerate(cov) if low < c < high and not gone]
            found.sort(key=lambda t: uniform(batch.state.seed, batch.index[t]))
            return set(found[: max(1, int(share * len(batch)))])
        case axes.ClipB(mu):
            score = batch["old_logprob"].exp() * (batch["entropy"] + batch["old_logprob"])
            score = score.detach()
            deviation = number(score.std(False))
            least = number(score.mean()) - mu * deviation if deviation > 1e-12 else -math.inf
            return score, least
        case axes.ClipV(mu, share):
            old, entropy = batch["old_logprob"], batch["entropy"].detach()
            x = entropy * batch["sum_p2"] + batch["sum_p2_logp"] - old.exp() * (entropy + old)
            limit = mu * number(x.std(False)) if number(x.std(False)) > 1e-12 else math.inf
            found = [t for t in range(len(batch)) if batch["advantage"][t] <= 0 and x[t] > limit]
            found.sort(key=lambda t: (-number(x[t]), t))
            return set(found[: max(1, int(share * len(batch)))])
        case axes.EntropyFilter():
            low, high = axis.band(batch.state.progress)
            entropy = number(batch["entropy"].detach().mean())
            return -1 if entropy < low else 1 if entropy > high else 0
        case axes.TopEntropy(share):
            return torch.quantile(batch["entropy"].detach(), 1 - share)
    return None


def keeps(axis, batch: Batch, t: int, found) -> bool:
    rows = next(r for r in batch.responses() if t in r)
    match axis:
        case axes.ClipCov() | axes.ClipV():
            return t not in found
        case axes.ClipB():
            return not (batch["advantage"][t] < 0 and found[0][t] < found[1])
        case axes.EntropyFilter():
            return found * number(batch["advantage"][t]) >= 0
        case axes.TopEntropy():
            return number(batch["entropy"][t]) >= number(found)
        case axes.NearGenerator(gamma):
            kl = (batch["rollout_logprob"] - batch["old_logprob"])[rows].sum()
            return bool(batch["advantage"][t] > 0) or number(kl) < gamma
        case axes.Matched(low, high, statistic, level):
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
            mean, entropy = batch.state.mean_entropy, batch["entropy"].detach()
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
        case axes.SurprisalBand(coef, low, high):
            surprisal = -logprob.detach().mean()
            sign = -1.0 if surprisal > high else 1.0 if surprisal < low else 0.0
            return coef * sign * (logprob - batch["old_logprob"])
        case axes.CovarianceBonus(coef, alpha, most):
            advantage, seen = batch["advantage"], logprob.detach()
            covariance = (advantage - advantage.mean()) * (seen - seen.mean())
            value = torch.zeros((), dtype=torch.float64)
            for r in batch.responses():
                weight = (alpha * covariance[r].softmax(0)).clamp(max=most)
                value = value - coef * (weight * batch["nucleus_entropy"][r]).sum() / len(batch)
            return value
        case axes.Penalty(coef, estimator, target, select):
            distance = logprob - batch[f"{target}_logprob"]
            chosen = range(len(batch)) if select is None else selected(select, batch)
            mask = torch.tensor([t in chosen for t in range(len(batch))])
            near = torch.where(mask, distance, 0.0)
            return torch.where(mask, coef * estimate(estimator, near), 0.0)
    raise AssertionError(axis)


def selected(axis, batch: Batch) -> set[int]:
    match axis:
        case axes.TopCovariance(share):
            cov = covariance(batch)
            order = sorted(range(len(batch)), key=lambda t: (-cov[t], t))
            return set(order[: max(1, int(share * len(batch)))])
        case axes.Improbable(share):
            negative = [t for t in range(len(batch)) if batch["advantage"][t] < 0]
            negative.sort(key=lambda t: (number(batch["logprob"][t]), t))
            k = max(1, int(share * len(negative)))
            proxy = batch["proxy_logprob"]
            return {t for t in negative[:k] if k > 1 and batch["logprob"][t] < proxy[t]}
    raise AssertionError(axis)
