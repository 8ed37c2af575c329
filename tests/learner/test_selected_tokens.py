"""A selection after the advantages: what it drops is nowhere in the loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from leaf_records import leaves_of
from learner_batch import (
    GROUP_N,
    PLAIN,
    RESPONSE_N,
    assert_close,
    demo_model,
    gradient,
    off_policy,
    on_policy,
    settings,
    taken_gradient,
)
from learner_reference import slow_tokens
from numpy.typing import NDArray
from reading_parts import Largest

from pyrl.learner import Learner
from pyrl.leaves import Scored
from pyrl.loss import Loss
from pyrl.loss.aggregate import SeqMeanTokenMean
from pyrl.pack import TokenBatch
from pyrl.select import First, tokens_that_train

SHARE = 0.4
OFFSET_N1 = [0, *np.cumsum(RESPONSE_N).tolist()]


def scored_as(batch: TokenBatch) -> Scored:
    """What a selection reads of the batch."""
    leaves = leaves_of(["a" * length for length in RESPONSE_N], group_N=GROUP_N.tolist())
    tokens, leaf_T = sum(RESPONSE_N), batch.leaf_T
    return Scored(
        group_N=leaves.group_N,
        trunk_N=leaves.trunk_N,
        weight_N=leaves.weight_N,
        reward_N=np.zeros(len(RESPONSE_N)),
        entropy_N=leaves.entropy_N,
        length_N=leaves.length_N,
        segments=leaves.forest.segments(np.zeros(0, np.int64)),
        leaf_T=leaf_T,
        segment_T=leaf_T,
        token_T=batch.label_T,
        logprob_T=batch.old_logprob_T,
        entropy_T=batch.entropy_T,
        confidence_T=batch.confidence_T,
        forced_T=~batch.mask_T,
        texts=leaves.texts,
        look=lambda name: np.zeros(tokens),
        progress=0.0,
    )


@pytest.mark.parametrize("by_response", [False, True])
def test_the_gradient_is_that_of_a_loss_made_by_hand_over_the_rest(by_response: bool) -> None:
    batch, model = off_policy(), demo_model()
    train_T, metrics = tokens_that_train(Largest(share=SHARE), scored_as(batch), batch.advantage_T)
    aggregate = SeqMeanTokenMean() if by_response else PLAIN.aggregate
    loss = replace(PLAIN, dual=None, aggregate=aggregate)
    learner = Learner(copy.deepcopy(model), None, settings(loss))
    found = gradient(learner, replace(batch, mask_T=train_T))

    size = sorted(range(len(train_T)), key=lambda t: -abs(batch.advantage_T[t]))
    kept = {t for t in size[: round(SHARE * len(size))] if batch.mask_T[t]}
    leaf_of = [sum(t >= start for start in OFFSET_N1[1:]) for t in range(len(train_T))]
    count = {leaf: sum(leaf_of[t] == leaf for t in kept) for leaf in {leaf_of[t] for t in kept}}
    assert len(count) < len(RESPONSE_N), "a whole response is dropped, which is no denominator"
    total = torch.zeros((), dtype=torch.float64)
    for t, token in enumerate(slow_tokens(model, model, batch)):
        if t in kept:
            ratio = (token.logprob - float(batch.old_logprob_T[t])).exp()
            gain = torch.minimum(
                ratio * batch.advantage_T[t], ratio.clamp(0.8, 1.2) * batch.advantage_T[t]
            )
            share = 1 / (len(count) * count[leaf_of[t]]) if by_response else 1 / len(kept)
            total = total - share * gain
    model.zero_grad()
    total.backward()
    assert_close(found, taken_gradient(model), 1e-12)
    assert metrics["select/tokens"] == len(kept) / batch.mask_T.sum()
    assert metrics["select/leaves"] == len(count) / len(RESPONSE_N)


def test_without_a_selection_after_advantages_all_but_forced_tokens_train() -> None:
    batch = off_policy()
    train_T, metrics = tokens_that_train(First(), scored_as(batch), batch.advantage_T)
    assert train_T.tolist() == batch.mask_T.tolist()
    assert metrics == {}


def test_a_selection_of_nothing_changes_nothing() -> None:
    model = demo_model(torch.float32)
    batch = on_policy(off_policy(), copy.deepcopy(model))
    train_T, metrics = tokens_that_train(Largest(share=0), scored_as(batch), batch.advantage_T)
    learner = Learner(model, None, settings(Loss()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    row = learner.update(replace(batch, mask_T=train_T), GROUP_N, 0)
    assert metrics == {"select/tokens": 0, "select/leaves": 0}
    assert row["loss"] == row["grad_norm"] == 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@dataclass(frozen=True)
class Given(First):
    """Returns what it is made from."""

    mask: NDArray[np.generic] | None = None

    def after(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.bool_]:
        return self.mask


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (np.ones(39, bool), r"a numpy array bool\[39\]"),
        (np.full(40, np.nan), r"a numpy array float64\[40\]"),
        (np.ones((40, 1), bool), r"a numpy array bool\[40, 1\]"),
        (None, "None"),
    ],
)
def test_what_is_no_boolean_for_each_token_is_refused(
    mask: NDArray[np.generic] | None, got: str
) -> None:
    batch = off_policy()
    says = f"select: Given.after: expected a boolean for each of 40 tokens, got {got}"
    with pytest.raises(ValueError, match=says):
        tokens_that_train(Given(mask), scored_as(batch), batch.advantage_T)
