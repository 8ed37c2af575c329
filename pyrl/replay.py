"""Replay: good responses of earlier steps, which train again in an update of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl.checks import at_least, finite, shares
from pyrl.leaves import Scored
from pyrl.pack import TokenBatch, offsets

ROWS = ("input_I", "label_T", "old_logprob_T", "entropy_T", "confidence_T", "mask_T", "reward_N")
"""What is kept of a batch, by its fields."""


@dataclass(frozen=True)
class Replay:
    """SPEAR: responses of positive advantage imitate themselves, once there are enough of them.

    They are kept with the log-probs of the policy that sampled them. When `capacity` are there,
    those that are not too old train in one further update, and all are dropped; their advantages
    are the reward less the median of the last prompts' mean rewards, where that is positive, times
    coef (1 - cos(pi x)) / 2 with x the share of the run that is done over `rise`
    (arXiv:2509.22601). The source adds both losses in one update, and drops a few tokens of high
    covariance.
    """

    capacity: int = 0
    """Responses that are kept before they train; 0: none."""
    oldest: int = 10
    """Steps after which a response does not train any more."""
    means: int = 10240
    """Prompts whose mean rewards the median is of."""
    coef: float = 1.0
    """Weight of their advantages in the end."""
    rise: float = 0.5
    """Share of the run in which that weight rises from 0; 0: it is there from the beginning."""

    def __post_init__(self) -> None:
        at_least(0, self, "capacity", "oldest", "coef")
        at_least(1, self, "means")
        finite(self, "coef")
        shares(self, "rise")

    def initial(self) -> dict[str, Any]:
        """No response: flat rows, their lengths and steps, and mean rewards of prompts."""
        ints, floats = np.zeros(0, np.int64), np.zeros(0, np.float32)
        return {
            "input_I": ints,
            "label_T": ints,
            "old_logprob_T": floats,
            "entropy_T": floats,
            "confidence_T": floats,
            "mask_T": np.zeros(0, bool),
            "reward_N": np.zeros(0),
            "inputs_N": ints,
            "tokens_N": ints,
            "step_N": ints,
            "mean_G": np.zeros(0),
        }

    def keep(self, state: dict[str, Any], batch: TokenBatch, scored: Scored, step: int) -> None:
        """Take in the responses of a step with a positive advantage, and its mean rewards."""
        known_N = ~np.isnan(scored.reward_N)
        groups = np.unique(scored.group_N[known_N])
        mean = [scored.reward_N[known_N & (scored.group_N == g)].mean() for g in groups]
        state["mean_G"] = np.append(state["mean_G"], mean)[-self.means :]
        total_N = np.bincount(batch.leaf_T, batch.advantage_T, minlength=len(batch))
        good = batch.take(np.flatnonzero(total_N > 0))
        for name in ROWS:
            state[name] = np.append(state[name], vars(good)[name])
        state["inputs_N"] = np.append(state["inputs_N"], np.diff(good.input_offset_N1))
        state["tokens_N"] = np.append(state["tokens_N"], np.diff(good.token_offset_N1))
        state["step_N"] = np.append(state["step_N"], np.full(len(good), step))

    def due(self, state: dict[str, Any], step: int, progress: float) -> TokenBatch | None:
        """The responses that train now, with their advantages; None: nothing does.

        Whenever there are enough, the state is afterwards that without one.
        """
        if len(state["reward_N"]) < self.capacity:
            return None
        fresh = {name: value for name, value in self.initial().items() if name != "mean_G"}
        advantage_N = state["reward_N"] - np.median(state["mean_G"])
        young_N = step - state["step_N"] <= self.oldest
        weight = self.coef * self.weight(progress)
        kept = _batch(state, weight * np.maximum(advantage_N, 0))
        state.update(fresh)
        chosen = np.flatnonzero(young_N & (advantage_N > 0))
        return kept.take(chosen) if chosen.size and weight else None

    def weight(self, progress: float) -> float:
        """Of the advantages at this share of the run, before `coef`."""
        share = min(1.0, progress / self.rise) if self.rise else 1.0
        return float(1 - np.cos(np.pi * share)) / 2


def _batch(state: dict[str, Any], advantage_N: NDArray[np.float64]) -> TokenBatch:
    return TokenBatch(
        **{name: state[name] for name in ROWS},
        advantage_T=np.repeat(advantage_N, state["tokens_N"]),
        input_offset_N1=offsets(state["inputs_N"]),
        token_offset_N1=offsets(state["tokens_N"]),
    )
