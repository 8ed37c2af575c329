"""The loss and its coefficients: published formulas, masks, reports, the op and bad input."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from policy_fixture import COLUMNS, PPO, RESPONSES, fixture_loss, near, tensor, unit
from torch import Tensor

from pyrl.loss import KL, ClampedLogp, Clipped, Loss, MaskedLogp, Ratio, Sigmoid, Unbounded
from pyrl.loss.aggregate import (
    Aggregate,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import PRESETS, dapo
from pyrl.loss.spec import lower

# -- aggregation --


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
    result = fixture_loss(replace(PPO, aggregate=aggregate))
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("length", "loss"), [(4, -0.063762), (8, -0.031881)])
def test_a_constant_length_with_centred_advantages_gives_the_golden_loss(
    length: int, loss: float
) -> None:
    constant = replace(PPO, aggregate=SeqMeanTokenSumNorm(length))
    result = fixture_loss(constant, advantage_T=tensor([0.5] * 4 + [-0.5] * 3))
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)


def test_both_clips_at_once_give_the_golden_loss() -> None:
    assert fixture_loss(replace(dapo(), dual=1.4)).loss.item() == pytest.approx(-0.248605, abs=1e-6)


def test_a_response_without_a_token_does_not_count() -> None:
    tokens_N = torch.tensor([2, 0, 0, 2, 0])
    for aggregate, weight in (
        (TokenMean(), 1 / 4),
        (SeqMeanTokenMean(), 1 / 4),
        (SeqMeanTokenSum(), 1 / 2),
        (SeqMeanTokenSumNorm(10), 1 / 20),
        (TokenSum(), 1),
    ):
        np.testing.assert_allclose(aggregate(tokens_N)[[0, 3]], weight)
        assert aggregate(tokens_N).isfinite().all()
        assert aggregate(torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("length", [0.0, -1.0, math.inf])
def test_a_normalising_length_is_positive(length: float) -> None:
    with pytest.raises(ValueError, match="length: expected a finite number > 0, got"):
        SeqMeanTokenSumNorm(length)


# -- penalties --

K3 = [0.018731, 0.005171, 0.004837, 0.004837, 0.021403, 0.091825, 0.028801]
K3_SLOPE = [0.181269, -0.105171, 0.095163, 0.095163, -0.221403, -0.491825, 0.221199]
DISTANCE = [0.2, -0.1, 0.1, 0.1, -0.2, -0.4, 0.25]
K2 = [0.02, 0.005, 0.005, 0.005, 0.02, 0.08, 0.03125]


@pytest.mark.parametrize(
    ("estimator", "value_T", "slope_T"),
    [
        ("k1", DISTANCE, [1.0] * 7),
        ("abs", np.abs(DISTANCE), np.sign(DISTANCE)),
        ("k2", K2, DISTANCE),
        ("k3", K3, K3_SLOPE),
        ("k1+", DISTANCE, DISTANCE),
        ("k2+", K2, DISTANCE),
        ("k3+", K3, DISTANCE),
    ],
)
def test_kl_estimators_are_the_golden_ones(
    estimator: Any, value_T: list[float], slope_T: list[float]
) -> None:
    loss = unit(replace(PPO, kl=KL(2.0, estimator)))
    result = fixture_loss(loss, advantage_T=torch.zeros(7, dtype=torch.float64))
    near(result.loss_T / 2, value_T)
    near(result.logprob_grad_T / 2, slope_T)
    assert result.kl_ref == pytest.approx(float(np.mean(value_T)), abs=1e-6)


def test_k3_is_bounded_at_large_differences() -> None:
    logprob_T = tensor([0.0] * 5)
    result = policy_loss(
        logprob_T,
        logprob_T,
        loss=unit(replace(PPO, kl=KL(1.0))),
        per_token=True,
        old_logprob_T=logprob_T,
        advantage_T=logprob_T,
        ref_logprob_T=tensor([0.1, -0.1, 1.0, 8.0, -30.0]),
    )
    near(result.loss_T, [0.005171, 0.004837, 0.718282, 10.0, 10.0])
    assert result.logprob_grad_T[3:].tolist() == [0.0, 0.0]


# -- reports --


def test_reports_are_weighted_by_the_tokens() -> None:
    loss = replace(unit(PPO), dual=1.4)
    result = fixture_loss(loss, ref_logprob_T=COLUMNS["ref_logprob_T"])
    ratio_T = np.exp((COLUMNS["logprob_T"] - COLUMNS["old_logprob_T"]).numpy())
    assert result.weight == 7
    assert (result.clipped_low, result.clipped_high, result.clipped_dual) == (1 / 7, 1 / 7, 1 / 7)
    assert result.ratio_mean == pytest.approx(ratio_T.mean())
    assert result.ratio_max == pytest.approx(1.648721, abs=1e-6)
    assert result.kl_old == pytest.approx(np.mean(ratio_T - 1 - np.log(ratio_T)))
    assert result.kl_ref == pytest.approx(0.025086, abs=1e-6)
    assert math.isnan(fixture_loss().kl_ref)
    mask_T = torch.tensor([False, False, True, False, False, True, True])
    masked = fixture_loss(replace(PPO, aggregate=SeqMeanTokenMean()), mask_T=mask_T)
    assert (masked.clipped_high, masked.clipped_low) == (0.5, 0.25)


def test_without_a_ratio_it_counts_as_one() -> None:
    result = fixture_loss(PRESETS["reinforce"]())
    assert (result.ratio_mean, result.ratio_max, result.kl_old) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("name", ["ppo", "sapo", "ce_gppo", "cispo", "dppo", "gspo", "reinforce"])
def test_a_log_prob_that_is_no_number_shows_in_loss_and_gradient(name: str) -> None:
    for column in ("logprob_T", "old_logprob_T"):
        broken_T = COLUMNS[column].clone()
        broken_T[1] = math.nan
        result = fixture_loss(PRESETS[name](), **{column: broken_T})
        read = name != "reinforce" or column == "logprob_T"
        assert result.loss.isnan().item() == read
        if name != "reinforce":  # its gradient is the advantage alone
            assert result.logprob_grad_T[1].isnan()
        assert result.logprob_grad_T[4:].isfinite().all()  # of another response


@pytest.mark.parametrize("surrogate", [Clipped(), MaskedLogp(5.0), ClampedLogp(), Sigmoid()])
def test_a_pre_clipped_token_has_no_gradient(surrogate: Any) -> None:
    ratio = Ratio("seq_geo", pre_clip=0.15)
    loss = replace(PPO, ratio=ratio, surrogate=surrogate, bounds=Unbounded())
    moved_T = COLUMNS["logprob_T"] - COLUMNS["old_logprob_T"]
    beyond_T = torch.where(COLUMNS["advantage_T"] < 0, -moved_T, moved_T) > 0.15
    assert 0 < beyond_T.sum() < 7
    assert (fixture_loss(loss).logprob_grad_T == 0).equal(beyond_T)


# -- tokens that take no part --


@pytest.mark.parametrize("name", PRESETS)
def test_a_masked_token_takes_no_part_whatever_it_holds(name: str) -> None:
    loss, broken = PRESETS[name](), tensor([math.nan, math.inf])
    if name == "dcpo":
        broken = tensor([0.0, 0.0])  # its rewards are those of responses
    columns = {k: v for k, v in COLUMNS.items() if k != "ref_logprob_T"}
    longer = {k: torch.cat([v[:4], broken[:1], v[4:], broken[1:]]) for k, v in columns.items()}
    leaves = [longer["logprob_T"].requires_grad_(), longer["entropy_T"].requires_grad_()]
    mask_T = torch.tensor([True] * 4 + [False] + [True] * 3 + [False])
    kept = fixture_loss(loss)
    result = fixture_loss(loss, **longer, mask_T=mask_T, offset_N1=torch.tensor([0, 5, 9]))
    result.loss.backward()
    torch.testing.assert_close(result.loss, kept.loss, rtol=1e-12, atol=1e-15)
    assert result.loss_T[~mask_T].tolist() == [0.0, 0.0]
    torch.testing.assert_close(leaves[0].grad[mask_T], kept.logprob_grad_T)
    for leaf in leaves:
        if leaf.grad is not None:
            assert leaf.grad[~mask_T].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", PRESETS)
def test_no_tokens_and_none_that_take_part_have_no_loss(name: str) -> None:
    for tokens in (0, 7):
        columns = {k: v[:tokens] for k, v in COLUMNS.items() if k != "ref_logprob_T"}
        result = fixture_loss(
            PRESETS[name](),
            **columns,
            mask_T=torch.zeros(tokens, dtype=torch.bool),
            offset_N1=RESPONSES["offset_N1"].clamp(max=tokens),
        )
        assert result.loss.item() == result.weight == 0
        assert result.logprob_grad_T.tolist() == [0.0] * tokens
        assert math.isnan(result.ratio_mean)
        assert math.isnan(result.ratio_max)


@pytest.mark.parametrize("name", PRESETS)
def test_one_token_has_a_finite_loss(name: str) -> None:
    columns = {k: v[5:6] for k, v in COLUMNS.items() if k != "ref_logprob_T"}
    one = {"offset_N1": torch.tensor([0, 1]), "group_N": torch.tensor([0])}
    result = fixture_loss(PRESETS[name](), **columns, **one)
    assert math.isfinite(result.loss.item())
    assert math.isfinite(result.logprob_grad_T.item())


# -- the op --


def test_float32_columns_and_strided_ones_are_read_as_they_are() -> None:
    spread = {k: v.repeat_interleave(2)[::2] for k, v in COLUMNS.items() if k != "ref_logprob_T"}
    assert not spread["logprob_T"].is_contiguous()
    for name in PRESETS:
        loss = PRESETS[name]()
        expected = fixture_loss(loss)
        torch.testing.assert_close(fixture_loss(loss, **spread).loss, expected.loss, rtol=0, atol=0)
        mixed = {k: v.float() for k, v in spread.items() if k not in ("logprob_T", "advantage_T")}
        torch.testing.assert_close(
            fixture_loss(loss, **mixed).loss, expected.loss, rtol=1e-5, atol=1e-7
        )


def test_the_outputs_are_of_the_log_probabilities_type() -> None:
    for dtype in (torch.float32, torch.float64):
        logprob_T = COLUMNS["logprob_T"].to(dtype, copy=True).requires_grad_()
        result = fixture_loss(replace(PPO, entropy=0.1), logprob_T=logprob_T)
        for value in (result.loss, result.loss_T, result.logprob_grad_T, result.entropy_grad_T):
            assert value.dtype == dtype
        result.loss.backward()
        torch.testing.assert_close(logprob_T.grad, result.logprob_grad_T)


def test_the_gradient_of_a_leaf_is_its_own_memory() -> None:
    """Autograd may add to it, and its owner may clear it: the result's gradient stays."""
    leaf_T = COLUMNS["logprob_T"].clone().requires_grad_()
    first, second = fixture_loss(logprob_T=leaf_T), fixture_loss(logprob_T=leaf_T)
    slope_T = first.logprob_grad_T.clone()
    for result, times in ((first, 1), (first, 2), (second, 3)):
        result.loss.backward(retain_graph=True)
        torch.testing.assert_close(leaf_T.grad, times * slope_T)
    leaf_T.grad.zero_()
    assert first.logprob_grad_T.equal(slope_T)
    assert second.logprob_grad_T.equal(slope_T)
    first.loss.backward()
    assert leaf_T.grad.equal(slope_T)


