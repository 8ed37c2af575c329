"""Distilled: a small decision tree in the place of a fork rule, to be read and to be used.

After Veri_HVAC (arXiv:2403.00172), which distils a controller into a tree of boxes that can be
checked one by one; here it is what a rule decided about branches (`pyrl distil-rules`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import Observed, SignalSpec
from pyrl.checks import at_least
from pyrl.fork import Flat

Floats = NDArray[np.float64]

FORMAT = 1
FEATURES = (
    *("smooth_entropy", "entropy_rise", "group_confidence", "tail_confidence"),
    "min_confidence",
)
"""What a rule sees of a branch after each token."""
WINDOWS = ("smooth_window", "group_window", "tail_window", "min_tokens", "cooldown", "max_forks")
"""Fields of the signals with which the rule saw it."""


def features(observed: Observed) -> Floats:
    """The FEATURES of each observed branch, [B, K]."""
    columns = (
        *(observed.smooth_entropy_B, observed.entropy_rise_B, observed.group_confidence_B),
        *(observed.tail_confidence_B, observed.min_confidence_B),
    )
    return np.stack(columns, axis=1).astype(np.float64)


@dataclass(frozen=True)
class Node:
    """A box of the space of features: cut in two, or with the share of decisions in it."""

    share: float
    """Of its decisions that were to act, as seen."""
    seen: int
    feature: int = -1
    """-1: a leaf."""
    at: float = 0.0
    below: Node | None = None
    """Where the feature is up to `at`."""
    above: Node | None = None

    @classmethod
    def grow(
        cls, feature_BK: Floats, acts_B: NDArray[np.bool_], depth: int, least: int, balance: float
    ) -> Node:
        """CART by Gini impurity, with decisions to act weighing `balance`; `least` in a leaf."""
        weight_B = np.where(acts_B, balance, 1.0)
        plain = cls(float(acts_B.mean()), len(acts_B))
        best = (_impurity(weight_B[acts_B].sum(), weight_B.sum()) - 1e-12, -1, 0.0)
        for feature in range(feature_BK.shape[1] if depth else 0):
            best = min(best, _cut(feature_BK[:, feature], acts_B, weight_B, feature, least))
        if best[1] < 0:
            return plain
        _, feature, at = best
        below_B = feature_BK[:, feature] <= at
        halves = [
            cls.grow(feature_BK[side_B], acts_B[side_B], depth - 1, least, balance)
            for side_B in (below_B, ~below_B)
        ]
        return cls(plain.share, plain.seen, feature, at, *halves)

    def acts(self, feature_BK: Floats, balance: float) -> NDArray[np.bool_]:
        """Whether the tree acts for each branch: where its leaf weighs more for it than not."""
        if self.below is None or self.above is None:
            return np.full(len(feature_BK), self.share * balance > 1 - self.share)
        below_B = feature_BK[:, self.feature] <= self.at
        below, above = (half.acts(feature_BK, balance) for half in (self.below, self.above))
        return np.where(below_B, below, above)

    def lines(self, balance: float, indent: str = "") -> Iterator[str]:
        """The tree as text."""
        if self.below is None or self.above is None:
            verdict = "act" if self.share * balance > 1 - self.share else "pass"
            yield f"{indent}{verdict}  ({self.share:.1%} of {self.seen})"
            return
        for sign, half in (("<=", self.below), ("> ", self.above)):
            yield f"{indent}{FEATURES[self.feature]} {sign} {self.at:.6g}"
            yield from half.lines(balance, indent + "  ")


def _impurity(acting: float, whole: float) -> float:
    return float(2 * acting * (1 - acting / whole)) if whole else 0.0


def _cut(
    value_B: Floats,
    acts_B: NDArray[np.bool_],
    weight_B: Floats,
    feature: int,
    least: int,
) -> tuple[float, int, float]:
    """(impurity of both sides, feature, place) of the best cut; infinite if there is none."""
    order_B = np.argsort(value_B, kind="stable")
    value_B, weight_B, acts_B = value_B[order_B], weight_B[order_B], acts_B[order_B]
    whole_B, acting_B = np.cumsum(weight_B), np.cumsum(weight_B * acts_B)
    place_B = np.arange(1, len(value_B))
    place_B = place_B[(value_B[1:] > value_B[:-1])]
    place_B = place_B[(place_B >= least) & (place_B <= len(value_B) - least)]
    if not place_B.size:
        return (float("inf"), -1, 0.0)
    left, acting = whole_B[place_B - 1], acting_B[place_B - 1]
    right, rest = whole_B[-1] - left, acting_B[-1] - acting
    both_B = 2 * acting * (1 - acting / left) + 2 * rest * (1 - rest / right)
    best = int(both_B.argmin())
    place = int(place_B[best])
    return float(both_B[best]), feature, float((value_B[place - 1] + value_B[place]) / 2)


@dataclass(frozen=True)
class Rule:
    """A tree, the windows of what it reads, and how its decisions were weighed."""

    tree: Node
    windows: Mapping[str, int]
    balance: float

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        record = {"format": FORMAT, "features": FEATURES, **asdict(self), "about": about}
        path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Rule:
        """ValueError names a file that `save` of this version did not write."""
        try:
            record = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: expected a rule, cannot be read: {error}") from error
        found = (record.get("format"), record.get("features")) if isinstance(record, dict) else ()
        if found != (FORMAT, list(FEATURES)):
            raise ValueError(
                f"{path}: expected a rule of format {FORMAT} with its {len(FEATURES)} features, "
                f"got {found or type(record).__name__}; pyrl distil-rules writes one"
            )
        return cls(_node(record["tree"]), record["windows"], float(record["balance"]))


def _node(record: Mapping[str, Any]) -> Node:
    halves = {k: _node(record[k]) for k in ("below", "above") if record[k] is not None}
    return Node(**{**record, **halves})


@dataclass(frozen=True)
class Distilled(Flat):
    """Branches fork where a tree of decisions says so, distilled from a rule (arXiv:2403.00172).

    `pyrl distil-rules` writes the file, and prints the tree.
    """

    file: str = ""
    """JSON of `pyrl distil-rules`."""
    siblings: int = 1
    """New branches of a fork; 0 never forks."""
    trunk_cap: int = 8
    """Leaves of one trunk at most."""

    def __post_init__(self) -> None:
        at_least(0, self, "siblings")
        at_least(1, self, "trunk_cap")

    def trunks(self, votes: int) -> int:
        return max(1, votes // 2) if self.siblings else votes

    def cap(self, votes: int) -> int:
        return self.trunk_cap

    def rule(self) -> Rule:
        """ValueError: the file is none."""
        if not self.file:
            raise ValueError("fork.file: expected the JSON of pyrl distil-rules, got none")
        return _loaded(self.file)

    def check(self) -> None:
        """ValueError: the file is none; before a run begins."""
        if self.siblings:
            self.rule()

    def lower(self, spec: SignalSpec) -> bool:
        if not self.siblings or not self.file:
            return False
        windows = self.rule().windows
        spec.smooth_window, spec.group_window = windows["smooth_window"], windows["group_window"]
        spec.tail_window, spec.min_tokens = windows["tail_window"], windows["min_tokens"]
        spec.cooldown, spec.max_forks = windows["cooldown"], windows["max_forks"]
        spec.warmup_traces = 0  # the tree's numbers are fixed
        return True

    def width(self, observed: Observed) -> NDArray[np.int32]:
        rule = self.rule()
        acts_B = rule.tree.acts(features(observed), rule.balance)
        return np.where(acts_B, 1 + self.siblings, 1).astype(np.int32)


@lru_cache
def _loaded(file: str) -> Rule:
    return Rule.load(Path(file))
