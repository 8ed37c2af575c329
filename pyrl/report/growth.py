"""Growth: all that grew in some trees of a step, pruned branches too, as a forest of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyrl._core.tree import Forest, Path
from pyrl.rollout import Rollout


def grow_again(rollout: Rollout, trees: int) -> tuple[Forest, dict[int, int]]:
    """The first `trees` trees of a rollout that remembers so many, and the new handles by the old.

    Leaves are finished as they were, with their weights and masses; pruned branches stay open with
    the tokens that they had, so that `Forest.segments` of all branches is the whole tree; nobody
    knows their seeds, which are 0. Branches come in the order of the positions at which they left
    their parents.
    """
    forest, new = Forest(), dict[int, int]()
    for tree in range(trees):
        forest.add_tree(rollout.prompts[tree])
        _grow(rollout, tree, forest, new)
        if rollout.forest.refused(tree) > -np.inf:
            forest.refuse(tree, rollout.forest.refused(tree))
    old_N = np.array([branch for branch in new if branch not in rollout.pruned], np.int64)
    table = rollout.forest.leaf_table(old_N)
    leaf_N = np.array([new[branch] for branch in old_N.tolist()], np.int64)
    forest.finish(leaf_N, table.finish_N)
    for old, leaf, weight in zip(
        old_N.tolist(), leaf_N.tolist(), table.weight_N.tolist(), strict=True
    ):
        forest.set_weight(leaf, weight)
        if np.isfinite(rollout.forest.gumbel(old)):  # drawn without replacement
            forest.stand(leaf, rollout.forest.log_mass(old), rollout.forest.gumbel(old))
    return forest, new


def _grow(rollout: Rollout, tree: int, forest: Forest, new: dict[int, int]) -> None:
    """All branches of a tree, position by position: a fork comes before the token at its place."""
    begin = rollout.budgets[tree].begin
    paths = {
        branch: rollout.pruned[branch].path
        if branch in rollout.pruned
        else rollout.forest.path(branch)
        for branch in begin
    }
    opening: dict[int, list[int]] = {}
    for branch, place in begin.items():
        opening.setdefault(place, []).append(branch)
    growing: list[int] = []
    for at in range(1 + max(len(path.tokens) for path in paths.values())):
        here = opening.get(at, [])
        for branch in here:
            new[branch] = _opened(rollout, branch, tree, forest, new)
        growing = [b for b in (*growing, *here) if at < len(paths[b].tokens)]
        if growing:
            _append(forest, [new[b] for b in growing], [paths[b] for b in growing], at)


def _opened(rollout: Rollout, branch: int, tree: int, forest: Forest, new: dict[int, int]) -> int:
    begin, parent_of = rollout.budgets[tree].begin, rollout.parent_of
    seed = 0 if branch in rollout.pruned else rollout.forest.seed(branch)
    if branch not in parent_of:
        return forest.add_trunk(tree, seed)
    at, parent = begin[branch], parent_of[branch]
    # A fork above the place where its parent began is one of its parent's parent.
    while begin[parent] >= at and parent in parent_of:
        parent = parent_of[parent]
    seed_B = np.array([seed], np.uint64)
    return int(forest.fork(new[parent], at, seed_B, share=False)[0])


def _append(forest: Forest, branches: Sequence[int], paths: Sequence[Path], at: int) -> None:
    forest.append(
        np.array(branches, np.int64),
        np.array([path.tokens[at] for path in paths], np.int32),
        np.array([path.logprob[at] for path in paths], np.float32),
        np.array([path.entropy[at] for path in paths], np.float32),
        np.array([path.confidence[at] for path in paths], np.float32),
        # The weights are the same in all of a step.
        version=int(paths[0].version[at]),
        forced=np.array([path.forced[at] for path in paths], bool),
    )
