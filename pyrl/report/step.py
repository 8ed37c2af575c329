"""Step metrics: lengths and rewards of a step's leaves, and some of them for reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers
from pyrl.engine import TRUNCATED
from pyrl.leaves import Leaves
from pyrl.prompts import Prompt
from pyrl.report import Completion
from pyrl.report.metrics import Row
from pyrl.vote import Votes


@dataclass(frozen=True)
class Unlogged:
    """A finished step before its evaluation and its row in metrics.jsonl."""

    metrics: Row
    completions: tuple[Completion, ...]


def completion_metrics(leaves: Leaves) -> dict[str, float]:
    """Token entropy (nats), length (tokens) and the share that was cut at the limit."""
    return {
        "entropy": float(np.average(leaves.entropy_N, weights=leaves.length_N)),
        "completions/mean_length": float(leaves.length_N.mean()),
        "completions/clipped_ratio": float((leaves.finish_N == TRUNCATED).mean()),
    }


def reward_metrics(group_N: NDArray[np.int64], reward_N: NDArray[np.float64]) -> dict[str, float]:
    """Mean and spread of the known rewards of the leaves that train."""
    known_N = ~np.isnan(reward_N)
    spread = [float(reward_N[known_N & (group_N == g)].std()) for g in np.unique(group_N[known_N])]
    if not spread:
        return {}
    return {"reward": float(reward_N[known_N].mean()), "reward_std": float(np.mean(spread))}


def first_completions(
    prompts: Sequence[Prompt],
    leaves: Leaves,
    answers: Answers,
    votes: Votes,
    reward_N: NDArray[np.float64],
) -> tuple[Completion, ...]:
    """The first leaf of each of the step's first questions, for reading."""
    first_G = np.searchsorted(leaves.group_N, np.arange(min(4, len(prompts)))).tolist()
    return tuple(
        Completion(
            prompts[g].text,
            leaves.text_N[n],
            answers.answer_N[n],
            votes.label_G[g],
            None if np.isnan(reward_N[n]) else float(reward_N[n]),
        )
        for g, n in enumerate(first_G)
    )
