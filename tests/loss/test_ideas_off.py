"""A method whose idea is switched off is its parent, to the bit: on two responses of one question.

Each idea is switched off by its own numbers where these have a neutral value, or by a mini-batch
on which it has nothing to do: responses of one token, or the policy that sampled.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from policy_fixture import COLUMNS, fixture_loss

from pyrl.loss import (
    Blend,
    Clip,
    ClipB,
    ClipV,
    EntropyBand,
    EntropyClip,
    EntropyFilter,
    EntropyZ,
    Loss,
    Matched,
    NearGenerator,
    SoftClipped,
    Steer,
    TokenGroup,
    TopEntropy,
)
from pyrl.loss.aggregate import TokenMean
from pyrl.methods import METHODS
from pyrl.methods.about import parent_of
from pyrl.methods.registry import Registry

ONE_EACH = {"offset_N1": torch.arange(8), "group_N": torch.zeros(7, dtype=torch.int64)}
"""Seven responses of one token."""

SAME = {"old_logprob_T": COLUMNS["logprob_T"], "rollout_logprob_T": COLUMNS["logprob_T"]}
"""The policy that sampled is the one that learns."""

ANY_MATCH = (Matched(0.0, inf, level="seq_mean", shrink=False), Matched(0.0, inf, shrink=False))


def loss(name: str) -> Loss:
    return METHODS[name]().loss


def without_penalty(name: str) -> Loss:
    """With its penalties, whose coefficients are 0."""
    own = loss(name)
    return replace(own, penalties=tuple(replace(p, coef=0.0) for p in own.penalties))


CLIP = Clip(0.2, 0.2)

OFF: dict[str, tuple[Loss, dict[str, Any]]] = {
    "dapo": (replace(loss("dapo"), bounds=CLIP), {}),
    "steer": (
        replace(loss("steer"), weight=Steer(least=1.0, most=1.0), dual=None, bounds=CLIP),
        {},
    ),
    "steer_exp": (replace(loss("steer_exp"), weight=Steer("linear")), {}),
    "clip_b": (replace(loss("clip_b"), keep=(ClipB(mu=inf),)), {}),
    "clip_v": (replace(loss("clip_v"), keep=(ClipV(mu=inf), *loss("clip_b").keep)), {}),
    "top_entropy": (replace(loss("top_entropy"), keep=(TopEntropy(share=1.0),)), {}),
    "clip_cov": (replace(loss("clip_cov"), bounds=CLIP, keep=(TopEntropy(share=1.0),)), {}),
    "lp_reg": (replace(without_penalty("lp_reg"), bounds=CLIP), {}),
    "siren": (without_penalty("siren"), {}),
    "epo": (replace(without_penalty("epo"), entropy=0.0), {}),
    "calibrl": (replace(without_penalty("calibrl"), dual=None), {}),
    "dcpo": (replace(loss("dcpo"), reshape=(Blend(limit=0.0),), dual=None), {}),
    "entrocraft": (replace(loss("entrocraft"), reshape=(EntropyBand((-9, -9), (9, 9)),)), {}),
    "entrocraft_filter": (
        replace(loss("entrocraft_filter"), keep=(EntropyFilter((-9, -9), (9, 9)),)),
        {},
    ),
    "ftis": (replace(loss("ftis"), behaviour=None, keep=(NearGenerator(inf),)), {}),
    "aepo_agentic": (
        replace(
            loss("aepo_agentic"),
            reshape=(EntropyZ(scale=0.0),),
            surrogate=SoftClipped(low=0.0, high=0.0, scale_value=False),
            dual=None,
        ),
        {},
    ),
    "hapo": (
        replace(
            loss("hapo"),
            reshape=(TokenGroup(limit=0.0),),
            bounds=EntropyClip(0.2, 0.28, alpha=0.0),
            redistribute=0.0,
            dual=None,
        ),
        {},
    ),
    "g2rpo": (without_penalty("g2rpo"), {}),
    "light_if": (without_penalty("light_if"), {}),
    "gspo": (replace(loss("gspo"), bounds=CLIP, aggregate=TokenMean()), ONE_EACH),
    "minpro": (loss("minpro"), ONE_EACH),
    "hispo": (
        replace(loss("hispo"), keep=ANY_MATCH, bounds=CLIP, dual=None, aggregate=TokenMean()),
        {"rollout_logprob_T": COLUMNS["old_logprob_T"]},
    ),
}
"""Loss without its idea, and changes of the mini-batch."""

ON = {
    "clip_b": replace(loss("clip_b"), keep=(ClipB(mu=0.5),)),
    "clip_v": replace(loss("clip_v"), keep=(ClipV(mu=0.5),)),
}
"""Ideas that need a larger mini-batch with their own numbers."""


@pytest.mark.parametrize("name", OFF)
def test_a_loss_without_its_idea_is_its_parent_s(name: str) -> None:
    off, batch = OFF[name]
    registry = Registry()
    parent = parent_of(registry.find("method", name), registry)
    found, expected = fixture_loss(off, **batch), fixture_loss(loss(parent), **batch)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logprob_grad_T, expected.logprob_grad_T)
    assert found.logprob_grad_T.count_nonzero() > 0
    on = fixture_loss(ON.get(name, loss(name)))
    assert on.loss != fixture_loss(loss(parent)).loss


@pytest.mark.parametrize("name", ["cispo", "sapo", "dppo", "dppo_kl", "ctpo", "gmpo", "kl_cov"])
def test_on_policy_only_the_mean_over_tokens_is_left_of_a_ratio(name: str) -> None:
    """Off policy each of them has another gradient than PPO."""
    own = replace(loss(name), aggregate=TokenMean())
    expected = fixture_loss(loss("grpo"), **SAME).logprob_grad_T
    assert torch.equal(fixture_loss(own, **SAME).logprob_grad_T, expected)
    off_policy = fixture_loss(loss("grpo")).logprob_grad_T
    assert not torch.equal(fixture_loss(own).logprob_grad_T, off_policy)
