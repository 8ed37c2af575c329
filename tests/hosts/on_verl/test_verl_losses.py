"""pyrl's losses under verl's signature against verl's own functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_host import actor, core_algos, door

from pyrl import loss as axes
from pyrl import presets
from pyrl.loss import Loss

ROWS, LENGTH = 6, 9
RANDOM = torch.Generator().manual_seed(0)
LOGPROB = -2 * torch.rand(ROWS, LENGTH, generator=RANDOM)
OLD = LOGPROB + 0.3 * torch.randn(ROWS, LENGTH, generator=RANDOM)
OF_TOKENS = torch.randn(ROWS, LENGTH, generator=RANDOM)
OF_ROWS = torch.randn(ROWS, 1, generator=RANDOM).expand(ROWS, LENGTH)
MASK = torch.arange(LENGTH) < torch.tensor([9, 4, 1, 7, 0, 5])[:, None]
WEIGHTS = torch.rand(ROWS, LENGTH, generator=RANDOM)
BATCH = {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 13, "loss_scale_factor": 5}
"""Of a mini-batch of which these rows are a part."""

COVARIANCE = axes.ClipCov(0.2, 5.0, share=1.0)
"""All that it may drop: which of them a draw would drop differs."""
SAME: dict[str, tuple[Loss, str, dict[str, Any]]] = {
    "vanilla": (presets.dual(), "token-mean", {}),
    "gspo": (
        presets.gspo(),
        "seq-mean-token-mean",
        {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    ),
    "clip_cov": (
        replace(presets.clip_cov(), keep=(COVARIANCE,)),
        "token-mean",
        {"clip_ratio_low": 1.0, "clip_ratio_high": 1.0, "clip_cov_lb": 0.2, "clip_cov_ratio": 1.0},
    ),
    "kl_cov": (
        presets.kl_cov(),
        "token-mean",
        {"kl_cov_ratio": 2e-3, "ppo_kl_coef": 1.0},
    ),
    "dppo_tv": (presets.dppo(), "token-mean", {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15}),
    "dppo_kl": (presets.dppo_kl(), "token-mean", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05}),
    "sapo": (presets.sapo(), "seq-mean-token-mean", {}),
    "gpg": (presets.reinforce(), "token-mean", {}),
    "cispo": (presets.cispo(), "token-mean", {"clip_ratio_low": 10.0}),
    "dro": (presets.dro(), "token-mean", {"dro_beta": 0.1}),
}
"""verl's losses that pyrl has too, with the numbers that make them the same."""


def both(
    name: str,
    loss: Loss,
    mode: str,
    options: dict[str, Any],
    advantage: Tensor,
    batch: dict[str, Any],
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, float], dict[str, float]]:
    """Loss and gradient of verl's function and of pyrl's, and the metrics of both."""
    own, ours = LOGPROB.clone().requires_grad_(), LOGPROB.clone().requires_grad_()
    clip = {"clip_ratio_c": 20.0} if name.startswith("dppo") else {}
    config = actor(mode, batch=batch, **clip, **options)
    function = core_algos.get_policy_loss_fn(name)
    expected, told = function(OLD, own, advantage, MASK, mode, config, weights)
    expected.backward()
    config = actor(mode, batch=batch)
    value, metrics = door.policy_loss(
        "pyrl/mine", loss, OLD, ours, advantage, MASK, mode, config, weights
    )
    value.backward()
    assert own.grad is not None
    assert ours.grad is not None
    return expected, value, own.grad, ours.grad, told, metrics


@pytest.mark.parametrize("advantage", [OF_TOKENS, OF_ROWS], ids=["of tokens", "of rows"])
@pytest.mark.parametrize("name", SAME)
def test_losses_and_gradients_are_those_of_verl(name: str, advantage: Tensor) -> None:
    loss, mode, options = SAME[name]
    expected, value, own, ours, told, metrics = both(name, loss, mode, options, advantage, BATCH)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)
    if "actor/pg_clipfrac" in told and name == "vanilla":
        assert metrics == pytest.approx(told, abs=1e-6)


