"""Tree advantages as their papers print them: sets of leaves, recursion, one number at a time.

With the records that the stages read, made from such trees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
from leaf_records import leaves_of

from pyrl.advantage import Stage, advantages
from pyrl.leaves import Scored


@dataclass
class ReferenceTree:
    """One prompt's tree. Unknown rewards are NaN; the root is segment 0."""

    parent: list[int]
    length: list[int]
    leaf_segment: list[int]
    reward: list[float]

    def path(self, segment: int) -> list[int]:
        """From the root to the segment."""
        up = self.parent[segment]
        return ([] if up < 0 else self.path(up)) + [segment]

    def known(self) -> list[int]:
        return [n for n, reward in enumerate(self.reward) if not math.isnan(reward)]

    def below(self, segment: int) -> frozenset[int]:
        """The known leaves at or under the segment."""
        return frozenset(n for n in self.known() if segment in self.path(self.leaf_segment[n]))

    def fork_parent(self, segment: int) -> int:
        """The nearest ancestor that holds more leaves; the root if none does."""
        up = self.parent[segment]
        while self.parent[up] >= 0 and self.below(up) == self.below(segment):
            up = self.parent[up]
        return up

    def leave_one_out(self) -> dict[int, float]:
        known = self.known()
        if len(known) == 1:
            return {known[0]: 0.0}
        return {
            n: self.reward[n] - fmean(self.reward[other] for other in known if other != n)
            for n in known
        }


def segments_of(parent: list[int], leaf_segment: list[int], length: list[int]) -> Any:
    return SimpleNamespace(
        parent_S=np.array(parent, np.int64),
        length_S=np.array(length, np.int64),
        leaf_segment_N=np.array(leaf_segment, np.int64),
    )


def scored_of(trees: list[ReferenceTree]) -> Scored:
    """The record of a step with these trees; signals are random."""
    random = np.random.default_rng(0)
    parent: list[int] = []
    length, leaf_segment, group, trunk, reward = [], [], [], [], []
    leaf_T: list[int] = []
    segment_T: list[int] = []
    for index, tree in enumerate(trees):
        first = len(parent)
        parent += [first + up if up >= 0 else -1 for up in tree.parent]
        length += tree.length
        for n, segment in enumerate(tree.leaf_segment):
            path = tree.path(segment)[1:]
            segment_T += [first + s for s in path for _ in range(tree.length[s])]
            leaf_T += [len(group)] * sum(tree.length[s] for s in path)
            group.append(index)
            trunk.append(path[0])
            leaf_segment.append(first + segment)
            reward.append(tree.reward[n])
    length_N = np.bincount(np.array(leaf_T, np.int64), minlength=len(group)).astype(np.int64)
    text_N = tuple("a" * length for length in length_N.tolist())
    leaves = leaves_of(text_N, group_N=group, groups=len(trees))
    return Scored(
        group_N=np.array(group, np.int64),
        trunk_N=np.array(trunk, np.int64),
        weight_N=np.ones(len(group)),
        reward_N=np.array(reward, np.float64),
        entropy_N=random.uniform(0.1, 2.0, len(group)),
        length_N=length_N,
        segments=segments_of(parent, leaf_segment, length),
        leaf_T=np.array(leaf_T, np.int64),
        segment_T=np.array(segment_T, np.int64),
        entropy_T=random.exponential(1.0, len(leaf_T)).astype(np.float32),
        confidence_T=random.uniform(0.2, 1.0, len(leaf_T)).astype(np.float32),
        token_T=np.full(len(leaf_T), ord("a")),
        logprob_T=-random.exponential(1.0, len(leaf_T)).astype(np.float32),
        forced_T=np.zeros(len(leaf_T), bool),
        texts=leaves.texts,
        look=lambda name: np.full(len(leaf_T), -1.0 if name == "old_logprob_T" else -2.0),
        progress=0.5,
    )


def flat(*groups: list[float]) -> list[ReferenceTree]:
    """Trees without a fork."""
    return [
        ReferenceTree(
            parent=[-1] + [0] * len(reward),
            length=[3] + [2] * len(reward),
            leaf_segment=list(range(1, len(reward) + 1)),
            reward=reward,
        )
        for reward in groups
    ]


def example() -> ReferenceTree:
    """root -> {a: leaves 1, 0; b: leaves 0, 0}; a has 20 tokens, the other segments 10."""
    return ReferenceTree(
        parent=[-1, 0, 1, 1, 0, 4, 4],
        length=[5, 20, 10, 10, 10, 10, 10],
        leaf_segment=[2, 3, 5, 6],
        reward=[1.0, 0.0, 0.0, 0.0],
    )


def with_lengths(reward: Sequence[float], length: Sequence[int]) -> ReferenceTree:
    """A tree without a fork, with leaves of so many tokens."""
    (tree,) = flat([*reward])
    tree.length = [3, *length]
    return tree


def change(scored: Scored, **fields: Any) -> Scored:
    return Scored(**{**vars(scored), **fields})


def run(stages: tuple[Stage, ...], scored: Scored) -> np.ndarray:
    return advantages(stages, scored)[0]


def spelled(scored: Scored, texts: Sequence[str]) -> Scored:
    """With these texts, a character of which is a token."""
    tokens = tuple(np.array([ord(c) for c in text], np.int32) for text in texts)
    given = replace(scored.texts, text_N=tuple(texts), token_N=tokens)
    return change(scored, texts=given)


