"""Normalised momentum against plain NumPy, the golden step, and runs that use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, trained, weights

from pyrl.demo.run import ttrl
from pyrl.learner.momentum import Corrected, LookAhead, Normalized
from pyrl.learner.optimizer import NORMALIZED
from pyrl.reward import RandomReward
from pyrl.run.directory import claim

RATE, DECAY = 0.1, 0.7


def curvatures(seed: int) -> list[np.ndarray]:
    """Of a quadratic for each batch, over five weights."""
    rng = np.random.default_rng(seed)
    return [a @ a.T + np.eye(5) for a in rng.normal(size=(6, 5, 5))]


def walked(
    make: Callable[..., Normalized], seed: int, decay: float = DECAY
) -> tuple[np.ndarray, Normalized]:
    """Where weights in two tensors end, from 1, over batches of these curvatures."""
    first, second = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (2, 3))
    optimizer = make([first, second], lr=RATE, decay=decay)
    for curvature in map(torch.from_numpy, curvatures(seed)):

        def gradient(curvature: torch.Tensor = curvature) -> None:
            optimizer.zero_grad()
            weight = torch.cat([first, second])
            torch.autograd.backward(weight @ curvature @ weight / 2)

        gradient()
        optimizer.step(gradient if isinstance(optimizer, Corrected) else None)
    return torch.cat([first, second]).detach().numpy(), optimizer


def unit(vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector / np.linalg.norm(vector))


@pytest.mark.parametrize("seed", range(3))
def test_look_ahead_steps_are_those_of_the_iterates(seed: int) -> None:
    eta = 1 - DECAY
    before = x = np.ones(5)
    momentum = None
    for curvature in curvatures(seed):
        gradient = curvature @ (x + (1 - eta) / eta * (x - before))
        momentum = gradient if momentum is None else (1 - eta) * momentum + eta * gradient
        before, x = x, x - RATE * unit(momentum)
    ended, optimizer = walked(LookAhead, seed)
    np.testing.assert_allclose(ended, x + (1 - eta) / eta * (x - before), rtol=1e-12)
    ahead = np.linalg.norm(ended - x)
    assert optimizer.told["optimizer/ahead"] == pytest.approx(ahead)
    assert ahead == pytest.approx(DECAY / (1 - DECAY) * RATE)


@pytest.mark.parametrize("seed", range(3))
def test_the_correction_is_the_hessian_times_the_last_step(seed: int) -> None:
    eta = 1 - DECAY
    before = x = np.ones(5)
    momentum, correction = None, 0.0
    for curvature in curvatures(seed):
        gradient = curvature @ x
        if momentum is None:
            momentum = gradient
        else:
            product = curvature @ (x - before)
            correction = float(np.linalg.norm(product))
            momentum = (1 - eta) * (momentum + product) + eta * gradient
        before, x = x, x - RATE * unit(momentum)
    ended, optimizer = walked(Corrected, seed)
    np.testing.assert_allclose(ended, x, rtol=1e-9)
    assert optimizer.told["optimizer/correction"] == pytest.approx(correction)
    assert optimizer.told["optimizer/momentum_norm"] == pytest.approx(np.linalg.norm(momentum))


def test_the_golden_step_of_n_pg_igt() -> None:
    """From the iterate (.1, -.2) with d = (.3, .4) and g = (.6, 0), uphill, at eta = .5."""
    before = torch.tensor([0.1, -0.2], dtype=torch.float64)
    weight = before.clone().requires_grad_()
    optimizer = LookAhead([weight], lr=0.1, decay=0.5)
    optimizer.state[weight] = {
        "step": torch.tensor(1.0),
        "momentum": -torch.tensor([0.3, 0.4], dtype=torch.float64),
        "scale": torch.tensor(0.0, dtype=torch.float64),  # the weight is the iterate
    }
    weight.grad = -torch.tensor([0.6, 0.0], dtype=torch.float64)
    optimizer.step()
    iterate = (weight.detach() + before) / 2
    np.testing.assert_allclose(iterate, [0.191381, -0.159386], atol=1e-6)
    momentum = optimizer.state[weight]["momentum"]
    np.testing.assert_allclose(momentum, [-0.45, -0.2], rtol=1e-12)


def test_without_momentum_both_are_normalised_descent() -> None:
    """Their ideas are off at a decay of 0."""
    (ahead, _), (corrected, _) = (walked(make, 0, decay=0.0) for make in (LookAhead, Corrected))
    x = np.ones(5)
    for curvature in curvatures(0):
        x = x - RATE * unit(curvature @ x)
    assert ahead.tolist() == corrected.tolist()
    np.testing.assert_allclose(ahead, x, rtol=1e-12)


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_run_moves_by_its_rate_and_resumes_bit_for_bit(name: Any, tmp_path: Path) -> None:
    how = {"optimizer": name, "learning_rate": 1e-3, "betas": (0.5, 0.95), "resume": True}
    run = tiny_run(tmp_path, replace(tiny(ttrl()), reward=RandomReward()), **how)
    claim(run)
    trainer, rows = trained(run, 2)
    assert [row["optimizer/momentum_norm"] > 0 for row in rows] == [True, True]
    acts = {"n_pg_igt": "optimizer/ahead", "n_harpg": "optimizer/correction"}[name]
    assert rows[1][acts] > 0
    trainer.save()
    trainer.lock.release()
    again, before = make_trainer(run), weights(trainer)
    last = [stepped(one) for one in (trainer, again)]
    assert last[0]["loss"] == last[1]["loss"]
    assert same_bits(weights(trainer), weights(again))
    square = sum(float((w - before[n]).square().sum()) for n, w in weights(trainer).items())
    assert square**0.5 == pytest.approx(1e-3, rel=0.01) or name == "n_pg_igt"


def test_what_the_optimizer_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight_decay: expected 0 with --optimizer n_harpg"):
        tiny_run(tmp_path, optimizer="n_harpg", weight_decay=0.1)
    with pytest.raises(ValueError, match="weights: expected float32 with --optimizer n_pg_igt"):
        make_trainer(tiny_run(tmp_path, optimizer="n_pg_igt", weights="bfloat16"))
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="expected a closure"):
        Corrected([weight], lr=0.1, decay=0.5).step()
