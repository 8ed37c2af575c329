"""Leaves: the finished answers of one step, flat arrays over all prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import Forest, PackedRows, Segments, pack_flat
from pyrl.texts import Decode, Texts

__all__ = ["Decode", "Leaves", "Look", "Scored", "Texts", "check_needs", "collect", "score"]

Look = Callable[[str], NDArray[np.float64]]
"""Gives log-probs [T] that need a pass of a model, by their name; the pass is made once."""

LOOKED_UP = ("old_logprob_T", "ref_logprob_T", "prompt_logprob_T")
"""What `Look` gives."""


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
    forest: Forest
    """Where they grew."""
    decode: Decode
    progress: float = 0.0
    """Share of the run that is done: 0 in the first step, below 1 in the last."""
    limit: int = 0
    """Tokens that a response may have; 0: nobody says."""
    state: Any = None
    """What the choice that reads this remembers: see `pyrl.run.states`; None of one without."""

    @cached_property
    def rows(self) -> PackedRows:
        """Their T tokens, leaf after leaf: entropy, confidence, log-prob by the sampler, and so on.

        They are copied when they are read for the first time.
        """
        return pack_flat(self.forest, self.leaf_N)

    @cached_property
    def texts(self) -> Texts:
        """Their texts by tokens: spans of characters, and steps."""
        return Texts(self.text_N, self.token_N, self.decode)

    def take(self, index_N: NDArray[np.int64]) -> Leaves:
        """The leaves at these ordinals, in the given order."""
        return replace(
            self,
            leaf_N=self.leaf_N[index_N],
            group_N=self.group_N[index_N],
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
    """What advantage stages read: the leaves that train, their rewards, tokens and segments.

    The tokens [T] come leaf after leaf; a shared token occurs once per leaf.
    """

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
    """Leaf ordinal of each response token."""
    segment_T: NDArray[np.int64]
    token_T: NDArray[np.int64]
    """Token ids."""
    logprob_T: NDArray[np.float32]
    """As the engine that sampled reported them, at the sampling temperature (nats)."""
    entropy_T: NDArray[np.float32]
    confidence_T: NDArray[np.float32]
    forced_T: NDArray[np.bool_]
    """No sample of the policy: such a token does not train."""
    texts: Texts
    """The responses' texts, spans of characters and steps, computed when they are read."""
    look: Look
    """A pass of the learner; read its results as the fields of the names in `LOOKED_UP`."""
    progress: float
    """`Leaves.progress`."""
    state: Any = None
    """What the stage that reads this remembers, a dictionary that it may change: see
    `pyrl.run.states`; None of a stage without `initial`."""

    @property
    def old_logprob_T(self) -> NDArray[np.float64]:
        """Log-probs by the learner before it updates, at the sampling temperature (nats).

        The first stage that reads them makes a pass over the tokens. ValueError where the run has
        none (--old-logprobs engine).
        """
        return self.look("old_logprob_T")

    @property
    def ref_logprob_T(self) -> NDArray[np.float64]:
        """The same by the frozen first model, which is in memory if a choice needs it.

        ValueError where it is not: no loss with a distance from it, no choice that names
        "ref_logprob_T" in `needs`.
        """
        return self.look("ref_logprob_T")

    @property
    def prompt_logprob_T(self) -> NDArray[np.float64]:
        """For each token the mean log-prob of its prompt's tokens but the first, by the learner
        before it updates, at the sampling temperature (nats); 0 for a prompt of one token.

        ValueError where the run makes no pass of the learner (--old-logprobs engine).
        """
        return self.look("prompt_logprob_T")


LEAVES = frozenset(f.name for f in fields(Leaves) if f.name != "state") | {"rows", "texts"}
"""What a reward may name in `needs`."""

SCORED = frozenset(f.name for f in fields(Scored) if f.name not in ("look", "state")) | {*LOOKED_UP}
"""What an advantage stage may name in `needs`, and a selection."""


def check_needs(kind: str, choice: object, known: Collection[str]) -> None:
    """ValueError names what a choice of this kind names in `needs` and does not get."""
    for name in needs_of(choice):
        if name not in known:
            raise ValueError(
                f"{kind}: {type(choice).__name__} needs {name}, expected among what a run has: "
                f"{', '.join(sorted(known))}"
            )


def needs_of(choice: Any) -> tuple[str, ...]:
    """What a choice names in `needs`; nothing of one that does not say."""
    return tuple(choice.needs) if hasattr(choice, "needs") else ()


def collect(
    forest: Forest, decode: Decode, tail: int = 16, *, progress: float = 0.0, limit: int = 0
) -> Leaves:
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
        forest=forest,
        decode=decode,
        progress=progress,
        limit=limit,
    )


def no_pass(name: str) -> NDArray[np.float64]:
    """The `Look` of a loop that makes no passes of a model before its update."""
    raise ValueError(f"{name}: expected a pass of a model; give score() a `look` that makes it")


def score(leaves: Leaves, reward_N: NDArray[np.float64], look: Look = no_pass) -> Scored:
    """What advantages are computed from: leaves, their rewards [N] and passes of a model."""
    rows = leaves.rows
    return Scored(
        group_N=leaves.group_N,
        trunk_N=leaves.trunk_N,
        weight_N=leaves.weight_N,
        reward_N=reward_N,
        entropy_N=leaves.entropy_N,
        length_N=leaves.length_N,
        segments=leaves.forest.segments(leaves.leaf_N),
        leaf_T=rows.leaf_T,
        segment_T=rows.segment_T,
        token_T=rows.label_T,
        logprob_T=rows.logprob_T,
        entropy_T=rows.entropy_T,
        confidence_T=rows.confidence_T,
        forced_T=rows.forced_T,
        texts=leaves.texts,
        look=look,
        progress=leaves.progress,
    )
