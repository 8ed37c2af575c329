"""Leaves weighted by inverse width follow the model's law, whatever an online rule decides.

An adaptive rule opens more leaves below uncertain prefixes, so that counts alone are biased; the
weight 1 / width of each fork on a leaf's path undoes that exactly, because a decision reads the
distribution of a token but never the token drawn.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2
from toy_rollout import EOS, rollout

from pyrl._core.logits import uniforms
from pyrl._core.tree import Observed, SignalSpec, Threshold
from pyrl.engine import NO_TOKENS
from pyrl.engine.toy import ToyEngine
from pyrl.forest import Forest
from pyrl.fork import EntropyConfidence, Flat, Fork, OnlineEntropy, TopEntropy
from pyrl.prune import Keep
from pyrl.rollout import make_signals

TRANSITION = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [0.1, 0.5, 0.4, 0.0],
        [0.0, 0.3, 0.05, 0.65],
        [0.3, 0.0, 0.35, 0.35],
    ]
)
LIMIT = 4
PROMPT = np.array([1], np.int32)
COMMON = 0.02
Answer = tuple[int, ...]


def law() -> dict[Answer, float]:
    """Probability of every answer."""
    open_paths: dict[Answer, float] = {(): 1.0}
    ended: dict[Answer, float] = {}
    for length in range(1, LIMIT + 1):
        grown = {
            (*path, token): p * TRANSITION[path[-1] if path else PROMPT[-1], token]
            for path, p in open_paths.items()
            for token in range(len(TRANSITION))
        }
        grown = {path: p for path, p in grown.items() if p > 0}
        done = {path for path in grown if path[-1] == EOS or length == LIMIT}
        ended |= {path: p for path, p in grown.items() if path in done}
        open_paths = {path: p for path, p in grown.items() if path not in done}
    return ended


def law_pvalue(forest: Forest, *, weighted: bool) -> float:
    """Of a chi-square test that the pooled leaves follow the law, trunks being the sampling units.

    A trunk's leaves are correlated, so the covariance of its counts is estimated from the trunks
    (a Wald test); answers too rare for that are one class. `weighted` takes the leaves' weights,
    else each leaf counts as one.
    """
    expected = law()
    common = [answer for answer, p in expected.items() if p > COMMON]
    expected_K = np.array([expected[answer] for answer in common])
    leaf_N = forest.leaves()
    table = forest.leaf_table(leaf_N)
    _, trunk_N = np.unique(np.stack([table.tree_N, table.trunk_N]), axis=1, return_inverse=True)
    weight_N = table.weight_N if weighted else np.ones(len(leaf_N))
    excess_UK = np.zeros((trunk_N.max() + 1, len(common)))  # U trunks, K answers
    for leaf, trunk, weight in zip(leaf_N.tolist(), trunk_N, weight_N, strict=True):
        answer = tuple(forest.path(leaf).tokens.tolist())
        excess_UK[trunk] -= weight * expected_K
        if answer in common:
            excess_UK[trunk, common.index(answer)] += weight
    mean_K = excess_UK.mean(axis=0)
    distance = len(excess_UK) * mean_K @ np.linalg.solve(np.cov(excess_UK.T), mean_K)
    return float(chi2.sf(distance, excess_UK.shape[1]))


def grow(fork: Fork, engine: ToyEngine | None = None) -> Forest:
    """A large step with thresholds from a small one before."""
    signals = make_signals(fork, Keep())
    for seed, count in enumerate([50, 1000]):
        forest = rollout(
            engine or ToyEngine(TRANSITION, [EOS]),
            [PROMPT] * count,
            fork=fork,
            votes=6,
            limit=LIMIT,
            signals=signals,
            seed=seed,
        ).run()
    return forest


@dataclass(frozen=True)
class AboveEntropy(OnlineEntropy):
    """Forks above a fixed entropy."""

    threshold: float = 1.0

    def lower(self, spec: SignalSpec) -> bool:
        super().lower(spec)
        spec.entropy_high = Threshold(value=self.threshold)
        return True


@dataclass(frozen=True)
class WiderWhereUncertain(Flat):
    """Written in Python: width 3 after the most uncertain token, 2 after uncertain ones."""

    def trunks(self, votes: int) -> int:
        return 2

    def lower(self, spec: SignalSpec) -> bool:
        spec.smooth_window, spec.cooldown, spec.min_tokens, spec.warmup_traces = 1, 0, 0, 0
        return True

    def width(self, observed: Observed) -> NDArray[np.int32]:
        return np.select(
            [observed.smooth_entropy_B > 1, observed.smooth_entropy_B > 0.9], [3, 2], 1
        ).astype(np.int32)


ADAPTIVE = [
    AboveEntropy(forks=1, siblings=2, cooldown=1, warmup_traces=0),
    OnlineEntropy(forks=2, siblings=1, quantile=0.7, cooldown=0),
    EntropyConfidence(
        entropy_high=0.6, entropy_low=0.1, confidence=1.0, entropy_rise=0.5, cooldown=0,
        min_tokens=1, trunk_share=0.3,
    ),
    WiderWhereUncertain(),
]  # fmt: skip


@pytest.mark.parametrize("fork", ADAPTIVE, ids=lambda fork: type(fork).__name__)
def test_leaves_of_online_forks_follow_the_law_by_weight_but_not_by_count(fork: Fork) -> None:
    forest = grow(fork)
    table = forest.leaf_table(forest.leaves())
    assert (table.depth_N > 0).mean() > 0.2
    assert law_pvalue(forest, weighted=True) > 1e-3
    assert law_pvalue(forest, weighted=False) < 1e-6


def test_flat_samples_follow_the_law() -> None:
    forest = grow(Flat())
    assert law_pvalue(forest, weighted=True) > 1e-3
    assert law_pvalue(forest, weighted=False) > 1e-3


def test_forks_chosen_on_the_finished_trunk_break_the_law() -> None:
    """ETMR looks at the whole trunk first: its trunks' leaves are no sample, by weight either."""
    forest = grow(TopEntropy(forks=1, siblings=1, mask_tail=0))
    assert law_pvalue(forest, weighted=True) < 1e-6


class ForcedChildren(ToyEngine):
    """The released ECHO code's siblings: they begin with the likeliest token, not with a draw."""

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        row_V = TRANSITION[self._known[parent].path[keep]]
        forced = [self._drawing(int(row_V.argmax()), row_V, keep, seed) for seed in seed_B]
        super().fork(parent, keep, branch_B, np.array(forced, np.uint64), exclude)

    def _drawing(self, token: int, row_V: NDArray[np.float64], at: int, seed: int) -> int:
        """A seed with which `token` is drawn at this position."""
        seeds = np.random.default_rng(seed).integers(2**63, size=100).astype(np.uint64)
        token_B = np.searchsorted(row_V.cumsum(), uniforms(seeds, np.full(100, at)), side="right")
        return int(seeds[token_B == token][0])


def test_forced_children_break_the_law() -> None:
    forest = grow(ADAPTIVE[0], ForcedChildren(TRANSITION, [EOS]))
    assert law_pvalue(forest, weighted=True) < 1e-6