def test_geo_mean_is_that_of_verl_where_a_response_has_one_advantage() -> None:
    """verl takes the mean of a response's advantages, and of rows whatever the batch is."""
    whole = {"dp_size": 1, "global_batch_size": ROWS}
    numbers = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    arguments = ("geo_mean", presets.gmpo(), "seq-mean-token-mean", numbers, OF_ROWS, whole)
    expected, value, own, ours, *_ = both(*arguments)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", [{}, BATCH], ids=["alone", "a part"])
@pytest.mark.parametrize("mode", door.MODES.values())
def test_aggregation_is_that_of_verl(mode: str, batch: dict[str, Any]) -> None:
    arguments = ("vanilla", presets.dual(), mode, {}, OF_TOKENS, batch)
    expected, value, own, ours, *_ = both(*arguments)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo", "gpg"])
def test_importance_weights_of_verl_multiply_the_loss(name: str) -> None:
    loss, mode, options = SAME[name]
    expected, value, own, ours, *_ = both(name, loss, mode, options, OF_TOKENS, BATCH, WEIGHTS)
    plain = both(name, loss, mode, options, OF_TOKENS, BATCH)[1]
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)
    assert (value - plain).abs() > 1e-3


def test_every_preset_is_registered_and_computes_or_names_what_it_lacks() -> None:
    carried = []
    for name, preset in presets.PRESETS.items():
        function = core_algos.get_policy_loss_fn(f"pyrl/{name}")
        mode = door.mode_of(preset())
        logprob = LOGPROB.clone().requires_grad_()
        arguments: tuple[Any, ...] = (OLD, logprob, OF_TOKENS, MASK, mode, actor(mode))
        if reason := door.refusal(preset()):
            with pytest.raises(ValueError, match=rf"^policy_loss.loss_mode: pyrl/{name}: it needs"):
                function(*arguments)
            assert "needs" in reason
            continue
        value, metrics = function(*arguments)
        value.backward()
        assert logprob.grad is not None
        assert logprob.grad[MASK].abs().sum() > 0
        assert not logprob.grad[~MASK].any()
        assert "actor/ppo_kl" in metrics
        carried.append(name)
    assert len(carried) == 18
    assert {"dapo", "gspo", "cispo", "ce_gppo", "minpro"} <= {*carried}


def test_rows_without_a_token_tell_no_metrics() -> None:
    function = core_algos.get_policy_loss_fn("pyrl/ppo")
    value, metrics = function(OLD, LOGPROB, OF_TOKENS, MASK & False, "token-sum", actor())
    assert (value.item(), metrics) == (0.0, {})


def test_options_that_contradict_a_loss_are_refused_by_name() -> None:
    def run(name: str, mode: str = "token-mean", **options: Any) -> None:
        function = core_algos.get_policy_loss_fn(name)
        function(OLD, LOGPROB, OF_TOKENS, MASK, mode, actor(mode, **options))

    with pytest.raises(ValueError, match=r"^actor.loss_agg_mode: expected seq-mean-token-mean.*"):
        run("pyrl/gspo")
    with pytest.raises(
        ValueError, match=r"^actor.clip_ratio_high: expected verl's default 0.2.*0.3"
    ):
        run("pyrl/ppo", clip_ratio_high=0.3)
    with pytest.raises(ValueError, match=r"^actor.policy_loss.ppo_kl_coef: expected .* got 0.5"):
        run("pyrl/kl_cov", ppo_kl_coef=0.5)
    with pytest.raises(
        ValueError, match=r"tis: it needs .*engine that sampled.*rollout_correction"
    ):
        run("pyrl/tis")
    with pytest.raises(ValueError, match=r"^policy_loss.loss_mode: pyrl/steer: .*entropy of each"):
        run("pyrl/steer")


def test_a_loss_with_other_numbers_is_registered_by_name() -> None:
    door.register(losses={"mine": lambda: replace(presets.ppo(), bounds=axes.Clip(0.1, 0.3))})
    function = core_algos.get_policy_loss_fn("pyrl/mine")
    value, _ = function(OLD, LOGPROB, OF_TOKENS, MASK, "token-mean", actor())
    own = core_algos.get_policy_loss_fn("vanilla")
    config = actor(clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=1e9)
    expected, _ = own(OLD, LOGPROB, OF_TOKENS, MASK, "token-mean", config)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