def remembering(stage: Any, scored: Scored, state: dict[str, Any] | None = None) -> np.ndarray:
    """What a stage with a state makes of a step."""
    return advantages((stage,), scored, [stage.initial() if state is None else state])[0]


def per_leaf(advantage_T: np.ndarray, scored: Scored) -> np.ndarray:
    """The advantage of each leaf, which must be one number for all its tokens."""
    result = np.full(scored.group_N.size, math.nan)
    result[scored.leaf_T] = advantage_T
    assert np.array_equal(result[scored.leaf_T], advantage_T)
    return result


def leaf_values(stages: tuple[Stage, ...], *groups: list[float]) -> np.ndarray:
    scored = scored_of(flat(*groups))
    return per_leaf(run(stages, scored), scored)


def grpo(reward: Sequence[float], eps: float = 1e-6) -> list[float]:
    known = [r for r in reward if not math.isnan(r)]
    if len(known) < 2:
        return [0.0] * len(reward)
    mean, std = fmean(known), stdev(known)
    return [0.0 if math.isnan(r) else (r - mean) / (std + eps) for r in reward]


def values(tree: ReferenceTree) -> dict[int, float]:
    """V(s): the mean leave-one-out reward below each segment that has a known leaf."""
    reward = tree.leave_one_out()
    below = {segment: tree.below(segment) for segment in range(len(tree.parent))}
    return {s: fmean(reward[n] for n in leaves) for s, leaves in below.items() if leaves}


def value_mean(tree: ReferenceTree, by_token: bool) -> float:
    """The mean of V over the tokens (or segments) of all leaves."""
    value, total, weight = values(tree), 0.0, 0.0
    for segment in list(value)[1:]:
        units = tree.length[segment] if by_token else min(tree.length[segment], 1)
        total += len(tree.below(segment)) * units * value[segment]
        weight += len(tree.below(segment)) * units
    return total / weight if weight else 0.0


def tree_rl(tree: ReferenceTree) -> dict[int, float]:
    mean = value_mean(tree, by_token=True)
    centred = {segment: value - mean for segment, value in values(tree).items()}
    result = {}
    for segment in list(centred)[1:]:
        whole = centred[segment] - centred[0]
        local = centred[segment] - centred[tree.fork_parent(segment)]
        result[segment] = (whole + local) / math.sqrt(len(tree.below(segment)))
    return result


def tree_rl_released(tree: ReferenceTree, by_token: bool = True) -> dict[int, float]:
    mean = value_mean(tree, by_token)
    scaled = {s: (v - mean) / math.sqrt(len(tree.below(s))) for s, v in values(tree).items()}
    local = {0: 0.0}
    for segment in list(scaled)[1:]:
        up = tree.parent[segment]
        same = math.isclose(scaled[segment], scaled[up], rel_tol=1e-12, abs_tol=1e-12)
        local[segment] = local[up] if same else scaled[segment] - scaled[up]
    return {segment: scaled[segment] + local[segment] for segment in list(scaled)[1:]}


def tree_po(tree: ReferenceTree, by_count: bool) -> list[float]:
    """One number for each leaf, before the whitening."""
    result = [0.0] * len(tree.reward)
    for n in tree.known():
        sets = {tree.below(s) for s in tree.path(tree.leaf_segment[n])}
        subtrees = [leaves for leaves in sets if len(leaves) > 1 or leaves == tree.below(0)]
        weights = [len(leaves) if by_count else 1 for leaves in subtrees]
        parts = [tree.reward[n] - fmean(tree.reward[m] for m in leaves) for leaves in subtrees]
        result[n] = sum(w * d for w, d in zip(weights, parts, strict=True)) / sum(weights)
    return result


def tree_grpo(tree: ReferenceTree) -> list[float]:
    trunk = [tree.path(segment)[1] for segment in tree.leaf_segment]
    result = grpo(tree.reward)
    for name in set(trunk):
        members = [n for n, other in enumerate(trunk) if other == name]
        for n, score in zip(members, grpo([tree.reward[n] for n in members]), strict=True):
            result[n] += score
    return result


def whiten(values: Sequence[float], eps: float = 1e-8) -> list[float]:
    if len(values) < 2:
        return [0.0] * len(values)
    mean = fmean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return [(value - mean) / math.sqrt(variance + eps) for value in values]


def ragged(case: int) -> tuple[Scored, list[list[float]]]:
    """A step of four prompts of any size, some rewards unknown, with texts and passes; rewards."""
    random = np.random.default_rng(case)
    groups = [
        random.choice([0.0, 0.25, 1.0, math.nan], random.integers(1, 7)).tolist() for _ in range(4)
    ]
    trees = [with_lengths(r, random.integers(1, 6, len(r)).tolist()) for r in groups]
    scored = scored_of(trees)
    tokens = scored.leaf_T.size
    texts = ["".join(random.choice(["a", "|"], n)) for n in scored.length_N]
    looks = {name: -random.exponential(1.0, tokens) for name in ("old_logprob_T", "ref_logprob_T")}
    looks["prompt_logprob_T"] = -random.exponential(1.0, 4)[scored.group_N[scored.leaf_T]]
    return change(spelled(scored, texts), look=looks.__getitem__), groups
