"""The tree/* metrics against what the forest itself says, and against arithmetic."""

from collections.abc import Sequence
from dataclasses import replace
from math import log

import numpy as np
import pytest
from leaf_records import leaves_of
from numpy.typing import NDArray
from toy_rollout import prompts, random_toy, rollout

from pyrl.fork import EntropyConfidence, TopEntropy
from pyrl.leaves import collect
from pyrl.prune import Doubt
from pyrl.report.tree import tree_metrics
from pyrl.rollout import Rollout, make_signals


def decode(paths: Sequence[NDArray[np.int32]]) -> list[str]:
    return [" ".join(map(str, tokens.tolist())) for tokens in paths]


def measured(run: Rollout) -> dict[str, float]:
    return tree_metrics(run.forest, collect(run.forest, decode), run)


def test_leaves_are_collected_as_the_forest_holds_them() -> None:
    run = rollout(random_toy(end=0.05), prompts(1, 2), fork=TopEntropy(mask_tail=0), votes=10)
    forest = run.run()
    leaves = collect(forest, decode, tail=3)
    assert leaves.groups == 2
    assert leaves.group_N.tolist() == [0] * 10 + [1] * 10
    for n, leaf in enumerate(leaves.leaf_N.tolist()):
        path = forest.path(leaf)
        assert leaves.text_N[n] == decode([path.tokens])[0]
        assert leaves.length_N[n] == len(path.tokens)
        assert leaves.weight_N[n] == forest.weight(leaf)
        assert leaves.entropy_N[n] == pytest.approx(path.entropy.mean(), rel=1e-6)
        assert leaves.confidence_N[n] == pytest.approx(path.confidence[-3:].mean(), rel=1e-6)
    trunks = [forest.trunk_of(leaf) for leaf in leaves.leaf_N.tolist()]
    same_N2 = np.equal.outer(trunks, trunks)
    assert (np.equal.outer(leaves.trunk_N, leaves.trunk_N)[:10, :10] == same_N2[:10, :10]).all()


def test_a_flat_rollout_saves_nothing_and_has_no_collapse() -> None:
    run = rollout(random_toy(), prompts(1, 2, 3), votes=5)
    run.run()
    assert measured(run) == {
        "tree/leaves": 15,
        "tree/trunks": 15,
        "tree/forks": 0,
        "tree/depth": 0,
        "tree/tokens_saved_ratio": 0,
        "tree/trunk_share_entropy": pytest.approx(1),
    }


def test_etmrs_metrics_are_its_arithmetic() -> None:
    run = rollout(random_toy(end=0.0), prompts(1), fork=TopEntropy(mask_tail=0), votes=60)
    forest = run.run()
    segments = forest.segments(forest.leaves())
    tokens = segments.length_S[segments.parent_S >= 0].sum()
    assert measured(run) == {
        "tree/leaves": 60,
        "tree/trunks": 12,
        "tree/forks": 24,
        "tree/mean_width": 3,
        # The first fork's siblings have one fork on their path, the trunk and the others two.
        "tree/depth": pytest.approx((2 + 1 + 1 + 2 + 2) / 5),
        "tree/branch_rate": pytest.approx(24 / tokens),
        "tree/tokens_saved_ratio": pytest.approx(1 - tokens / (60 * 30)),
        "tree/trunk_share_entropy": pytest.approx(log(12) / log(60)),
    }


def test_pruned_branches_are_counted_by_reason_and_their_tokens_as_sampled() -> None:
    fork = EntropyConfidence(
        entropy_high=0.5, confidence=1.0, entropy_rise=0.0, cooldown=1, min_tokens=0,
        warmup_traces=0,
    )  # fmt: skip
    prune = Doubt(confidence_low=0.3, tail_low=0.5, decline_run=3, spike=0.8, spike_run=2)
    signals = make_signals(fork, prune)
    seen: set[str] = set()
    for seed in range(6):
        run = rollout(random_toy(end=0.02), prompts(1, 2, 1, 2), fork=fork, prune=prune,
                      votes=20, seed=seed, signals=signals)  # fmt: skip
        forest = run.run()
        metrics = measured(run)
        names = [None, "low_confidence", "tail_decline", "entropy_spike"]
        by_reason = {name: forest.pruned()[i] for i, name in enumerate(names) if name}
        assert {k: metrics[f"tree/pruned_{k}"] for k in by_reason} == by_reason
        pruned = sum(by_reason.values())
        assert metrics["tree/pruned"] == pruned
        assert metrics["tree/prune_rate"] == pruned / (pruned + 80)
        length_N = collect(forest, decode).length_N
        assert metrics["tree/tokens_saved_ratio"] == pytest.approx(
            1 - forest.stats()["tokens"] / length_N.sum()
        )
        seen |= {name for name, count in by_reason.items() if count}
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("trunk_N", "entropy"),
    [
        ([0, 1, 2, 3], 1.0),
        ([5, 5, 5, 5], 0.0),
        ([0, 0, 1, 1], 0.5),
        ([0, 0, 0, 3], -(0.75 * log(0.75) + 0.25 * log(0.25)) / log(4)),
    ],
)
def test_share_entropy_is_low_where_few_trunks_own_the_vote(
    trunk_N: list[int], entropy: float
) -> None:
    run = rollout(random_toy(), prompts(1), votes=4)
    forest = run.run()
    leaves = replace(leaves_of(["a"] * 4, trunk_N=trunk_N), leaf_N=forest.leaves())
    metrics = tree_metrics(forest, leaves, run)
    assert metrics["tree/trunk_share_entropy"] == pytest.approx(entropy)
