"""Advantage: one float64 number for each response token, by stages that run in order.

A leaf whose reward is unknown (NaN) is as if it were absent: no statistic counts it, and its tokens
get 0. All statistics are float64 and summed in a fixed order; a group that was rewarded equally
gets exactly 0. In trees, the segments of a chain without a fork count as one ancestor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl import _core
from pyrl.checks import at_least, described, finite, one_of
from pyrl.leaves import SCORED, Scored, check_needs, needs_of

Floats = NDArray[np.float64]


class Stage(Protocol):
    """One step from rewards to token advantages; the first stage of an algorithm gets zeros.

    A stage may name what it reads in `needs`: "advantage_T", or fields of `Scored`. One that
    remembers something from step to step has a method `initial`: see `pyrl.run.states`.
    """

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats: ...

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        """What the stage does to this input, for the run's report; finite numbers."""
        ...


def advantages(
    stages: Sequence[Stage], scored: Scored, states: Sequence[Any] = ()
) -> tuple[Floats, dict[str, float]]:
    """Run the stages in order: the advantage of each token, and the metrics of all stages.

    `states` has what each stage remembers, None of one without `initial`. ValueError names a stage
    that does not give a finite number for each token.
    """
    advantage_T = np.zeros(scored.leaf_T.size)
    metrics: dict[str, float] = {}
    for stage, state in zip(stages, states or [None] * len(stages), strict=True):
        read = scored if state is None else replace(scored, state=state)
        metrics |= stage.metrics(read, advantage_T)
        advantage_T = _checked(stage, stage(read, advantage_T), scored.leaf_T.size)
    return advantage_T, metrics


def _checked(stage: Stage, advantage_T: Floats, tokens: int) -> Floats:
    expected = f"advantage: {type(stage).__name__}: expected a finite number for each of {tokens} "
    if not (isinstance(advantage_T, np.ndarray) and advantage_T.shape == (tokens,)):
        raise ValueError(f"{expected}tokens, got {described(advantage_T)}")
    bad_T = ~np.isfinite(advantage_T)
    if bad_T.any():
        first = int(bad_T.argmax())
        raise ValueError(f"{expected}tokens, got {advantage_T[first]} for token {first}")
    return advantage_T


def check_stages(stages: Sequence[Stage]) -> None:
    """ValueError names what a stage needs and does not get."""
    if stages and "advantage_T" in needs_of(stages[0]):
        raise ValueError(
            f"advantage: {type(stages[0]).__name__} needs advantage_T, expected the result of a "
            f"stage before it, such as --advantage grpo,NAME"
        )
    for stage in stages:
        check_needs("advantage", stage, {*SCORED, "advantage_T"})


