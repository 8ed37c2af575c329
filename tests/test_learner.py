"""The packed, micro-batched update against one forward per leaf and autograd of the formula."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pyrl import demo
from pyrl.config import Run
from pyrl.demo.run import ttrl
from pyrl.learner import Learner, NonFiniteError, SamplerMismatchError, learning_rate
from pyrl.loss import KL, Clip, ConfidenceClip, Loss
from pyrl.pack import TokenBatch, offsets
from pyrl.policy_loss import (
    Aggregate,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)

torch.set_num_threads(1)

PROMPT_N = [5, 3, 8, 5, 4, 6]
RESPONSE_N = [7, 12, 4, 7, 1, 9]
GROUP_N = np.array([0, 0, 1, 2, 2, 2])
SKIPPED = 3
"""The leaf without an advantage."""
PLAIN = Loss(kl=KL(0.0))


def demo_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=dtype, attn_implementation="sdpa")


def settings(loss: Loss = PLAIN, **settings: Any) -> Run:
    values = {"learning_rate": 1e-4, "warmup_steps": 0, "schedule": "constant"}
    algorithm = replace(ttrl(), loss=loss)
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
        position_I=np.concatenate([np.arange(n) for n in length_N]),
        label_T=np.zeros(tokens, np.int64),
        old_logprob_T=np.zeros(tokens, np.float32),
        entropy_T=rng.random(tokens).astype(np.float32),
        confidence_T=rng.random(tokens).astype(np.float32),
        mask_T=rng.random(tokens) < 0.8,
        advantage_T=np.where(leaf_T == SKIPPED, 0.0, rng.normal(size=tokens)),
        input_offset_N1=offsets(length_N),
        token_offset_N1=token_offset_N1,
    )
    batch = replace(batch, label_T=input_I[batch.predictor_T + 1])
    noise_T = rng.choice([-1.5, -0.3, -0.1, 0.0, 0.1, 0.3], tokens).astype(np.float32)
    return replace(batch, old_logprob_T=on_policy(batch).old_logprob_T + noise_T)


def on_policy(batch: TokenBatch, model: PreTrainedModel | None = None) -> TokenBatch:
    """The batch as if this model (the demo) had sampled it."""
    learner = Learner(model or demo_model(), None, settings())
    with torch.no_grad():
        logprob_T = learner.stats(learner.model, batch).logprob.numpy()
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


# -- the slow reference --


@dataclass(frozen=True)
class Token:
    leaf: int
    sampled: bool
    logprob: Tensor
    entropy: Tensor
    reference: float


def slow_tokens(model: PreTrainedModel, initial: PreTrainedModel, batch: TokenBatch) -> list[Token]:
    """One forward for each leaf, by transformers' own attention."""
    tokens = []
    for leaf, (prompt, response) in enumerate(zip(PROMPT_N, RESPONSE_N, strict=True)):
        span = slice(*batch.input_offset_N1[leaf : leaf + 2])
        row = torch.from_numpy(batch.input_I[span])
        now = (model(input_ids=row[None], use_cache=False).logits[0] / 0.6).log_softmax(-1)
        with torch.no_grad():
            then = (initial(input_ids=row[None], use_cache=False).logits[0] / 0.6).log_softmax(-1)
        start = int(batch.token_offset_N1[leaf])
        for t in range(response):
            predictor, label = prompt + t - 1, row[prompt + t]
            tokens.append(
                Token(
                    leaf,
                    bool(batch.mask_T[start + t]),
                    now[predictor, label],
                    -(now[predictor].exp() * now[predictor]).sum(),
                    float(then[predictor, label]),
                )
            )
    return tokens


