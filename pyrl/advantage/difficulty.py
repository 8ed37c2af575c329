"""Difficulty: how many uncertain places a response should have, and how far the policy may go, by
the share of a prompt's leaves that are right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl.advantage import Floats, GroupBaseline, known_groups, known_tokens
from pyrl.checks import at_least, finite, shares
from pyrl.leaves import Scored

BUCKETS = ("hard", "medium", "easy")
"""Prompts of which less than 1/3, less than 2/3, and more of the leaves are right."""

TRIGGERS = (
    "wait hmm but however although alternatively instead maybe perhaps actually so then thus "
    "therefore hence because since if check recheck verify let suppose assume consider think"
)
"""Words at which reasoning turns. The source's list is its own; this one is ours."""


def bucket_N(scored: Scored) -> NDArray[np.int64]:
    """The ordinal in `BUCKETS` of each leaf's prompt; -1 where no reward is known.

    A leaf is right if its reward is above 0.
    """
    result_N = np.full(len(scored.reward_N), -1)
    for known in known_groups(scored):
        accuracy = float((scored.reward_N[known] > 0).mean())
        result_N[known] = int(accuracy >= 1 / 3) + int(accuracy >= 2 / 3)
    return result_N


@dataclass(frozen=True)
class WindowEntropy:
    """ARES: rewards by the number of uncertain places, then the group baseline (arXiv:2510.08457).

    A place counts where one of some words begins `window` tokens whose mean entropy is at least a
    threshold. With D the count less the target of the prompt's bucket of difficulty: easy and
    medium prompts pay for right answers that have too many (medium ones also for too few), hard
    ones for right answers that have too few, and wrong answers earn by the surplus. Targets are the
    last step's mean counts; the weight of a bucket moves with the distance from its target. The
    input is ignored.
    """

    words: str = TRIGGERS
    """Words that begin such a place, between spaces, without case; empty: any token."""
    window: int = 4
    """Tokens of a place."""
    quantile: float = 0.95
    """Of the windows' entropies in a response; the threshold follows the median over responses."""
    decay: float = 0.99
    """Share of the threshold that stays in a step."""
    alpha: float = 0.5
    """Weight of each bucket at the beginning; 0 with `rate` 0: GRPO."""
    rate: float = 0.05
    """Change of a weight for each place that a bucket's mean is away from its target."""
    centred: bool = False
    """A wrong answer without a surplus earns nothing; as released it earns half of the most."""
    needs = ("entropy_T", "texts")

    def __post_init__(self) -> None:
        finite(self, "alpha", "rate")
        at_least(1, self, "window")
        at_least(0, self, "alpha", "rate")
        shares(self, "quantile", "decay")

    def initial(self) -> dict[str, Any]:
        """The threshold (nats; None before the first response) and each bucket's target and weight,
        hard, medium, easy."""
        return {"threshold": None, "target": [None] * 3, "alpha": [self.alpha] * 3}

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        bonus_N, _, after = self._bonus_N(scored)
        scored.state.update(after)
        shaped = replace(scored, reward_N=scored.reward_N + bonus_N)
        return GroupBaseline()(shaped, advantage_T)

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        bonus_N, count_N, after = self._bonus_N(scored)
        leaves = max(1, len(count_N))
        return {
            "advantage/places": float(count_N.sum()) / leaves,
            "advantage/places_bonus": float(np.abs(bonus_N).sum()) / leaves,
            "advantage/places_threshold": after["threshold"] or 0.0,
        }

    def _bonus_N(self, scored: Scored) -> tuple[Floats, Floats, dict[str, Any]]:
        """What each leaf's reward changes by, its places, and the state after this step."""
        state: dict[str, Any] = {**scored.state}
        windows = [*self._windows(scored)]
        high = [np.quantile(found, self.quantile) for found in windows if found.size]
        if high:
            own, before = float(np.median(high)), state["threshold"]
            state["threshold"] = own
            if before is not None:
                state["threshold"] = self.decay * before + (1 - self.decay) * own
        count_N = self._counts(scored, windows, state["threshold"])
        bonus_N, bucket = np.zeros(len(scored.reward_N)), bucket_N(scored)
        state["target"], state["alpha"] = [*state["target"]], [*state["alpha"]]
        for of in range(3):
            inside = bucket == of
            if not inside.any():
                continue
            mean = float(count_N[inside].mean())
            target = round(mean) if state["target"][of] is None else state["target"][of]
            away = mean - target if of else target - mean
            state["alpha"][of] = min(2.0, max(0.0, state["alpha"][of] + self.rate * away))
            state["target"][of] = round(mean)
            right = scored.reward_N[inside] > 0
            bonus_N[inside] = self.bonus(of, right, count_N[inside], target, state["alpha"][of])
        return bonus_N, count_N, state

    def bonus(
        self, bucket: int, right: NDArray[np.bool_], count: Floats, target: int, alpha: float
    ) -> Floats:
        """What rewards change by in a bucket (ordinal in `BUCKETS`) of this target and weight."""
        slack, soft, heat = ((0.35, 4, 3.0), (0.25, 3, 2.5), (0.15, 2, 2.0))[bucket]
        margin, most = max(1.0, slack * target), alpha * (1.2, 1.0, 1.0)[bucket]
        over = count - target

        def cost(excess: Floats) -> Floats:
            excess = np.maximum(excess, 0)
            huber = np.where(excess <= soft, excess**2 / (2 * soft), excess - soft / 2)
            return huber / (margin + soft)

        def earned(excess: Floats) -> Floats:
            rise: Floats = 1 / (1 + np.exp(-excess / heat))
            return 2 * rise - 1 if self.centred else rise

        wrong = (1.0, 0.8, 0.6)[bucket] * most * earned(np.maximum(over - margin, 0))
        if bucket:
            excess = (np.abs(over) if bucket == 1 else over) - margin
            good = -most * np.minimum(1, cost(excess))
        else:
            short = -most * np.minimum(1, 0.5 * cost(-over - margin))
            good = np.where(over >= -margin, most * earned(over + margin), short)
        return np.where(right, good, wrong)

    def _windows(self, scored: Scored) -> Iterator[Floats]:
        """The mean entropy of each whole window of each response."""
        stop = 0
        for length in scored.length_N.tolist():
            entropy_T = scored.entropy_T[stop : stop + length].astype(np.float64)
            sums = np.append(0.0, np.cumsum(entropy_T))
            yield np.maximum(sums[self.window :] - sums[: -self.window], 0) / self.window
            stop += length

    def _counts(self, scored: Scored, windows: list[Floats], threshold: float | None) -> Floats:
        """The places of each response."""
        words, begin, counts = frozenset(self.words.split()), 0, []
        for found, length, text in zip(
            windows, scored.length_N.tolist(), scored.texts.text_N, strict=True
        ):
            certain = np.zeros(0, bool) if threshold is None else found >= threshold
            if words:
                spans = scored.texts.span_T2[begin : begin + len(found)].tolist()
                begins = [re.sub(r"\W", "", text[a:b]).lower() in words for a, b in spans]
                certain = certain & np.array(begins, bool)
            counts.append(int(certain.sum()))
            begin += length
        return np.array(counts, np.float64)


