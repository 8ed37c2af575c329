"""pyrl's losses in the place of OpenRLHF's, against OpenRLHF's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from openrlhf_host import door, losses, ppo_actor
from torch import Tensor

from pyrl import presets
from pyrl.loss import Clip, Loss

ROWS, LENGTH = 5, 8
RANDOM = torch.Generator().manual_seed(0)
LOGPROB = -2 * torch.rand(ROWS, LENGTH, generator=RANDOM)
OLD = LOGPROB + 0.3 * torch.randn(ROWS, LENGTH, generator=RANDOM)
ROLLOUT = OLD + 0.2 * torch.randn(ROWS, LENGTH, generator=RANDOM)
ADVANTAGE = torch.randn(ROWS, LENGTH, generator=RANDOM)
MASK = torch.arange(LENGTH) < torch.tensor([8, 3, 1, 6, 0])[:, None]
BATCH = {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 11.0}


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    """OpenRLHF's loss is put back."""
    forward = losses.PolicyLoss.forward
    yield
    losses.PolicyLoss.forward = forward


def run(
    advantage: Tensor = ADVANTAGE, rollout: Tensor = ROLLOUT, **options: Any
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Loss, gradient and numbers of OpenRLHF's loss as it is now."""
    logprob = LOGPROB.clone().requires_grad_()
    policy = ppo_actor.PolicyLoss(**options)
    value, *numbers = policy(logprob, OLD, advantage, MASK, rollout, **BATCH)
    value.backward()
    assert logprob.grad is not None
    return value.detach(), logprob.grad, tuple(numbers)


@pytest.mark.parametrize(
    ("loss", "options", "host"),
    [
        (presets.ppo(), {}, {}),
        (presets.ppo(), {"token_level_loss": False}, {}),
        (presets.dual(), {}, {"dual_clip": 3.0}),
        (replace(presets.dapo(), bounds=Clip(0.2, 0.28)), {}, {"clip_eps_high": 0.28}),
        (
            presets.gspo(),
            {"token_level_loss": False},
            {"policy_loss_type": "gspo", "clip_eps_low": 3e-4, "clip_eps_high": 4e-4},
        ),
    ],
)
def test_losses_and_gradients_are_those_of_openrlhf(
    loss: Loss, options: dict[str, Any], host: dict[str, Any]
) -> None:
    # The gradient of a response's ratio is the same only where its tokens have one advantage.
    advantage = ADVANTAGE[:, :1].expand_as(ADVANTAGE) if "policy_loss_type" in host else ADVANTAGE
    expected, gradient, told = run(advantage, **options | host)
    door.install(loss)
    value, ours, numbers = run(advantage, **options)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-6)
    assert len(numbers) == len(told)


def test_importance_weights_of_pyrl_are_those_of_openrlhf() -> None:
    names = losses.PolicyLoss.__init__.__code__.co_varnames
    if "is_correction_level" in names:
        weights = {"is_correction_level": "token", "is_correction_threshold": (0.5, 5.0)}
    else:
        weights = {
            "enable_vllm_is_correction": True,
            "vllm_is_truncated_threshold": [0.5, 5.0],
            "vllm_is_correction_type": "icepop",
        }
    expected, gradient, _ = run(**weights)
    door.install(presets.icepop())
    value, ours, _ = run()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-6)
    (option, given), *_ = weights.items()
    with pytest.raises(ValueError, match=rf"^--algo.advantage.{option}: expected .* got {given}"):
        run(**weights)


def test_every_preset_computes_or_names_what_openrlhf_lacks() -> None:
    carried, refused = [], {}
    for name, preset in presets.PRESETS.items():
        try:
            door.install(preset())
        except ValueError as error:
            refused[name] = str(error)
            continue
        value, gradient, _ = run(
            rollout=OLD, token_level_loss=door.mode_of(preset()) == "token-mean"
        )
        assert torch.isfinite(value)
        assert gradient[MASK].any()
        assert not gradient[~MASK].any()
        carried.append(name)
    assert {"tis", "mis", "icepop", "ctpo", "ftis", "gspo", "cispo"} <= {*carried}
    assert {"steer", "dr_grpo", "minirl", "hispo", "epo"} <= {*refused}
    starts = ("loss: it needs ", "loss.aggregate: expected TokenMean")
    assert [reason for reason in refused.values() if not reason.startswith(starts)] == []


def test_options_that_contradict_a_loss_are_refused_by_name() -> None:
    door.install(presets.gspo())
    with pytest.raises(ValueError, match=r"^--actor.loss_agg_mode: expected the mean of responses"):
        run()
    door.install(presets.ppo())
    with pytest.raises(ValueError, match=r"^clip_eps_high: expected OpenRLHF's default 0.2"):
        run(clip_eps_high=0.3)
    door.install(presets.tis())
    policy = ppo_actor.PolicyLoss()
    with pytest.raises(ValueError, match=r"^--rollout.temperature: expected 1"):
        policy(LOGPROB, OLD, ADVANTAGE, MASK, None)
