"""What the trees of a step looked like: the tree/* metrics."""

from __future__ import annotations

import numpy as np

from pyrl._core.tree import Forest
from pyrl.budget import UNLIMITED
from pyrl.leaves import Leaves
from pyrl.rollout import Rollout

REASONS = {1: "low_confidence", 2: "tail_decline", 3: "entropy_spike"}


def tree_metrics(forest: Forest, leaves: Leaves, rollout: Rollout) -> dict[str, float]:
    """Names and meanings as in pyrl.report.metrics.MEANING."""
    counts = rollout.counts
    pruned = sum(counts.pruned.values())
    flat_tokens = int(leaves.length_N.sum())
    metrics = {
        "tree/leaves": float(len(leaves.leaf_N)),
        "tree/trunks": float(counts.trunks),
        "tree/forks": float(counts.forks),
        "tree/depth": float(forest.leaf_table(leaves.leaf_N).depth_N.mean()),
        "tree/tokens_saved_ratio": 1 - counts.sampled_tokens / max(flat_tokens, 1),
        "tree/trunk_share_entropy": _share_entropy(leaves),
    }
    if rollout.fork.trunks(rollout.votes) < rollout.votes:
        metrics["tree/branch_rate"] = counts.forks / max(counts.sampled_tokens, 1)
        if counts.forks:
            metrics["tree/mean_width"] = 1 + counts.siblings / counts.forks
    if rollout.prune.respawns(rollout.votes):
        metrics["tree/pruned"] = float(pruned)
        metrics["tree/prune_rate"] = pruned / max(pruned + len(leaves.leaf_N), 1)
        metrics |= {
            f"tree/pruned_{name}": float(counts.pruned.get(reason, 0))
            for reason, name in REASONS.items()
        }
    if rollout.even:
        metrics["tree/first_token_error"] = first_token_error(leaves)
    if rollout.allowance != UNLIMITED:
        metrics["tree/out_of_tokens"] = counts.out_of_tokens / len(rollout.prompts)
        metrics["tree/out_of_time"] = counts.out_of_time / len(rollout.prompts)
        metrics["tree/cut_leaves"] = float(counts.cut)
        metrics["tree/dropped"] = float(counts.dropped)
    if rollout.poll is not None:
        metrics["tree/decided"] = counts.decided / len(rollout.prompts)
        metrics["tree/unneeded"] = float(counts.unneeded)
        metrics["tree/unopened"] = float(counts.unopened)
    return metrics


def first_token_error(leaves: Leaves) -> float:
    """Half of the sum of |share - probability| over the first tokens that the samples of a question
    have, by the distribution before truncation; mean over questions."""
    first_N = np.cumsum(leaves.length_N) - leaves.length_N
    probability_N = np.exp(leaves.rows.logprob_T[first_N].astype(np.float64))
    token_N = np.array([tokens[0] for tokens in leaves.token_N])
    values = []
    for group in np.unique(leaves.group_N):
        of_group = np.flatnonzero(leaves.group_N == group)
        _, one = np.unique(leaves.trunk_N[of_group], return_index=True)
        trunks = of_group[one]
        _, place, count = np.unique(token_N[trunks], return_index=True, return_counts=True)
        off = np.abs(count / len(trunks) - probability_N[trunks[place]])
        values.append(float(off.sum() / 2))
    return float(np.mean(values))


def _share_entropy(leaves: Leaves) -> float:
    """Entropy of the trunks' shares of a question's leaves over that of equal leaves, mean over
    questions: 1 is a flat group; low is rollout collapse, where few trunks own the vote."""
    values = []
    for group in np.unique(leaves.group_N):
        count = np.bincount(leaves.trunk_N[leaves.group_N == group])
        share = count[count > 0] / count.sum()
        most = np.log(count.sum())
        values.append(float(-(share * np.log(share)).sum() / most) if most > 0 else 1.0)
    return float(np.mean(values))
