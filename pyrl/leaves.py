"""Leaves: the finished answers of one step, flat arrays over all prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import Forest, PackedRows, Segments

Decode = Callable[[Sequence[NDArray[np.int32]]], list[str]]
"""Turns the tokens of responses into their texts."""


@dataclass(frozen=True)
class Leaves:
    """Finished branches of all trees of a step; those of one prompt (a group) are contiguous."""

    leaf_N: NDArray[np.int64]
    """Forest handles, tree-major, in creation order inside a tree."""
    group_N: NDArray[np.int64]
    """Index of the prompt in the step. Groups are ragged."""
    groups: int
    """G: the number of prompts, also of those that have no leaf."""
    trunk_N: NDArray[np.int64]
    """Ordinal of the leaf's trunk (independent sample of the prompt) inside its group."""
    weight_N: NDArray[np.float64]
    """Without replacement: what the leaf stands for, 1 in sum over a prompt. Otherwise the
    inverse-width weight: a trunk's leaves, pruned ones included, sum to 1."""
    log_mass_N: NDArray[np.float64]
    """Log-prob of the response as it was drawn (nats), without replacement; otherwise NaN."""
    length_N: NDArray[np.int64]
    """Response tokens, end of sequence included."""
    finish_N: NDArray[np.uint8]
    """engine.STOPPED or engine.TRUNCATED."""
    entropy_N: NDArray[np.float64]
    """Mean token entropy of the response (nats)."""
    confidence_N: NDArray[np.float64]
    """Mean confidence of the response's last 16 tokens."""
    text_N: tuple[str, ...]
    """Decoded response without special tokens."""
    token_N: tuple[NDArray[np.int32], ...]
    """Token ids of each response."""

    def take(self, index_N: NDArray[np.int64]) -> Leaves:
        """The leaves at these ordinals, in the given order."""
        return Leaves(
            leaf_N=self.leaf_N[index_N],
            group_N=self.group_N[index_N],
            groups=self.groups,
            trunk_N=self.trunk_N[index_N],
            weight_N=self.weight_N[index_N],
            log_mass_N=self.log_mass_N[index_N],
            length_N=self.length_N[index_N],
            finish_N=self.finish_N[index_N],
            entropy_N=self.entropy_N[index_N],
            confidence_N=self.confidence_N[index_N],
            text_N=tuple(self.text_N[i] for i in index_N),
            token_N=tuple(self.token_N[i] for i in index_N),
        )


@dataclass(frozen=True)
class Scored:
    """What advantage stages read: the leaves that train, their rewards, tokens and segments."""

    group_N: NDArray[np.int64]
    """Non-decreasing."""
    trunk_N: NDArray[np.int64]
    weight_N: NDArray[np.float64]
    """`Leaves.weight_N`."""
    reward_N: NDArray[np.float64]
    """NaN is unknown (a verifier that ran out of time): no baseline counts it, no advantage."""
    entropy_N: NDArray[np.float64]
    length_N: NDArray[np.int64]
    segments: Segments
    """The trees of these leaves; see Forest.segments."""
    leaf_T: NDArray[np.int64]
    """Leaf ordinal of each response token, leaf by leaf: a shared token occurs once per leaf."""
    segment_T: NDArray[np.int64]
    entropy_T: NDArray[np.float32]
    confidence_T: NDArray[np.float32]


def collect(forest: Forest, decode: Decode, tail: int = 16) -> Leaves:
    """The finished branches of a forest with one tree per prompt."""
    leaf_N = forest.leaves()
    table = forest.leaf_table(leaf_N)
    token_N = [forest.path(leaf).tokens for leaf in leaf_N.tolist()]
    return Leaves(
        leaf_N=leaf_N,
        group_N=table.tree_N,
        groups=forest.trees,
        trunk_N=table.trunk_N,
        weight_N=table.weight_N,
        log_mass_N=table.log_mass_N,
        length_N=table.length_N,
        finish_N=table.finish_N,
        entropy_N=table.mean_entropy_N,
        confidence_N=forest.tail_confidence(leaf_N, tail),
        text_N=tuple(decode(token_N)),
        token_N=tuple(token_N),
    )


def score(
    forest: Forest, leaves: Leaves, reward_N: NDArray[np.float64], rows: PackedRows
) -> Scored:
    """What advantages are computed from: leaves, their rewards [N] and their rows in the forest."""
    return Scored(
        group_N=leaves.group_N,
        trunk_N=leaves.trunk_N,
        weight_N=leaves.weight_N,
        reward_N=reward_N,
        entropy_N=leaves.entropy_N,
        length_N=leaves.length_N,
        segments=forest.segments(leaves.leaf_N),
        leaf_T=rows.leaf_T,
        segment_T=rows.segment_T,
        entropy_T=rows.entropy_T,
        confidence_T=rows.confidence_T,
    )
