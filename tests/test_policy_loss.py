"""The loss and its coefficients against published formulas, golden values and autograd."""

from __future__ import annotations

import math
from typing import Any

import kernel_reference as reference
import numpy as np
import pytest
import torch
from torch import Tensor

from pyrl.aggregate import (
    Aggregate,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)
from pyrl.policy_loss import PolicyLoss, policy_loss

# Two responses of 4 and 3 tokens.
LOGPROB = [-0.50, -1.20, -2.00, -0.10, -0.80, -3.00, -0.30]
OLD_LOGPROB = [-0.60, -1.00, -2.50, -0.12, -0.70, -2.20, -0.65]
REF_LOGPROB = [-0.70, -1.10, -2.10, -0.20, -0.60, -2.60, -0.55]
ENTROPY = [0.90, 1.50, 2.20, 0.30, 1.10, 2.80, 0.70]
ADVANTAGE = [1.0] * 4 + [-0.8] * 3
LEAF = np.array([0, 0, 0, 0, 1, 1, 1])
MASK = np.ones(7, bool)

PPO_LOSS = [-1.105171, -0.818731, -1.200000, -1.020201, 0.723870, 0.640000, 1.135254]
PPO_SLOPE = [-1.105171, -0.818731, 0, -1.020201, 0.723870, 0, 1.135254]
HIGHER_LOSS = [*PPO_LOSS[:2], -1.28, *PPO_LOSS[3:]]
DUAL_LOSS, DUAL_SLOPE = [*PPO_LOSS[:6], 1.12], [*PPO_SLOPE[:6], 0]


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fixture_loss(aggregate: Aggregate | None = None, **changes: Any) -> PolicyLoss:
    weight_T = (aggregate or TokenMean())(LEAF, MASK, 2)
    arguments: dict[str, Any] = {
        "logprob_T": tensor(LOGPROB),
        "entropy_T": tensor(ENTROPY),
        "old_logprob_T": tensor(OLD_LOGPROB),
        "advantage_T": tensor(ADVANTAGE),
        "weight_T": torch.from_numpy(weight_T),
        "clip_low_T": 0.2,
        "clip_high_T": 0.2,
    }
    return policy_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "loss_T", "slope_T", "loss"),
    [
        ({}, PPO_LOSS, PPO_SLOPE, -0.234997),
        ({"clip_high_T": 0.28}, HIGHER_LOSS, PPO_SLOPE, -0.246426),
        ({"dual_clip": 1.4}, DUAL_LOSS, DUAL_SLOPE, -0.237176),
        (
            {"clip_high_T": 0.28, "dual_clip": 1.4},
            [*HIGHER_LOSS[:6], 1.12],
            DUAL_SLOPE,
            -0.248605,
        ),
    ],
    ids=["ppo", "clip-higher", "dual", "clip-higher and dual"],
)
def test_losses_and_slopes_are_the_golden_ones(
    changes: dict[str, Any], loss_T: list[float], slope_T: list[float], loss: float
) -> None:
    result = fixture_loss(**changes)
    torch.testing.assert_close(result.loss_T, tensor(loss_T), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.logprob_grad_T * 7, tensor(slope_T), rtol=0, atol=1e-6)
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("aggregate", "loss"),
    [
        (TokenMean(), -0.234997),
        (SeqMeanTokenMean(), -0.101492),
        (SeqMeanTokenSum(), -0.822490),
        (SeqMeanTokenSumNorm(4), -0.205622),
        (SeqMeanTokenSumNorm(8), -0.102811),
        (TokenSum(), -1.644979),
    ],
    ids=str,
)
def test_aggregations_give_the_golden_losses(aggregate: Aggregate, loss: float) -> None:
    assert fixture_loss(aggregate).loss.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("length", "loss"), [(4, -0.063762), (8, -0.031881)])