def test_without_a_coefficient_entropy_has_no_gradient() -> None:
    entropy_T = COLUMNS["entropy_T"].clone().requires_grad_()
    result = fixture_loss(PPO, entropy_T=entropy_T)
    assert result.entropy_grad_T.tolist() == [0.0] * 7
    assert not torch.autograd.grad(result.loss, entropy_T, allow_unused=True)[0]
    bonus = fixture_loss(replace(unit(PPO), entropy=0.25), entropy_T=entropy_T)
    assert torch.autograd.grad(bonus.loss * 2, entropy_T)[0].tolist() == [-0.5] * 7


def test_second_derivatives_are_refused() -> None:
    logprob_T = COLUMNS["logprob_T"].clone().requires_grad_()
    loss = fixture_loss(logprob_T=logprob_T).loss
    with pytest.raises(
        NotImplementedError, match="policy_loss: expected to be differentiated once"
    ):
        torch.autograd.grad(loss, logprob_T, create_graph=True)


def test_the_op_obeys_torchs_rules() -> None:
    op = torch.ops.pyrl.policy_loss.default
    logprob_T = COLUMNS["logprob_T"].clone().requires_grad_()
    columns: list[Tensor | None] = [None] * 19
    columns[2], columns[5] = COLUMNS["old_logprob_T"], COLUMNS["advantage_T"]
    for entropy_coef in (0.0, 0.1):
        spec = lower(replace(PPO, entropy=entropy_coef), has_reference=False).spec.numbers()
        weight_N = torch.ones(2, dtype=torch.float64)
        rest = (columns, None, RESPONSES["offset_N1"], weight_N, None, None, spec)
        per_token = entropy_coef != 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opcheck reads .grad of the copies that it makes
            torch.library.opcheck(op, (logprob_T, COLUMNS["entropy_T"], None, *rest, per_token))


