"""A small batch, learners of it on the demo model, and their gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_families import exact_norms
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pyrl import demo
from pyrl.demo.run import ttrl
from pyrl.learner import Learner
from pyrl.loss import KL, Loss
from pyrl.pack import TokenBatch, offsets
from pyrl.run.config import Run

PROMPT_N = [5, 3, 8, 5, 4, 6]
RESPONSE_N = [7, 12, 4, 7, 1, 9]
GROUP_N = np.array([0, 0, 1, 2, 2, 2])
SKIPPED = 3
"""The leaf without an advantage."""
PLAIN = Loss(kl=KL(0.0))


def demo_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        demo.MODEL, dtype=dtype, attn_implementation="sdpa"
    )
    return exact_norms(model) if dtype == torch.float64 else model


def settings(loss: Loss = PLAIN, *, updates: int = 1, **settings: Any) -> Run:
    values = {"learning_rate": 1e-4, "warmup_steps": 0, "schedule": "constant"}
    algorithm = replace(ttrl(), loss=loss, updates_per_step=updates)
    return Run("demo", "demo:train", "ttrl", algorithm, Path("runs"), **values | settings)


def moved(model: PreTrainedModel, seed: int = 5) -> PreTrainedModel:
    """A copy some way off."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
    return other


def off_policy(seed: int = 0) -> TokenBatch:
    """Ratios on both sides of all bounds, forced tokens, and a leaf without an advantage."""
    rng = np.random.default_rng(seed)
    length_N = np.add(PROMPT_N, RESPONSE_N)
    input_I = rng.integers(2, 31, int(length_N.sum()))
    token_offset_N1 = offsets(np.array(RESPONSE_N))
    tokens = sum(RESPONSE_N)
    leaf_T = np.repeat(np.arange(6), RESPONSE_N)
    batch = TokenBatch(
        input_I=input_I,
        label_T=np.zeros(tokens, np.int64),
        old_logprob_T=np.zeros(tokens, np.float32),
        entropy_T=rng.random(tokens).astype(np.float32),
        confidence_T=rng.random(tokens).astype(np.float32),
        mask_T=rng.random(tokens) < 0.8,
        advantage_T=np.where(leaf_T == SKIPPED, 0.0, rng.normal(size=tokens)),
        input_offset_N1=offsets(length_N),
        token_offset_N1=token_offset_N1,
    )
    answers = zip(batch.input_offset_N1[1:], RESPONSE_N, strict=True)
    label_T = np.concatenate([input_I[end - response : end] for end, response in answers])
    batch = replace(batch, label_T=label_T)
    noise_T = rng.choice([-1.5, -0.3, -0.1, 0.0, 0.1, 0.3], tokens).astype(np.float32)
    return replace(batch, old_logprob_T=on_policy(batch).old_logprob_T + noise_T)


def on_policy(batch: TokenBatch, model: PreTrainedModel | None = None) -> TokenBatch:
    """The batch as if this model (the demo) had sampled it."""
    learner = Learner(model or demo_model(), None, settings())
    with torch.no_grad():
        logprob_T = learner.reader(learner.model, batch).logprob.numpy()
    return replace(batch, old_logprob_T=logprob_T.astype(np.float32))


def gradient(learner: Learner, batch: TokenBatch) -> dict[str, Tensor]:
    learner.gradient(batch)
    return taken_gradient(learner.model)


def taken_gradient(model: PreTrainedModel) -> dict[str, Tensor]:
    """Zeros where no gradient arrived."""
    named = model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], relative: float) -> None:
    """Relative to the largest gradient of all parameters."""
    largest = max(float(x.abs().max()) for x in b.values())
    assert largest > 0
    for name in b:
        assert float((a[name] - b[name]).abs().max()) <= relative * largest, name