def test_a_constant_length_with_centred_advantages_gives_the_golden_loss(
    length: int, loss: float
) -> None:
    advantage_T = tensor([0.5] * 4 + [-0.5] * 3)
    result = fixture_loss(SeqMeanTokenSumNorm(length), advantage_T=advantage_T)
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("kl", "value_T", "slope_T"),
    [
        ("k1", [0.2, -0.1, 0.1, 0.1, -0.2, -0.4, 0.25], [1.0] * 7),
        (
            "k2",
            [0.02, 0.005, 0.005, 0.005, 0.02, 0.08, 0.03125],
            [0.2, -0.1, 0.1, 0.1, -0.2, -0.4, 0.25],
        ),
        (
            "k3",
            [0.018731, 0.005171, 0.004837, 0.004837, 0.021403, 0.091825, 0.028801],
            [0.181269, -0.105171, 0.095163, 0.095163, -0.221403, -0.491825, 0.221199],
        ),
    ],
)
def test_kl_estimators_are_the_golden_ones(
    kl: str, value_T: list[float], slope_T: list[float]
) -> None:
    reference_T = tensor(REF_LOGPROB)
    zero_T = torch.zeros(7, dtype=torch.float64)
    result = fixture_loss(advantage_T=zero_T, ref_logprob_T=reference_T, kl=kl, kl_coef=2.0)
    torch.testing.assert_close(result.loss_T, 2 * tensor(value_T), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.logprob_grad_T, 2 / 7 * tensor(slope_T), rtol=0, atol=1e-6)
    assert result.kl_ref == pytest.approx(float(np.mean(value_T)), abs=1e-6)


def test_k3_is_golden_at_small_and_bounded_at_large_differences() -> None:
    logprob_T = tensor([0.0, 0.0, 0.0, 0.0, 0.0])
    reference_T = tensor([0.1, -0.1, 1.0, 8.0, -30.0])
    result = policy_loss(
        logprob_T,
        logprob_T,
        old_logprob_T=logprob_T,
        advantage_T=logprob_T,
        weight_T=torch.ones(5, dtype=torch.float64),
        clip_low_T=0.2,
        clip_high_T=0.2,
        ref_logprob_T=reference_T,
        kl_coef=1.0,
    )
    expected_T = tensor([0.005171, 0.004837, 0.718282, 10.0, 10.0])
    torch.testing.assert_close(result.loss_T, expected_T, rtol=0, atol=1e-6)
    assert result.logprob_grad_T[3:].tolist() == [0.0, 0.0]


def test_reports_are_weighted_by_the_tokens() -> None:
    result = fixture_loss(TokenSum(), dual_clip=1.4, ref_logprob_T=tensor(REF_LOGPROB))
    ratio_T = np.exp(np.subtract(LOGPROB, OLD_LOGPROB))
    assert result.weight == 7
    assert (result.clipped_low, result.clipped_high, result.clipped_dual) == (1 / 7, 1 / 7, 1 / 7)
    assert result.ratio_mean == pytest.approx(ratio_T.mean())
    assert result.ratio_max == pytest.approx(1.648721, abs=1e-6)
    assert result.kl_old == pytest.approx(np.mean(ratio_T - 1 - np.log(ratio_T)))
    assert result.kl_ref == pytest.approx(0.025086, abs=1e-6)
    assert math.isnan(fixture_loss().kl_ref)
    heavy_T = tensor([0, 0, 3, 0, 0, 1, 0])
    heavy = fixture_loss(weight_T=heavy_T)
    assert (heavy.clipped_high, heavy.clipped_low) == (0.75, 0.25)