def slow_weights(aggregate: Aggregate, tokens: list[Token]) -> list[float]:
    leaves = {token.leaf for token in tokens if token.sampled}
    length = {n: sum(t.sampled for t in tokens if t.leaf == n) for n in leaves}
    match aggregate:
        case TokenMean():
            divisor = dict.fromkeys(leaves, float(sum(length.values())))
        case TokenSum():
            divisor = dict.fromkeys(leaves, 1.0)
        case SeqMeanTokenMean():
            divisor = {n: float(len(leaves) * length[n]) for n in leaves}
        case SeqMeanTokenSum():
            divisor = dict.fromkeys(leaves, float(len(leaves)))
        case SeqMeanTokenSumNorm(size):
            divisor = dict.fromkeys(leaves, len(leaves) * size)
        case _:
            raise AssertionError(aggregate)
    return [1 / divisor[t.leaf] if t.sampled else 0.0 for t in tokens]


def slow_loss(loss: Loss, tokens: list[Token], batch: TokenBatch) -> Tensor:
    """The formula, token by token."""
    low_T, high_T = (bound.tolist() for bound in loss.bounds(batch))
    total = torch.zeros((), dtype=tokens[0].logprob.dtype)
    for i, (token, weight) in enumerate(
        zip(tokens, slow_weights(loss.aggregate, tokens), strict=True)
    ):
        advantage = float(batch.advantage_T[i])
        ratio = torch.exp(token.logprob - float(batch.old_logprob_T[i]))
        clipped = ratio.clamp(1 - low_T[i], 1 + high_T[i])
        value = torch.maximum(-advantage * ratio, -advantage * clipped)
        if advantage < 0 and loss.dual is not None:
            value = value.clamp(max=-advantage * loss.dual)
        gap = token.logprob - token.reference
        kl = {"k1": gap, "k2": gap**2 / 2, "k3": torch.exp(-gap) + gap - 1}[loss.kl.estimator]
        total = total + weight * (value + loss.kl.coef * kl - loss.entropy * token.entropy)
    return total