@dataclass(frozen=True)
class DynamicKL:
    """ARES: A - beta (old - reference log-prob), a beta for each difficulty (arXiv:2510.08457).

    Each beta moves so that the mean distance of its prompts' tokens nears a target: after every
    some steps ln beta grows by 0.05 times a smoothed relative error, of at most 0.2. The source has
    the distance in its loss; as an advantage it has the gradient of the reverse KL on policy. The
    source's discount for wrong answers of easy prompts is left out.
    """

    coef: float = 0.01
    """Each beta at the beginning; 0: it stays 0."""
    target: float = 0.01
    """Mean distance of a token (nats) that is wanted."""
    every: int = 100
    """Steps between two changes of the betas."""
    needs = ("advantage_T", "old_logprob_T", "ref_logprob_T")

    def __post_init__(self) -> None:
        finite(self, "coef", "target")
        at_least(0, self, "coef")
        at_least(1, self, "every")
        if not self.target > 0:
            raise ValueError(f"DynamicKL.target: expected a number above 0, got {self.target}")

    def initial(self) -> dict[str, Any]:
        """For hard, medium and easy prompts beta, the smoothed distance (None before the first) and
        the smoothed error; and the number of steps."""
        return {"beta": [self.coef] * 3, "distance": [None] * 3, "error": [0.0] * 3, "steps": 0}

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        away_T = scored.old_logprob_T - scored.ref_logprob_T
        bucket_T = bucket_N(scored)[scored.leaf_T]
        result_T = np.where(known_tokens(scored), advantage_T, 0.0)
        state = scored.state
        state["steps"] += 1
        for of in range(3):
            inside = bucket_T == of
            if not inside.any():
                continue
            result_T[inside] -= state["beta"][of] * away_T[inside]
            distance = float((np.expm1(-away_T[inside]) + away_T[inside]).mean())
            before = state["distance"][of]
            smooth = distance if before is None else 0.97 * before + 0.03 * distance
            state["distance"][of] = smooth
            if state["steps"] % self.every == 0:
                self._move(state, of, smooth / self.target - 1)
        return result_T

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        away = (scored.old_logprob_T - scored.ref_logprob_T)[known_tokens(scored)]
        distance = float((np.expm1(-away) + away).mean()) if away.size else 0.0
        found = {"advantage/distance": distance}
        for name, beta in zip(BUCKETS, scored.state["beta"], strict=True):
            found[f"advantage/beta_{name}"] = beta
        return found

    def _move(self, state: dict[str, Any], of: int, error: float) -> None:
        if abs(error) < 0.02:
            error = 0.0
        state["error"][of] = 0.97 * state["error"][of] + 0.03 * error
        change = float(np.exp(0.05 * np.clip(state["error"][of], -0.2, 0.2)))
        least = min(1e-4, self.coef)
        state["beta"][of] = min(100.0, max(least, state["beta"][of] * change))