def random_arguments(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "logprob_T": normal(),
        "entropy_T": normal().abs(),
        "old_logprob_T": normal(),
        "advantage_T": normal(),
        "clip_low_T": normal().abs() / 3,
        "clip_high_T": normal().abs() / 3,
        "ref_logprob_T": normal(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_gradient_is_autograds(kl: Any, dual_clip: float | None, dtype: torch.dtype) -> None:
    arguments = random_arguments(500, dtype)
    arguments["logprob_T"][:3] = torch.tensor([40.0, -40.0, 3.0])
    weight_T = torch.rand(500, generator=torch.Generator().manual_seed(2)).to(dtype)
    options: dict[str, Any] = {
        "dual_clip": dual_clip,
        "kl": kl,
        "kl_coef": 0.3,
        "entropy_coef": 0.01,
    }
    leaves = [arguments["logprob_T"].requires_grad_(), arguments["entropy_T"].requires_grad_()]
    result = policy_loss(**arguments, weight_T=weight_T, **options)
    wide = {name: value.double() for name, value in arguments.items()}
    expected_T = reference.policy_loss(**wide, **options)
    expected = (weight_T * expected_T).sum()
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 1e-6}
    torch.testing.assert_close(result.loss_T, expected_T.detach(), check_dtype=False, **tolerance)
    torch.testing.assert_close(result.loss, expected, check_dtype=False, **tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(result.loss * 2, leaves),
        torch.autograd.grad(expected * 2, leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_gradcheck_passes_away_from_the_corners() -> None:
    arguments = random_arguments(40, torch.float64)
    weight_T = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logprob_T, entropy_T = arguments.pop("logprob_T"), arguments.pop("entropy_T")

    def loss(logprob_T: Tensor, entropy_T: Tensor) -> Tensor:
        return policy_loss(
            logprob_T,
            entropy_T,
            **arguments,
            weight_T=weight_T,
            dual_clip=2.0,
            kl_coef=0.1,
            entropy_coef=0.02,
        ).loss

    assert torch.autograd.gradcheck(loss, (logprob_T.requires_grad_(), entropy_T.requires_grad_()))


def test_a_token_of_weight_zero_takes_no_part_whatever_it_holds() -> None:
    kept = fixture_loss(TokenMean())
    mask_T = np.array([True] * 7 + [False])
    broken = torch.tensor([math.nan], dtype=torch.float64)
    extended: dict[str, Tensor] = {
        name: torch.cat([tensor(values), broken])
        for name, values in (
            ("logprob_T", LOGPROB),
            ("entropy_T", ENTROPY),
            ("old_logprob_T", OLD_LOGPROB),
            ("advantage_T", ADVANTAGE),
            ("ref_logprob_T", REF_LOGPROB),
        )
    }
    extended["logprob_T"].requires_grad_()
    weight_T = torch.from_numpy(TokenMean()(np.append(LEAF, 1), mask_T, 2))
    result = fixture_loss(**extended, weight_T=weight_T, entropy_coef=0.0, kl_coef=0.0)
    result.loss.backward()
    assert result.loss.item() == kept.loss.item()
    assert result.loss_T[7] == 0
    torch.testing.assert_close(extended["logprob_T"].grad[:7], kept.logprob_grad_T)
    assert extended["logprob_T"].grad[7] == 0


def test_strided_tensors_are_read_as_they_are() -> None:
    spread_T = tensor(LOGPROB).repeat_interleave(2)[::2]
    assert not spread_T.is_contiguous()
    assert fixture_loss(logprob_T=spread_T).loss.item() == fixture_loss().loss.item()


def test_no_tokens_have_no_loss_and_no_mean() -> None:
    empty_T = torch.zeros(0, requires_grad=True)
    constant_T = empty_T.detach()
    result = policy_loss(
        empty_T,
        constant_T,
        old_logprob_T=constant_T,
        advantage_T=constant_T,
        weight_T=constant_T,
        clip_low_T=0.2,
        clip_high_T=0.2,
    )
    result.loss.backward()
    assert result.loss.item() == 0
    assert result.weight == 0
    assert math.isnan(result.ratio_mean)
    assert math.isnan(result.ratio_max)


def test_second_derivatives_are_refused() -> None:
    logprob_T = tensor(LOGPROB).requires_grad_()
    loss = fixture_loss(logprob_T=logprob_T).loss
    with pytest.raises(
        NotImplementedError, match="policy_loss: expected to be differentiated once"
    ):
        torch.autograd.grad(loss, logprob_T, create_graph=True)


def test_the_op_obeys_torchs_rules() -> None:
    arguments = random_arguments(6, torch.float64)
    logprob_T = arguments["logprob_T"].requires_grad_()
    rest = [arguments[name] for name in ("entropy_T", "old_logprob_T", "advantage_T")]
    weight_T = torch.ones(6, dtype=torch.float64)
    radii = [arguments["clip_low_T"], arguments["clip_high_T"]]
    for ref_logprob_T, kl_coef in ((None, 0.0), (arguments["ref_logprob_T"], 0.1)):
        options = (ref_logprob_T, 3.0, 3, kl_coef, 0.01)
        op = torch.ops.pyrl.policy_loss.default
        torch.library.opcheck(op, (logprob_T, *rest, weight_T, *radii, *options))


def test_bad_arguments_say_what_was_expected_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"logprob_T: expected float32\[T\] or float64\[T\], got"):
        fixture_loss(logprob_T=tensor(LOGPROB).half())
    with pytest.raises(ValueError, match=r"old_logprob_T: expected .*float64\[7\].*float32\[7\]"):
        fixture_loss(old_logprob_T=tensor(OLD_LOGPROB).float())
    with pytest.raises(ValueError, match=r"advantage_T: expected .*\[7\] like .*float64\[6\]"):
        fixture_loss(advantage_T=tensor(ADVANTAGE)[:6])
    with pytest.raises(ValueError, match=r"entropy_T: expected a tensor on cpu, got meta"):
        fixture_loss(entropy_T=tensor(ENTROPY).to("meta"))
    with pytest.raises(ValueError, match=r"dual_clip: expected > 1, got 1"):
        fixture_loss(dual_clip=1.0)
    with pytest.raises(ValueError, match=r"kl: expected one of \['k1', 'k2', 'k3'\], got 'k9'"):
        fixture_loss(kl="k9")
    with pytest.raises(ValueError, match=r"ref_logprob_T: expected .* kl_coef = 0.1, got none"):
        fixture_loss(kl_coef=0.1)
    with pytest.raises(ValueError, match=r"weight_T: expected finite numbers >= 0, got -1 at 0"):
        fixture_loss(weight_T=-torch.ones(7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"advantage_T: expected finite numbers, got nan at 6"):
        fixture_loss(advantage_T=tensor([*ADVANTAGE[:6], math.nan]))
    with pytest.raises(ValueError, match=r"clip_low_T, clip_high_T: expected radii >= 0, got -0.1"):
        fixture_loss(clip_low_T=-0.1)


def test_a_leaf_without_a_token_does_not_count() -> None:
    leaf_T, mask_T = np.array([0, 0, 1, 3, 3, 3]), np.array([True, True, False, True, False, True])
    expected = {
        TokenMean(): [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4],
        SeqMeanTokenMean(): [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4],
        SeqMeanTokenSum(): [1 / 2, 1 / 2, 0, 1 / 2, 0, 1 / 2],
        SeqMeanTokenSumNorm(10): [1 / 20, 1 / 20, 0, 1 / 20, 0, 1 / 20],
        TokenSum(): [1, 1, 0, 1, 0, 1],
    }
    for aggregate, weight_T in expected.items():
        np.testing.assert_allclose(aggregate(leaf_T, mask_T, 5), weight_T)


@pytest.mark.parametrize(
    "aggregate",
    [TokenMean(), TokenSum(), SeqMeanTokenMean(), SeqMeanTokenSum(), SeqMeanTokenSumNorm(4)],
    ids=str,
)
def test_aggregations_accept_nothing_and_refuse_bad_arrays(aggregate: Aggregate) -> None:
    nothing = aggregate(np.zeros(0, np.int64), np.zeros(0, bool), 0)
    assert nothing.shape == (0,)
    assert aggregate(LEAF, ~MASK, 2).tolist() == [0.0] * 7
    with pytest.raises(ValueError, match=r"leaf_T: expected 0 <= leaf < 1, got 0 to 1"):
        aggregate(LEAF, MASK, 1)
    numbers_T: Any = MASK.astype(np.int64)
    with pytest.raises(ValueError, match=r"mask_T: expected bool\[7\] like leaf_T, got int64\[7\]"):
        aggregate(LEAF, numbers_T, 2)
    short_T: Any = LEAF.astype(np.int32)
    with pytest.raises(ValueError, match=r"leaf_T: expected int64\[T\], got int32\[7\]"):
        aggregate(short_T, MASK, 2)


def test_a_normalising_length_is_positive() -> None:
    with pytest.raises(ValueError, match="length: expected > 0, got 0"):
        SeqMeanTokenSumNorm(0)