def slow_gradient(
    model: PreTrainedModel, initial: PreTrainedModel, loss: Loss, batch: TokenBatch
) -> tuple[float, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    total = slow_loss(loss, slow_tokens(model, initial, batch), batch)
    total.backward()
    return float(total.detach()), taken_gradient(model)


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


def test_a_leaf_without_an_advantage_is_not_computed() -> None:
    batch = off_policy()
    rest = batch.take(np.array([n for n in range(6) if n != SKIPPED]))
    learner = Learner(demo_model(), None, settings())
    assert sorted(seen_tokens(learner, batch)) == sorted(rest.input_I.tolist())


@pytest.mark.parametrize("loss", [Loss(kl=KL(0.1)), replace(PLAIN, entropy=0.1)])
def test_with_a_regularizer_every_leaf_is_computed(loss: Loss) -> None:
    batch, model = off_policy(), demo_model()
    learner = Learner(model, copy.deepcopy(model), settings(loss))
    assert sorted(seen_tokens(learner, batch)) == sorted(batch.input_I.tolist())


def test_the_smallest_advantage_beside_the_largest_takes_part() -> None:
    batch = on_policy(off_policy())
    batch = replace(batch, mask_T=np.ones_like(batch.mask_T))
    advantage_T = np.where(batch.leaf_T == 0, 1e12, np.where(batch.leaf_T == 5, 1e-12, 0.0))
    learner = Learner(demo_model(), None, settings())
    seen = seen_tokens(learner, replace(batch, advantage_T=advantage_T))
    assert sorted(seen) == sorted(batch.take(np.array([0, 5])).input_I.tolist())


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
    assert metrics == {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 1e-4}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert learner.state() == ({}, {})


# -- regularizers --


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_is_zero_at_the_start_and_grows_as_the_model_moves(estimator: Any) -> None:
    model = demo_model(torch.float32)
    run = settings(Loss(kl=KL(0.1, estimator)), learning_rate=1e-3)
    learner = Learner(model, copy.deepcopy(model), run)
    assert learner.reference is not None
    frozen = copy.deepcopy(learner.reference.state_dict())
    batch = on_policy(off_policy(), copy.deepcopy(model))
    assert learner.update(batch, GROUP_N, 0)["kl"] == 0.0
    again = learner.gradient(batch).metrics()["kl"]
    assert again != 0.0
    assert estimator == "k1" or again > 0
    assert all(torch.equal(frozen[k], v) for k, v in learner.reference.state_dict().items())


def test_without_a_kl_term_there_is_no_reference_and_no_metric_of_it() -> None:
    model = demo_model(torch.float32)
    learner = Learner(model, moved(model), settings())
    assert learner.reference is None
    assert "kl" not in learner.update(on_policy(off_policy(), copy.deepcopy(model)), GROUP_N, 0)


def test_the_entropy_bonus_raises_the_entropy() -> None:
    model = demo_model(torch.float32)
    batch = on_policy(off_policy(), copy.deepcopy(model))
    batch = replace(batch, advantage_T=np.zeros(sum(RESPONSE_N)))
    learner = Learner(model, None, settings(replace(PLAIN, entropy=0.1), learning_rate=1e-3))
    entropies = []
    for step in range(2):
        with torch.no_grad():
            entropies.append(float(learner.stats(model, batch).entropy.mean()))
        if step == 0:
            learner.update(batch, GROUP_N, step)
    assert entropies[1] > entropies[0] + 0.01


# -- the update --


def test_mini_batches_split_the_questions_and_follow_each_other() -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    learner, slow = (
        Learner(demo_model(torch.float32), None, settings(learning_rate=1e-6, updates_per_step=n))
        for n in (2, 1)
    )
    metrics = learner.update(batch, GROUP_N, 0)
    parts = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    rows = [slow.update(batch.take(leaf_N), GROUP_N[leaf_N], 0) for leaf_N in parts]
    assert all(
        torch.equal(a, b)
        for a, b in zip(learner.model.parameters(), slow.model.parameters(), strict=True)
    )
    assert metrics["loss"] == pytest.approx((rows[0]["loss"] + rows[1]["loss"]) / 2)
    for which in ("mean", "max"):
        name = f"sampling/sampling_logp_difference/{which}"
        assert metrics[name] == rows[0][name]


@pytest.mark.parametrize("updates", [1, 2, 3, 10])
def test_no_mini_batch_splits_a_question(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    # The first token of each leaf tells which leaves a mini-batch holds.
    starts = batch.old_logprob_T[batch.token_offset_N1[:-1]].tolist()
    run = settings(learning_rate=1e-6, updates_per_step=updates)
    learner = Learner(demo_model(torch.float32), None, run)
    seen: list[list[int]] = []
    inner = learner.gradient

    def note(part: TokenBatch) -> Any:
        firsts = part.old_logprob_T[part.token_offset_N1[:-1]].tolist()
        seen.append(GROUP_N[[starts.index(x) for x in firsts]].tolist())
        return inner(part)

    monkeypatch.setattr(learner, "gradient", note)
    learner.update(batch, GROUP_N, 0)
    assert len(seen) == min(updates, 3)
    assert [group for part in seen for group in part] == GROUP_N.tolist()
    assert sum(len(set(part)) for part in seen) == 3


@pytest.mark.parametrize("largest", [1e-3, 1e6])
def test_the_gradient_is_clipped_by_its_norm(
    largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, model = on_policy(off_policy()), demo_model()
    expected = gradient(Learner(copy.deepcopy(model), None, settings()), batch)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected.values()))
    learner = Learner(model, None, settings(clip_grad_norm=largest))
    stepped: list[dict[str, Tensor]] = []
    monkeypatch.setattr(learner.optimizer, "step", lambda: stepped.append(taken_gradient(model)))
    assert learner.update(batch, GROUP_N, 0)["grad_norm"] == pytest.approx(norm, rel=1e-9)
    scale = min(1.0, largest / norm)
    assert_close(stepped[0], {name: scale * g for name, g in expected.items()}, 1e-5)


def test_the_update_is_adamw_s() -> None:
    model, batch = demo_model(), on_policy(off_policy())
    run = settings(learning_rate=3e-4, weight_decay=0.1, betas=(0.8, 0.9), clip_grad_norm=1e9)
    expected = copy.deepcopy(model)
    _, grads = slow_gradient(model, model, PLAIN, batch)
    optimizer = torch.optim.AdamW(
        expected.parameters(), lr=3e-4, betas=(0.8, 0.9), weight_decay=0.1
    )
    for name, parameter in expected.named_parameters():
        parameter.grad = grads[name]
    optimizer.step()
    Learner(model, None, run).update(batch, GROUP_N, 0)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        # Where a gradient is as small as Adam's epsilon, its rounding shows.
        assert float((a - b).detach().abs().max()) < 1e-8


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1.0, 1.0, 0.88284271, 0.6, 0.31715729]),
    ],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule: Any, rates: list[float]) -> None:
    run = settings(
        learning_rate=2e-3, warmup_steps=2, steps=6, schedule=schedule, min_learning_rate=0.2
    )
    assert [learning_rate(run, step) / 2e-3 for step in range(6)] == pytest.approx(rates)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_warm_up_alone_reaches_the_peak(schedule: Any) -> None:
    run = settings(learning_rate=1.0, warmup_steps=4, steps=4, schedule=schedule)
    assert [learning_rate(run, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_step_s_rate_is_the_one_that_the_optimizer_uses() -> None:
    model = demo_model(torch.float32)
    batch = on_policy(off_policy(), copy.deepcopy(model))
    run = settings(warmup_steps=10, learning_rate=1e-3, clip_grad_norm=1e9)
    learner = Learner(model, None, run)
    before = copy.deepcopy(model)
    assert learner.update(batch, GROUP_N, 2)["learning_rate"] == pytest.approx(3e-4)
    # AdamW's first step moves a weight by the rate.
    largest = max(
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )
    assert largest == pytest.approx(3e-4, rel=1e-3)


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


@pytest.mark.parametrize("kind", ["demo", "llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient_also_with_dropout(kind: str) -> None:
    model = demo_model() if kind == "demo" else dropping(kind)
    batch = on_policy(off_policy(), copy.deepcopy(model))
    plain, saving = (
        Learner(copy.deepcopy(model), None, settings(gradient_checkpointing=on))
        for on in (False, True)
    )
    mlp = next(m for name, m in saving.model.named_modules() if name.endswith(".mlp"))
    calls: list[bool] = []
    mlp.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    assert_close(gradient(saving, batch), gradient(plain, batch), 1e-12)
    assert calls == [True, True]  # once more in the backward pass
    assert not saving.model.training


# -- what stops a run --


def snapshot(learner: Learner) -> list[Tensor]:
    tensors, counts = learner.state()
    values = [*learner.model.state_dict().values(), *tensors.values()]
    return [v.clone() for v in values] + [torch.tensor(list(counts.values()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True)
    )


def test_a_weight_that_is_not_a_number_stops_the_update_and_changes_nothing() -> None:
    model = demo_model(torch.float32)
    batch = on_policy(off_policy(), copy.deepcopy(model))
    learner = Learner(model, None, settings())
    learner.update(batch, GROUP_N, 0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    before = snapshot(learner)
    with pytest.raises(NonFiniteError, match="got loss nan and gradient norm nan"):
        learner.update(batch, GROUP_N, 1)
    assert same(snapshot(learner), before)
    assert all(p.grad is None for p in model.parameters())


def test_stale_log_probs_stop_the_update_and_change_nothing() -> None:
    model = demo_model(torch.float32)
    batch = on_policy(off_policy(), copy.deepcopy(model))
    learner = Learner(model, None, settings())
    learner.update(batch, GROUP_N, 0)
    batch = on_policy(batch, copy.deepcopy(model))
    with torch.no_grad():  # as if one tensor of the sampler had not been brought up to date
        model.model.layers[1].mlp.up_proj.weight *= 1.2
    learned = on_policy(batch, copy.deepcopy(model)).old_logprob_T
    gap_T = np.abs(learned - batch.old_logprob_T) * batch.mask_T * (batch.leaf_T != SKIPPED)
    worst = int(gap_T.argmax())
    assert gap_T[worst] > 1e-2
    before = snapshot(learner)
    with pytest.raises(SamplerMismatchError) as caught:
        learner.update(batch, GROUP_N, 1)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert f"got {batch.old_logprob_T[worst]:.4f}"[:-1] in message
    assert f"and {learned[worst]:.4f}"[:-1] in message
    assert "at most 0.01" in message
    assert same(snapshot(learner), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-2), ("bfloat16", 1.0)])
def test_the_tolerance_of_the_mismatch_depends_on_the_precision(
    dtype: Any, tolerance: float
) -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    token = int(np.flatnonzero(batch.mask_T & (batch.leaf_T == 0))[0])
    shift_T = np.arange(len(batch.label_T)) == token
    for factor, fits in ((0.5, True), (2.0, False)):
        learner = Learner(demo_model(torch.float32), None, settings(dtype=dtype))
        old = batch.old_logprob_T - (factor * tolerance * shift_T).astype(np.float32)
        planted = replace(batch, old_logprob_T=old)
        if fits:
            learner.update(planted, GROUP_N, 0)
        else:
            with pytest.raises(SamplerMismatchError, match=f"at most {tolerance:g}"):
                learner.update(planted, GROUP_N, 0)


def test_forced_tokens_are_not_compared() -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    old = np.where(batch.mask_T, batch.old_logprob_T, -30).astype(np.float32)
    learner = Learner(demo_model(torch.float32), None, settings())
    metrics = learner.update(replace(batch, old_logprob_T=old), GROUP_N, 0)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_later_updates_of_a_step_may_be_off_policy() -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    run = settings(learning_rate=3e-3, updates_per_step=3, warmup_steps=0)
    metrics = Learner(demo_model(torch.float32), None, run).update(batch, GROUP_N, 0)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert abs(metrics["sampling/importance_sampling_ratio/max"] - 1) > 0.02


# -- its state --


def test_a_restored_state_gives_the_same_next_update_bit_for_bit() -> None:
    model = demo_model(torch.float32)
    batch = off_policy()
    learner = Learner(model, None, settings(weight_decay=0.01))
    for step in range(2):
        learner.update(on_policy(batch, copy.deepcopy(model)), GROUP_N, step)
    tensors, counts = learner.state()
    other = Learner(copy.deepcopy(model), None, settings(weight_decay=0.01))
    other.load_state(tensors, counts)
    fresh = Learner(copy.deepcopy(model), None, settings(weight_decay=0.01))
    third = on_policy(batch, copy.deepcopy(model))
    for one in (learner, other, fresh):
        one.update(third, GROUP_N, 2)
    assert same(snapshot(other), snapshot(learner))
    assert not same(snapshot(fresh), snapshot(learner))
    assert set(counts.values()) == {2.0}


def test_a_state_of_another_model_is_refused() -> None:
    model = demo_model(torch.float32)
    learner = Learner(model, None, settings())
    learner.update(on_policy(off_policy(), copy.deepcopy(model)), GROUP_N, 0)
    tensors, counts = learner.state()
    name = next(iter(counts))
    with pytest.raises(ValueError, match=r"expected parameters of the model, got \['nowhere'\]"):
        learner.load_state(tensors, counts | {"nowhere": 1.0})
    narrow = tensors | {f"{name}.exp_avg": tensors[f"{name}.exp_avg"][:-1]}
    with pytest.raises(ValueError, match=rf"{name}.exp_avg: expected shape \(31, 96\)"):
        learner.load_state(narrow, counts)
