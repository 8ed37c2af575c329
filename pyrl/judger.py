"""Judger: how likely a response is right by the entropies of its tokens, learnt from answers.

A logistic regression on a response's entropies, fitted on questions with true answers
(`pyrl fit-judger`), weighs votes where there are none. These are features of the Entropy Judger
(arXiv:2602.04234), without its boosted trees: a regression needs no further library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers
from pyrl.leaves import Leaves
from pyrl.vote import Majority, Tie, Votes, Weighted

Floats = NDArray[np.float64]

FORMAT = 1
FEATURES = (
    *("mean", "deviation", "least", "quarter", "median", "three_quarters", "largest"),
    *("bowley", "variation", "tail_weight", "last", "confidence", "tokens", "siblings"),
)
TAIL = 16
"""Last tokens of a response, where the answer stands."""
_RIDGE = 1e-2


def shape(entropy_T: Floats) -> Floats:
    """Of one response: mean, deviation, the five quantiles at quarters, and three ratios of these.

    Bowley's skewness (q3 + q1 - 2 median) / (q3 - q1), the deviation over the mean, and the
    distance of the largest to q3 over the mean; a ratio over 0 is 0.
    """
    mean, deviation = float(entropy_T.mean()), float(entropy_T.std())
    quantiles = np.quantile(entropy_T, (0, 0.25, 0.5, 0.75, 1))
    _, q1, median, q3, largest = quantiles.tolist()
    bowley = (q3 + q1 - 2 * median) / (q3 - q1) if q3 > q1 else 0.0
    ratios = (deviation / mean, (largest - q3) / mean) if mean > 0 else (0.0, 0.0)
    return np.array([mean, deviation, *quantiles, bowley, *ratios])


def features(leaves: Leaves) -> Floats:
    """The FEATURES of each leaf, [N, K]: nothing in them knows an answer."""
    entropy_T = np.asarray(leaves.rows.entropy_T, np.float64)
    rows = np.split(entropy_T, np.cumsum(leaves.length_N)[:-1])
    shape_NK = np.array([shape(row) for row in rows]).reshape(len(rows), 10)
    more_NK = np.stack(
        [
            np.array([row[-TAIL:].mean() for row in rows]),
            leaves.confidence_N,
            np.log(leaves.length_N),
            1 / np.maximum(leaves.weight_N, 1e-9),
        ],
        axis=1,
    )
    return np.concatenate([shape_NK, more_NK], axis=1)


@dataclass(frozen=True)
class Scorer:
    """p = sigmoid(bias + sum weight (feature - mean) / deviation)."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    """0 of a feature that did not vary, which then has no say."""
    weight: tuple[float, ...]
    bias: float
    responses: int
    """How many it was fitted on."""

    @classmethod
    def fit(cls, feature_NK: Floats, right_N: NDArray[np.bool_]) -> Scorer:
        """By Newton's method with a small ridge. ValueError unless some are right and some not."""
        if right_N.all() or not right_N.any():
            raise ValueError(
                f"judger: expected right and wrong responses to tell them by, got "
                f"{int(right_N.sum())} right ones of {len(right_N)}"
            )
        mean_K, deviation_K = feature_NK.mean(axis=0), feature_NK.std(axis=0)
        deviation_K[deviation_K < 1e-9] = 0
        x_NK = np.column_stack([_scaled(feature_NK, mean_K, deviation_K), np.ones(len(right_N))])
        ridge_KK = _RIDGE * len(right_N) * np.eye(x_NK.shape[1])
        ridge_KK[-1, -1] = 0
        w_K = np.zeros(x_NK.shape[1])
        for _ in range(50):
            p_N = _sigmoid(x_NK @ w_K)
            slope_K = x_NK.T @ (p_N - right_N) + ridge_KK @ w_K
            bend_KK = (x_NK * (p_N * (1 - p_N))[:, None]).T @ x_NK + ridge_KK
            step_K = np.linalg.solve(bend_KK, slope_K)
            w_K -= step_K
            if np.abs(step_K).max() < 1e-10:
                break
        mean, deviation, weight = (
            tuple(map(float, column)) for column in (mean_K, deviation_K, w_K[:-1])
        )
        return cls(mean, deviation, weight, float(w_K[-1]), len(right_N))

    def __call__(self, feature_NK: Floats) -> Floats:
        """How likely each is right."""
        x_NK = _scaled(feature_NK, np.array(self.mean), np.array(self.deviation))
        return _sigmoid(x_NK @ np.array(self.weight) + self.bias)

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """JSON, with what else there is to say of it."""
        record = {"format": FORMAT, "features": FEATURES, **asdict(self), "about": about}
        path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Scorer:
        """ValueError names a file that `save` of this version did not write."""
        try:
            record = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: expected a judger, cannot be read: {error}") from error
        found = (record.get("format"), record.get("features")) if isinstance(record, dict) else ()
        if found != (FORMAT, list(FEATURES)):
            raise ValueError(
                f"{path}: expected a judger of format {FORMAT} with its {len(FEATURES)} features, "
                f"got {found or type(record).__name__}; pyrl fit-judger writes one"
            )
        mean, deviation, weight = (
            tuple(map(float, record[name])) for name in ("mean", "deviation", "weight")
        )
        return cls(mean, deviation, weight, float(record["bias"]), int(record["responses"]))


def _scaled(feature_NK: Floats, mean_K: Floats, deviation_K: Floats) -> Floats:
    varies_K = deviation_K > 0
    return np.where(varies_K, (feature_NK - mean_K) / np.where(varies_K, deviation_K, 1), 0)


def _sigmoid(x_N: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(x_N / 2)))


@dataclass(frozen=True)
class Judger:
    """A leaf votes with the probability that its entropies say it is right (arXiv:2602.04234).

    `pyrl fit-judger` writes the file, from questions with true answers.
    """

    file: str = ""
    """JSON of `pyrl fit-judger`."""
    power: float = 1.0
    """Of the probability: 0 gives each leaf one vote, inf all votes to the likeliest leaf."""
    tie: Tie = "first"
    """A tie goes to the answer that was seen first, or leaves the question without a label."""
    needs: ClassVar[tuple[str, ...]] = ("entropy_T", "confidence_N")

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise ValueError(f"Judger.power: expected >= 0, got {self.power}")

    def __call__(self, leaves: Leaves, answers: Answers) -> Votes:
        weight_N = np.ones(len(leaves.leaf_N))
        if self.power and len(weight_N):
            chance_N = self.scorer()(features(leaves))
            most_G = np.zeros(leaves.groups)
            np.maximum.at(most_G, leaves.group_N, chance_N)
            weight_N = (chance_N / most_G[leaves.group_N]) ** self.power
        return Weighted(tie=self.tie)(replace(leaves, weight_N=weight_N), answers)

    def scorer(self) -> Scorer:
        """ValueError: the file is none."""
        if not self.file:
            raise ValueError("vote.file: expected the JSON of pyrl fit-judger, got none")
        return _loaded(self.file)

    def check(self) -> None:
        """ValueError: the file is none; before a run begins."""
        if self.power:
            self.scorer()

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        """The mean probability, and the share of labels that a plain majority would not give."""
        plain_G = Majority(self.tie)(leaves, answers).class_G
        judged = {"vote/judged_other": float((plain_G != votes.class_G).mean())}
        if not self.power or not len(leaves.leaf_N):
            return judged
        return judged | {"vote/judged_right": float(self.scorer()(features(leaves)).mean())}


@lru_cache
def _loaded(file: str) -> Scorer:
    return Scorer.load(Path(file))