# -- bad input --


def test_bad_columns_say_what_was_expected_and_what_came() -> None:
    for changes, message in (
        ({"logprob_T": COLUMNS["logprob_T"].half()}, "logprob_T: expected float32[T] or float64"),
        ({"logprob_T": COLUMNS["logprob_T"][None]}, "logprob_T: expected float32[T] or"),
        ({"old_logprob_T": COLUMNS["old_logprob_T"].long()}, "old_logprob_T: expected float32[T]"),
        ({"advantage_T": COLUMNS["advantage_T"][:6]}, "advantage_T: expected [7] like logprob_T"),
        ({"entropy_T": COLUMNS["entropy_T"].to("meta")}, "entropy_T: expected a tensor on cpu"),
        ({"mask_T": torch.ones(7)}, "mask_T: expected bool with one axis, got"),
        ({"mask_T": torch.ones(6, dtype=torch.bool)}, "mask_T: expected 7 entries, got 6"),
        ({"offset_N1": torch.tensor([0.0, 7.0])}, "offset_N1: expected int64 with one"),
        ({"offset_N1": torch.tensor([0, 4, 6])}, "offsets from 0 to 7, got 0 to 6"),
        ({"offset_N1": torch.tensor([], dtype=torch.int64)}, "offsets from 0 to 7, got none"),
        ({"offset_N1": torch.tensor([0, 5, 4, 7])}, "offsets that do not fall, got 5 before 4"),
        ({"group_N": torch.tensor([0])}, "group_N: expected 2 entries, got 1"),
        ({"group_N": torch.tensor([0, -1])}, "group_N: expected numbers from 0 below 2 (one per"),
        ({"group_N": torch.tensor([0, 2])}, "response), got 2"),
        (
            {"advantage_T": tensor([1.0] * 6 + [math.nan])},
            "advantage_T: expected finite numbers, got nan at 6",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fixture_loss(PPO, **changes)


def test_negative_radii_are_refused() -> None:
    radii = {"clip_low_T": tensor([0.1] * 7), "clip_high_T": tensor([0.1] * 6 + [-0.1])}
    with pytest.raises(ValueError, match=r"clip_low_T, clip_high_T: expected radii >= 0, got 0.1"):
        fixture_loss(replace(PPO, bounds=OwnBounds()), **radii)


class OwnBounds:
    def __call__(self, batch: Any) -> Any:
        raise AssertionError("radii are columns here")


def test_radii_per_token_are_the_bounds() -> None:
    radii = {"clip_low_T": tensor([0.2] * 7), "clip_high_T": tensor([0.28] * 7)}
    own = fixture_loss(replace(PPO, bounds=OwnBounds()), **radii)
    assert own.loss_T.tolist() == fixture_loss(dapo()).loss_T.tolist()


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("ppo", "advantage_T"),
        ("ppo", "old_logprob_T"),
        ("minirl", "rollout_logprob_T"),
        ("minirl", "old_logprob_T"),
        ("tis", "rollout_logprob_T"),
        ("lp_reg", "proxy_logprob_T"),
        ("calibrl", "expert_logprob_T"),
        ("calibrl", "reward_T"),
        ("dcpo", "second_logprob_T"),
        ("siren", "nucleus_entropy_T"),
        ("clip_v", "sum_p2_T"),
        ("hapo", "group_N"),
        ("gspo", "offset_N1"),
        ("mis", "offset_N1"),
        ("ctpo", "offset_N1"),
    ],
)
def test_a_missing_column_is_named(name: str, column: str) -> None:
    with pytest.raises(ValueError, match=f"needs the column {column}"):
        fixture_loss(PRESETS[name](), **{"group_N": None, column: None})


def test_a_penalty_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.kl: needs the column ref_logprob_T"):
        fixture_loss(replace(PPO, kl=KL(0.1)), ref_logprob_T=None)


# -- presets --


def test_presets_are_values_and_name_their_source() -> None:
    said: dict[str, str] = {name: preset.__doc__ or "" for name, preset in PRESETS.items()}
    unpublished: Sequence[str] = ("tis", "tis_sequence", "mis")
    for name, text in said.items():
        assert re.search(r"arXiv:\d{4}\.\d{5}", text) or name in unpublished, name
        loss = PRESETS[name]()
        assert pickle.loads(pickle.dumps(loss)) == loss == replace(Loss(), **vars(loss))
    assert len({repr(preset()) for preset in PRESETS.values()}) == len(PRESETS)
    assert PRESETS["reinforce"]().bounds == Unbounded()
