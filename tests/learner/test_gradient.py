"""The packed, micro-batched gradient against one forward per leaf and autograd of the formula."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learner_batch import (
    GROUP_N,
    PLAIN,
    RESPONSE_N,
    SKIPPED,
    assert_close,
    demo_model,
    gradient,
    moved,
    off_policy,
    on_policy,
    settings,
    taken_gradient,
)
from learner_reference import slow_gradient
from model_families import tiny
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pyrl.learner import Learner
from pyrl.loss import KL, Clip, ConfidenceClip, Loss
from pyrl.loss.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm, TokenSum
from pyrl.models import ModelError
from pyrl.pack import TokenBatch

torch.set_num_threads(1)

# -- the gradient --

LOSSES = {
    "plain": PLAIN,
    "no dual clip": replace(PLAIN, dual=None),
    "two radii": replace(PLAIN, bounds=Clip(0.1, 0.35)),
    "confidence clip": replace(PLAIN, bounds=ConfidenceClip(tail=3)),
    "k1": Loss(kl=KL(0.3, "k1")),
    "k2": Loss(kl=KL(0.3, "k2")),
    "k3": Loss(kl=KL(0.3, "k3")),
    "entropy": replace(PLAIN, entropy=0.1),
    "leaf means": replace(PLAIN, aggregate=SeqMeanTokenMean()),
    "leaf sums": replace(PLAIN, aggregate=SeqMeanTokenSum()),
    "constant length": replace(PLAIN, aggregate=SeqMeanTokenSumNorm(21)),
    "token sum": replace(PLAIN, aggregate=TokenSum()),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_the_gradient_is_that_of_one_forward_per_leaf(loss: Loss) -> None:
    model, batch = demo_model(), off_policy()
    initial = moved(model)
    value, expected = slow_gradient(model, initial, loss, batch)
    for tokens_per_pass in (1, 30, 10_000):
        run = settings(loss, tokens_per_pass=tokens_per_pass)
        learner = Learner(copy.deepcopy(model), copy.deepcopy(initial), run)
        tally = learner.gradient(batch)
        assert tally.loss == pytest.approx(value, rel=1e-9)
        assert_close(taken_gradient(learner.model), expected, 1e-9)


def test_the_batch_of_the_gradient_tests_meets_every_bound() -> None:
    batch = off_policy()
    tally = Learner(demo_model(), None, settings()).gradient(batch)
    metrics = tally.metrics()
    for name in ("low", "high", "dual"):
        assert 0 < metrics[f"clip_ratio/{name}_mean"] < 1
    assert (~batch.mask_T).sum() > 0
    assert (batch.advantage_T[batch.leaf_T == SKIPPED] == 0).all()


def test_the_gradient_in_float32_is_close_for_every_size_of_pass() -> None:
    batch, loss = off_policy(), Loss(kl=KL(0.3, "k3"), entropy=0.1)
    _, expected = slow_gradient(demo_model(), moved(demo_model()), loss, batch)
    for tokens_per_pass in (1, 30, 10_000):
        run = settings(loss, tokens_per_pass=tokens_per_pass)
        learner = Learner(demo_model(torch.float32), moved(demo_model()).float(), run)
        assert_close(gradient(learner, batch), expected, 1e-4)


def test_metrics_are_those_of_the_whole_mini_batch_however_it_is_cut() -> None:
    rows = []
    for tokens_per_pass in (1, 30, 10_000):
        run = settings(Loss(kl=KL(0.3)), tokens_per_pass=tokens_per_pass)
        model = demo_model()
        rows.append(Learner(model, moved(model), run).gradient(off_policy()).metrics())
    assert rows[0] == pytest.approx(rows[2], rel=1e-7)
    assert rows[1] == pytest.approx(rows[2], rel=1e-7)


# -- what takes part --


def seen_tokens(learner: Learner, batch: TokenBatch) -> list[int]:
    """All inputs that the model sees for a gradient."""
    seen: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.extend(kwargs["input_ids"][0].tolist())

    hook = learner.model.register_forward_pre_hook(note, with_kwargs=True)
    learner.gradient(batch)
    hook.remove()
    return seen


def inputs(batch: TokenBatch) -> list[int]:
    """What flat rows have to show the model: the last token of a row predicts nothing."""
    return sorted(np.delete(batch.input_I, batch.input_offset_N1[1:] - 1).tolist())


def test_a_leaf_without_an_advantage_is_not_computed() -> None:
    batch = off_policy()
    rest = batch.take(np.array([n for n in range(6) if n != SKIPPED]))
    learner = Learner(demo_model(), None, settings(pack="flat"))
    assert sorted(seen_tokens(learner, batch)) == inputs(rest)


@pytest.mark.parametrize("loss", [Loss(kl=KL(0.1)), replace(PLAIN, entropy=0.1)])
def test_with_a_regularizer_every_leaf_is_computed(loss: Loss) -> None:
    batch, model = off_policy(), demo_model()
    learner = Learner(model, copy.deepcopy(model), settings(loss, pack="flat"))
    assert sorted(seen_tokens(learner, batch)) == inputs(batch)


def test_the_smallest_advantage_beside_the_largest_takes_part() -> None:
    batch = on_policy(off_policy())
    batch = replace(batch, mask_T=np.ones_like(batch.mask_T))
    advantage_T = np.where(batch.leaf_T == 0, 1e12, np.where(batch.leaf_T == 5, 1e-12, 0.0))
    learner = Learner(demo_model(), None, settings(pack="flat"))
    seen = seen_tokens(learner, replace(batch, advantage_T=advantage_T))
    assert sorted(seen) == inputs(batch.take(np.array([0, 5])))


@pytest.mark.parametrize("leaf", [0, 5])
def test_an_advantage_that_is_not_a_number_is_refused(leaf: int) -> None:
    batch = off_policy()
    batch = replace(batch, mask_T=np.ones_like(batch.mask_T))
    bad_T = np.where(batch.leaf_T == leaf, np.nan, batch.advantage_T)
    with pytest.raises(ValueError, match="advantage"):
        Learner(demo_model(), None, settings()).gradient(replace(batch, advantage_T=bad_T))


def test_forced_tokens_carry_no_loss() -> None:
    batch = off_policy()
    changed = replace(
        batch,
        advantage_T=np.where(batch.mask_T, batch.advantage_T, 50.0),
        old_logprob_T=np.where(batch.mask_T, batch.old_logprob_T, -9).astype(np.float32),
    )
    loss = Loss(kl=KL(0.2), entropy=0.1)
    model = demo_model()
    first, second = (
        gradient(Learner(copy.deepcopy(model), moved(model), settings(loss)), b)
        for b in (batch, changed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("loss", [PLAIN, Loss(kl=KL(0.1))])
def test_a_leaf_of_forced_tokens_alone_takes_no_part(loss: Loss) -> None:
    batch, model = off_policy(), demo_model()
    forced = replace(batch, mask_T=batch.mask_T & (batch.leaf_T != 1))
    rest = forced.take(np.array([0, 2, 3, 4, 5]))
    first, second = (
        gradient(Learner(copy.deepcopy(model), moved(model), settings(loss, tokens_per_pass=1)), b)
        for b in (forced, rest)
    )
    assert_close(first, second, 1e-12)


def test_without_any_advantage_nothing_moves() -> None:
    model = demo_model(torch.float32)
    before = copy.deepcopy(model.state_dict())
    batch = replace(off_policy(), advantage_T=np.zeros(sum(RESPONSE_N)))
    learner = Learner(model, None, settings(weight_decay=0.1))
    metrics = learner.update(batch, GROUP_N, 0)
    assert metrics.pop("pack/unique") == 0.0
    assert {n: v for n, v in metrics.items() if not n.startswith("pack/")} == {
        "loss": 0.0,
        "grad_norm": 0.0,
        "learning_rate": 1e-4,
    }
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert learner.state() == ({}, {})


# -- precision and memory --


def test_bfloat16_computes_nearly_the_same_gradient_on_float32_weights() -> None:
    batch = off_policy()
    exact = gradient(Learner(demo_model(torch.float32), None, settings()), batch)
    learner = Learner(demo_model(torch.float32), None, settings(dtype="bfloat16"))
    rough = gradient(learner, batch)
    assert all(p.dtype == torch.float32 for p in learner.model.parameters())
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rough))
    assert not torch.equal(a, b)
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.99
    on = on_policy(batch, demo_model(torch.float32))
    metrics = learner.update(on, GROUP_N, 0)
    assert 0 < metrics["sampling/sampling_logp_difference/max"] < 1


def dropping(kind: str) -> PreTrainedModel:
    """A small model with dropout in its attention, or everywhere."""
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.5,
        )
        return LlamaForCausalLM(config).double()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ).double()


NOISY = ("opt", "biogpt", "gpt_bigcode", "starcoder2:dropout", "mixtral:jitter")
"""Families that add noise in training mode with no module of torch's."""


@pytest.mark.parametrize("kind", ["demo", "llama", "gpt2", *NOISY])
def test_gradient_checkpointing_gives_the_same_gradient_also_with_dropout(kind: str) -> None:
    tolerance = 1e-12
    if kind in NOISY:  # experts are multiplied in float32 at most
        model, tolerance = tiny(kind), 1e-4
    else:
        model = demo_model() if kind == "demo" else dropping(kind)
    batch = on_policy(off_policy(), copy.deepcopy(model))
    plain, saving = (
        Learner(copy.deepcopy(model), None, settings(gradient_checkpointing=on))
        for on in (False, True)
    )
    layer = next(m for m in saving.model.modules() if isinstance(m, GradientCheckpointingLayer))
    part = list(layer.children())[-1]
    calls: list[bool] = []
    part.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    assert_close(gradient(saving, batch), gradient(plain, batch), tolerance)
    assert calls == [False, False]  # once more in the backward pass, and never with dropout
    assert not saving.model.training


def test_a_model_without_layers_to_recompute_is_refused() -> None:
    with pytest.raises(ModelError, match="CTRLLMHeadModel has no layers that can be recomputed"):
        Learner(tiny("ctrl"), None, settings(gradient_checkpointing=True))