@dataclass(frozen=True)
class GroupBaseline:
    """A = (r - mean) / (std + eps) over the leaves of a prompt; the input is ignored.

    Raises ValueError for decreasing group ids, an infinite reward, or a field out of its range.
    """

    scale: Literal["std", "none"] = "std"
    """What divides the difference: the deviation of the group's rewards, or nothing."""
    ddof: Literal[0, 1] = 1
    """1 divides the variance by G - 1, as torch.std and the released codes do."""
    eps: float = 1e-6
    """Added to the deviation."""
    leave_one_out: bool = False
    """Subtract the mean of the other leaves: the difference times G / (G - 1)."""
    single: Literal["zero", "reward"] = "zero"
    """A leaf alone in its group; "reward" (A = r) is what the verl family does."""

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        options = _core.tree.BaselineOptions(
            scale=self.scale,
            ddof=self.ddof,
            eps=self.eps,
            leave_one_out=self.leave_one_out,
            single=self.single,
        )
        advantage_N = _core.tree.group_advantage(scored.group_N, scored.reward_N, options)
        return advantage_N[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class MassBaseline:
    """A = F (r - b) / (sqrt(sum W (r - b)^2) + eps), b = sum W r, F = n W^power / sum W^power.

    W are the weights of the n leaves of a prompt that were drawn without replacement, scaled to 1
    in sum over those of known reward: sums with W estimate means over the policy
    (arXiv:1903.06059; gradients with such weights: arXiv:2002.06043). The input is ignored; equal
    rewards give exactly 0.
    """

    power: float = 0.5
    """W^power, scaled anew, is what an advantage is multiplied with; b and the deviation are with
    W. 1 is the estimate of the policy's gradient; below, rare answers count more; 0: all leaves
    count the same."""
    eps: float = 1e-6
    """Added to the deviation."""
    needs = ("weight_N",)

    def __post_init__(self) -> None:
        finite(self, "power", "eps")
        at_least(0, self, "power", "eps")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        advantage_N = np.zeros(scored.reward_N.size)
        known_N = ~np.isnan(scored.reward_N)
        bounds = np.searchsorted(scored.group_N, np.unique(scored.group_N))
        for member in np.split(np.arange(known_N.size), bounds[1:]):
            known = member[known_N[member]]
            reward = scored.reward_N[known]
            weight = scored.weight_N[known]
            if reward.size < 2 or reward.min() == reward.max() or weight.sum() == 0:
                continue
            share = weight / weight.sum()
            away = reward - (share * reward).sum()
            deviation = np.sqrt((share * away**2).sum())
            factor = share**self.power
            factor *= reward.size / factor.sum()
            advantage_N[known] = factor * away / (deviation + self.eps)
        return advantage_N[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Ancestors:
    """A(x) = scale(x) * sum_a w_a (v(x) - V(a)): the one kernel of the tree methods.

    V is the mean reward of the leaves below a segment; x is a leaf (v its reward) or a segment
    (v = V). The input is ignored. Each prompt is one tree. Raises ValueError as GroupBaseline does,
    and for segments that do not form one tree per group.
    """

    ancestors: Literal["root", "root+parent", "root+trunk", "all"] = "root"
    """"parent" is the nearest ancestor with more leaves; "all" are those of at least two leaves."""
    weight: Literal["one", "mean", "leaves", "std"] = "one"
    """w_a: 1, 1 / J for J ancestors, the share in the leaf counts, or 1 / (std(a) + eps)."""
    per: Literal["leaf", "segment"] = "leaf"
    """What gets an advantage: a leaf with all its tokens, or each segment."""
    leave_one_out: bool = False
    """Scale by G / (G - 1), G the leaves of the prompt."""
    sqrt_leaves: bool = False
    """Scale by 1 / sqrt(leaves below x): a shared token trains once for each leaf."""
    ddof: Literal[0, 1] = 1
    """1 divides a variance by the leaves less 1."""
    eps: float = 1e-6
    """Added to a deviation."""
    single: Literal["zero", "reward"] = "zero"
    """What an ancestor of one leaf contributes: 0, or v(x) as with mean 0 and std 1."""
    needs = ("segments",)

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        options = _core.tree.AncestorOptions(
            ancestors=self.ancestors,
            weight=self.weight,
            per=self.per,
            leave_one_out=self.leave_one_out,
            sqrt_leaves=self.sqrt_leaves,
            ddof=self.ddof,
            eps=self.eps,
            single=self.single,
        )
        advantage = _core.tree.ancestor_advantage(
            scored.segments.parent_S,
            scored.segments.leaf_segment_N,
            scored.group_N,
            scored.reward_N,
            options,
        )
        if self.per == "leaf":
            return advantage[scored.leaf_T]
        return _segment_tokens(scored, advantage)

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class TreeRLReleased:
    """TreeRL (arXiv:2506.11902) in the order of its released code.

    V' = (V - mu) / sqrt(leaves), V the mean of leave-one-out rewards; A = V' + (V' - V'(parent));
    a difference of exactly 0 is replaced by the parent's. The input is ignored.
    """

    centre: Literal["token", "step"] = "token"
    """mu weighs a segment by leaves * tokens, or by leaves."""
    needs = ("segments",)

    def __post_init__(self) -> None:
        if self.centre not in ("token", "step"):
            raise ValueError(f"centre: expected token or step, got {self.centre}")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        advantage_S = _core.tree.treerl_released_advantage(
            scored.segments.parent_S,
            scored.segments.length_S,
            scored.segments.leaf_segment_N,
            scored.group_N,
            scored.reward_N,
            by_token=self.centre == "token",
        )
        return _segment_tokens(scored, advantage_S)

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class WhitenTokens:
    """(A - mean) / sqrt(var + eps) over all tokens of the batch, var with Bessel's correction."""

    eps: float = 1e-8
    """Added to the variance."""
    needs = ("advantage_T",)

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        known_T = known_tokens(scored)
        result_T = np.zeros_like(advantage_T)
        result_T[known_T] = _core.tree.whiten(advantage_T[known_T], self.eps)
        return result_T

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        known_T = advantage_T[known_tokens(scored)]
        if known_T.size == 0:
            return {"advantage/whiten_mean": 0.0, "advantage/whiten_std": 0.0}
        return {
            "advantage/whiten_mean": float(known_T.mean()),
            "advantage/whiten_std": float(known_T.std()),
        }


@dataclass(frozen=True)
class EntropyReshape:
    """EAR, Adv-Res (arXiv:2508.11356): A *= Y, Y = 2 - H / avg, confident answers step further.

    H is the mean token entropy of an answer (nats), avg its mean over the leaves of the prompt.
    Y is negative where H > 2 avg, hence the clamp; y_min = -inf is the formula as printed.
    Raises ValueError if an entropy is not finite.
    """

    y_min: float = 0.0
    """Smallest factor of an advantage."""
    y_max: float = 2.0
    """Largest factor of an advantage."""
    entropy_floor: float = 1e-4
    """A group of lower mean entropy (nats) has collapsed: its ratios are noise, so Y = 1."""
    needs = ("advantage_T", "entropy_N")

    def __post_init__(self) -> None:
        if not self.y_min <= self.y_max:
            raise ValueError(f"expected y_min <= y_max, got {self.y_min} and {self.y_max}")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        factor_N = np.clip(self._factor(scored), self.y_min, self.y_max)
        return advantage_T * factor_N[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        factor = self._factor(scored)[~np.isnan(scored.reward_N)]
        return {
            "advantage/clamp_rate": share_of((factor < self.y_min) | (factor > self.y_max)),
            "advantage/ear_factor_min": float(factor.min(initial=1.0)),
            "advantage/ear_factor_max": float(factor.max(initial=1.0)),
        }

    def _factor(self, scored: Scored) -> Floats:
        known_N = ~np.isnan(scored.reward_N)
        entropy = scored.entropy_N[known_N]
        mean = _core.tree.group_mean(scored.group_N[known_N], entropy)
        factor = np.ones_like(mean)
        alive = mean >= self.entropy_floor
        factor[alive] = 2 - entropy[alive] / mean[alive]
        factor_N = np.ones(scored.reward_N.size)
        factor_N[known_N] = factor
        return factor_N


@dataclass(frozen=True)
class AdvantageClip:
    """EAR, Adv-Clip (arXiv:2508.11356): A = clip(A, -beta, beta)."""

    beta: float = 2.0
    """Largest size of an advantage."""
    needs = ("advantage_T",)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta: expected a positive number, got {self.beta}")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        return np.clip(advantage_T, -self.beta, self.beta)

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        advantage = advantage_T[known_tokens(scored)]
        return {"advantage/clipped": share_of(np.abs(advantage) > self.beta)}


@dataclass(frozen=True)
class Hybrid:
    """ECHO, E-SC (arXiv:2602.02150): A (1 + a S) + lam (S - mean S), larger steps where unsure.

    S = alpha * H + beta * (1 - C) of the token under the sampling policy. Whitened (the released
    code): H and 1 - C are whitened over the batch's tokens, and S is clamped to +-bound. Raw (the
    paper): neither. The mean of S is over the tokens of the prompt. Raises ValueError if a
    signal of a known leaf is not finite.
    """

    a: float = 0.1
    """Share of the signal S by which an advantage grows."""
    alpha: float = 1.0
    """Weight of the token's entropy in S."""
    beta: float = 1.0
    """Weight of its doubt, 1 - confidence, in S."""
    lam: float = 0.0
    """The paper's lambda; the released code has 0."""
    whiten: bool = True
    """Whiten entropy and doubt over the batch and clamp S, as the released code does."""
    bound: float = 2.0
    """Largest size of a whitened S."""
    eps: float = 1e-8
    """Added to the variances of the whitening."""
    of: Literal["mass", "token"] = "mass"
    """Confidence is the mass of the five most probable tokens, or the sampled one's probability, as
    in the released scripts."""

    @property
    def needs(self) -> tuple[str, ...]:
        sure = "confidence_T" if self.of == "mass" else "logprob_T"
        return ("advantage_T", "entropy_T", sure)

    def __post_init__(self) -> None:
        one_of(self.of, ("mass", "token"), "confidence")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        known_T = known_tokens(scored)
        signal = self._bounded(self._signal(scored, known_T))
        advantage = advantage_T[known_T] * (1 + self.a * signal)
        if self.lam != 0:
            group = scored.group_N[scored.leaf_T[known_T]]
            advantage += self.lam * (signal - _core.tree.group_mean(group, signal))
        result_T = np.zeros_like(advantage_T)
        result_T[known_T] = advantage
        return result_T

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        signal = self._signal(scored, known_tokens(scored))
        return {
            "advantage/hybrid_clamped": share_of(self._bounded(signal) != signal),
            "advantage/hybrid_signal_max": float(signal.max(initial=0.0)),
        }

    def _signal(self, scored: Scored, known_T: NDArray[np.bool_]) -> Floats:
        """S of the known tokens, before the clamp."""
        entropy = scored.entropy_T[known_T].astype(np.float64)
        sure_T = scored.confidence_T if self.of == "mass" else np.exp(scored.logprob_T)
        doubt = 1 - sure_T[known_T].astype(np.float64)
        signal = self.alpha * entropy + self.beta * doubt
        if not np.isfinite(signal).all():
            bad = signal[~np.isfinite(signal)][0]
            raise ValueError(f"entropy_T and confidence_T: expected finite values, got S = {bad}")
        if self.whiten:
            entropy = _core.tree.whiten(entropy, self.eps)
            doubt = _core.tree.whiten(np.clip(doubt, 0, 1), self.eps)
            signal = self.alpha * entropy + self.beta * doubt
        return signal

    def _bounded(self, signal: Floats) -> Floats:
        return np.clip(signal, -self.bound, self.bound) if self.whiten else signal


def grpo() -> tuple[Stage, ...]:
    """The group's mean and standard deviation as baseline and unit (arXiv:2402.03300)."""
    return (GroupBaseline(),)


def dr_grpo() -> tuple[Stage, ...]:
    """No division by the standard deviation (arXiv:2503.20783)."""
    return (GroupBaseline(scale="none"),)


def rloo() -> tuple[Stage, ...]:
    """The mean of the other leaves (arXiv:2402.14740)."""
    return (GroupBaseline(scale="none", leave_one_out=True),)


def tree_rl() -> tuple[Stage, ...]:
    """A segment against the whole tree and against its parent (arXiv:2506.11902), as printed."""
    return (Ancestors("root+parent", per="segment", leave_one_out=True, sqrt_leaves=True),)


def tree_rl_released() -> tuple[Stage, ...]:
    """The order of TreeRL's released code (arXiv:2506.11902)."""
    return (TreeRLReleased(),)


def tree_po(weight: Literal["mean", "leaves"] = "mean") -> tuple[Stage, ...]:
    """A leaf against every subtree that holds it (arXiv:2508.17445), whitened over the tokens.

    "mean" is the source's average (its release script), "leaves" its group_size.
    """
    return (Ancestors("all", weight=weight), WhitenTokens())


def tree_grpo() -> tuple[Stage, ...]:
    """z-score in the prompt plus z-score in the trunk's tree (arXiv:2509.21240).

    The released code gives a trunk of one leaf mean 0 and std 1: Ancestors.single = "reward".
    """
    return (Ancestors("root+trunk", weight="std"),)


def known_groups(scored: Scored) -> Iterator[NDArray[np.int64]]:
    """The leaves of each prompt whose rewards are known, prompts without one left out."""
    known_N = np.flatnonzero(~np.isnan(scored.reward_N))
    if known_N.size:
        group_N = scored.group_N[known_N]
        yield from np.split(known_N, np.flatnonzero(np.diff(group_N)) + 1)


def known_tokens(scored: Scored) -> NDArray[np.bool_]:
    """The tokens [T] of leaves whose rewards are known."""
    known_T: NDArray[np.bool_] = ~np.isnan(scored.reward_N)[scored.leaf_T]
    return known_T


def _segment_tokens(scored: Scored, value_S: Floats) -> Floats:
    return np.where(known_tokens(scored), value_S[scored.segment_T], 0.0)


def share_of(condition: NDArray[np.bool_]) -> float:
    """Of those that are true; 0 of none."""
    return float(condition.mean()) if condition.size else 0.0
