"""AdamW with bfloat16 weights: right in the mean, the same each time, half the bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, trained, weights
from torch import Tensor

from pyrl.demo.run import ttrl
from pyrl.learner import adamw
from pyrl.learner.adamw import RoundingAdamW
from pyrl.run.config import Run

SETTINGS = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}


def walked(parameter: Tensor, gradients: list[Tensor], seed: int = 0) -> RoundingAdamW:
    optimizer = RoundingAdamW([parameter], **SETTINGS, seed=seed)
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer


def test_updates_below_the_spacing_of_bfloat16_are_right_in_the_mean() -> None:
    """Against torch's AdamW in float64: to the nearest, no weight would move at all."""
    start = torch.full((200_000,), 1.0)
    gradients = [torch.full_like(start, g) for g in (0.5, -0.1, 0.3, 0.2)]
    exact = start[:1].double().requires_grad_()
    reference = torch.optim.AdamW([exact], **SETTINGS)
    for gradient in gradients:
        exact.grad = gradient[:1].to(torch.bfloat16).double()
        reference.step()
    moved = start.to(torch.bfloat16)
    optimizer = walked(moved, gradients)
    change, expected = moved.double().mean() - 1, float(exact.detach()) - 1
    assert abs(expected) < 4e-5 < 0.5 * torch.finfo(torch.bfloat16).eps / 2
    assert 0.98 < (moved == 1).double().mean() < 1
    # The spacing below 1 is 2^-8: the mean of so many draws has this error.
    error = np.sqrt(abs(expected) * 2**-8 / len(start))
    assert abs(change - expected) < 5 * error
    for name, ours in optimizer.state[moved].items():
        theirs = reference.state[exact][name].double().mean()
        torch.testing.assert_close(ours.double().mean(), theirs, rtol=1e-3, atol=0)


def test_a_chunk_at_a_time_is_the_same_in_every_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of many steps stay within rounding of those in float64."""
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(999, generator=generator) for _ in range(40)]
    exact = torch.zeros(999, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.AdamW([exact], **SETTINGS | {"lr": 1e-2})
    for gradient in gradients:
        exact.grad = gradient.to(torch.bfloat16).double()
        reference.step()
    for chunk in (1 << 20, 100):
        monkeypatch.setattr(adamw, "CHUNK", chunk)
        moved = torch.zeros(999, dtype=torch.bfloat16)
        optimizer = RoundingAdamW([moved], **SETTINGS | {"lr": 1e-2}, seed=0)
        for gradient in gradients:
            moved.grad = gradient.to(torch.bfloat16)
            optimizer.step()
        torch.testing.assert_close(moved.double(), exact.detach(), rtol=0.05, atol=5e-3)
        square = optimizer.state[moved]["exp_avg_sq"].double()
        torch.testing.assert_close(square, reference.state[exact]["exp_avg_sq"], rtol=0.1, atol=0)


def test_draws_are_those_of_the_seed_the_step_and_the_place() -> None:
    gradients = [torch.full((999,), 1.0)] * 2
    ends = [torch.ones(999, dtype=torch.bfloat16) for _ in range(3)]
    state = torch.get_rng_state()
    for end, seed in zip(ends, (1, 1, 2), strict=True):
        walked(end, gradients, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    two = [torch.ones(999, dtype=torch.bfloat16) for _ in range(2)]
    optimizer = RoundingAdamW(two, **SETTINGS, seed=1)
    for parameter in two:
        parameter.grad = gradients[0].to(torch.bfloat16)
    optimizer.step()
    assert not torch.equal(*two)


def test_an_infinite_weight_stays_one_and_does_not_become_another_number() -> None:
    moved = torch.tensor([float("inf"), float("nan"), 1.0], dtype=torch.bfloat16)
    walked(moved, [torch.ones(3)])
    assert moved.isinf()[0]
    assert moved.isnan()[1]


def bf16_run(folder: Path, **settings: object) -> Run:
    return tiny_run(folder, tiny(ttrl(), updates=2), weights="bfloat16", **settings)


def test_a_run_in_bfloat16_trains_within_the_guard_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Sampler and learner round differently: the learner's own log-probs are the old policy's."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, rows = trained(bf16_run(tmp_path / "whole"), 3)
    assert {p.dtype for p in whole.model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in whole.learner.state()[0].values()} == {torch.bfloat16}
    assert whole.learner.looks
    assert all(row["grad_norm"] > 0 for row in rows)
    run = bf16_run(tmp_path / "cut", steps=3, save_every=1)
    trainer = make_trainer(run)
    trainer.train()
    trainer.close()
    assert same_bits(weights(trainer), weights(whole))
    (run.output / "checkpoint-3").rename(tmp_path / "later")
    again = make_trainer(bf16_run(tmp_path / "cut", steps=3, save_every=1, resume=True))
    stepped(again)
    assert same_bits(weights(again), weights(whole))
    assert same_bits(again.learner.state()[0], whole.learner.state()[0])
    again.close()
