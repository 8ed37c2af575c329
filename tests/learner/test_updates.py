"""Updates: regularizers, mini-batches, AdamW and its rates, what stops a run, and saved state."""

from __future__ import annotations

import copy
import math
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
from torch import Tensor

from pyrl.engine import Dtype
from pyrl.learner import Learner
from pyrl.learner.guard import NonFiniteError, SamplerMismatchError
from pyrl.learner.schedule import learning_rate
from pyrl.loss import KL, Loss, LossState
from pyrl.pack import TokenBatch

torch.set_num_threads(1)

# -- regularizers --


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_is_zero_at_the_start_and_grows_as_the_model_moves(estimator: Any) -> None:
    model = demo_model(torch.float32)
    run = settings(Loss(kl=KL(0.1, estimator)), learning_rate=1e-3)
    first = copy.deepcopy(model)
    learner = Learner(model, first, run)
    frozen = copy.deepcopy(first.state_dict())
    batch = on_policy(off_policy(), copy.deepcopy(model))
    assert learner.update(batch, GROUP_N, 0)["kl"] == 0.0
    again = learner.gradient(batch).metrics()["kl"]
    assert again != 0.0
    assert estimator == "k1" or again > 0
    assert all(torch.equal(frozen[k], v) for k, v in first.state_dict().items())


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
            entropies.append(float(learner.reader(model, batch).entropy.mean()))
        if step == 0:
            learner.update(batch, GROUP_N, step)
    assert entropies[1] > entropies[0] + 0.01


# -- the update --


def test_mini_batches_split_the_questions_and_follow_each_other() -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    learner, slow = (
        Learner(demo_model(torch.float32), None, settings(learning_rate=1e-6, updates=n))
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
    run = settings(learning_rate=1e-6, updates=updates)
    learner = Learner(demo_model(torch.float32), None, run)
    seen: list[list[int]] = []
    inner = learner.gradient

    def note(part: TokenBatch, state: LossState, *, exact: bool) -> Any:
        firsts = part.old_logprob_T[part.token_offset_N1[:-1]].tolist()
        seen.append(GROUP_N[[starts.index(x) for x in firsts]].tolist())
        return inner(part, state, exact=exact)

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


@pytest.mark.parametrize(
    ("learns", "samples", "tolerance"),
    [
        ("float32", "float32", 1e-2),
        ("bfloat16", "float32", 0.8),
        ("float32", "float64", 1e-2),
        ("float32", "bfloat16", 0.8),
        ("float32", "float16", 0.2),
        ("bfloat16", "float16", 0.8),
    ],
)
def test_the_tolerance_of_the_mismatch_depends_on_the_precision(
    learns: Dtype, samples: Dtype, tolerance: float
) -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    token = int(np.flatnonzero(batch.mask_T & (batch.leaf_T == 0))[0])
    shift_T = np.arange(len(batch.label_T)) == token
    for factor, fits in ((0.5, True), (2.0, False)):
        learner = Learner(demo_model(torch.float32), None, settings(dtype=learns))
        learner.sampler_dtype = samples
        old = batch.old_logprob_T - (factor * tolerance * shift_T).astype(np.float32)
        planted = replace(batch, old_logprob_T=old)
        if fits:
            learner.update(planted, GROUP_N, 0)
        else:
            with pytest.raises(SamplerMismatchError, match=f"at most {tolerance:g}"):
                learner.update(planted, GROUP_N, 0)


@pytest.mark.parametrize(
    ("dtype", "gap", "fits"),
    [("bfloat16", 0.05, True), ("bfloat16", 0.3, False), ("float32", 0.005, False)],
)
def test_a_difference_of_every_token_is_noticed_where_one_of_a_token_is_rounding(
    dtype: Dtype, gap: float, fits: bool
) -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    noise_T = gap * np.where(np.arange(len(batch.label_T)) % 2, -1, 1)
    noisy = replace(batch, old_logprob_T=batch.old_logprob_T + noise_T.astype(np.float32))
    learner = Learner(demo_model(torch.float32), None, settings(dtype=dtype))
    if fits:
        learner.update(noisy, GROUP_N, 0)
    else:
        with pytest.raises(SamplerMismatchError, match="in the mean of"):
            learner.update(noisy, GROUP_N, 0)


def test_a_mini_batch_without_a_gradient_is_no_update() -> None:
    """The second one is compared with the sampler then, since nothing has moved the weights."""
    batch = on_policy(off_policy(), demo_model(torch.float32))
    shifted = replace(
        batch,
        old_logprob_T=batch.old_logprob_T - np.float32(3),
        advantage_T=np.where(GROUP_N[batch.leaf_T] < 2, 0, batch.advantage_T).astype(np.float32),
    )
    learner = Learner(demo_model(torch.float32), None, settings(updates=2))
    with pytest.raises(SamplerMismatchError, match=r"at most 0\.01"):
        learner.update(shifted, GROUP_N, 0)
    honest = replace(shifted, old_logprob_T=batch.old_logprob_T)
    learner = Learner(demo_model(torch.float32), None, settings(updates=2))
    assert learner.update(honest, GROUP_N, 0)["sampling/sampling_logp_difference/max"] < 1e-2


def test_forced_tokens_are_not_compared() -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    old = np.where(batch.mask_T, batch.old_logprob_T, -30).astype(np.float32)
    learner = Learner(demo_model(torch.float32), None, settings())
    metrics = learner.update(replace(batch, old_logprob_T=old), GROUP_N, 0)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_later_updates_of_a_step_may_be_off_policy() -> None:
    batch = on_policy(off_policy(), demo_model(torch.float32))
    run = settings(learning_rate=3e-3, updates=3, warmup_steps=0)
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
