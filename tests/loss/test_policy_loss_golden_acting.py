"""Published values where an axis acts that has nothing to do with the presets' own numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_fixture import COLUMNS, fixture_loss, near, tensor, unit

from pyrl.loss import (
    TIS,
    BinaryKL,
    Clip,
    ClipB,
    ClipV,
    EntropyBand,
    EntropyFilter,
    Loss,
    LossState,
    PositionClip,
    Ratio,
    TokenGroup,
    TotalVariation,
    Unbounded,
)
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import PRESETS
from pyrl.loss.result import PolicyLoss

GENTLE_T = COLUMNS["old_logprob_T"] + (COLUMNS["logprob_T"] - COLUMNS["old_logprob_T"]) / 20
"""A twentieth of the way from the old policy to the current one."""


def without_gradient_in(found: PolicyLoss) -> list[int]:
    return [place for place, grad in enumerate(found.logprob_grad_T.tolist()) if grad == 0]


ctpo = replace(PRESETS["ctpo"](), behaviour=None)
dppo = PRESETS["dppo"]()


@pytest.mark.parametrize(
    ("loss", "mean", "without_gradient"),
    [
        (replace(dppo, bounds=TotalVariation(0.05)), 0.023546, [0, 2, 5]),
        (replace(dppo, bounds=BinaryKL(0.01)), 0.102487, [2, 5]),
    ],
)
def test_dppo_cuts_tokens_by_their_change_of_probability(
    loss: Loss, mean: float, without_gradient: list[int]
) -> None:
    found = fixture_loss(loss)
    near(found.loss, mean)
    assert without_gradient_in(found) == without_gradient


TENTH = PositionClip(0.01, 0.01, 0.01)
GEOMETRIC = replace(ctpo, ratio=Ratio("cum_geo"), bounds=PositionClip(power=-0.5))


@pytest.mark.parametrize(
    ("loss", "mean", "grad_T"),
    [
        (
            ctpo,
            -0.242133,
            [-1.005013, -0.995012, -1.020201, -1.021222, 0.796010, 0, 0.778300],
        ),
        (
            replace(ctpo, bounds=TENTH),
            -0.238094,
            [-1.005013, -0.995012, 0, 0, 0.796010, 0, 0],
        ),
        (
            GEOMETRIC,
            -0.234254,
            [-1.005013, -0.997503, -1.006689, -1.005264, 0.796010, 0, 0.792700],
        ),
    ],
)
def test_ctpo_near_the_old_policy(loss: Loss, mean: float, grad_T: list[float]) -> None:
    near(fixture_loss(loss, logprob_T=GENTLE_T).loss, mean)
    near(fixture_loss(unit(loss), logprob_T=GENTLE_T).logprob_grad_T, grad_T)


@pytest.mark.parametrize(
    ("of", "ratio_T"),
    [
        ("seq_prod", [1.521962] * 4 + [0.576950] * 3),
        ("cum_prod", [1.105171, 0.904837, 1.491825, 1.521962, 0.904837, 0.406570, 0.576950]),
        ("cum_geo", [1.105171, 0.951229, 1.142631, 1.110711, 0.904837, 0.637628, 0.832491]),
    ],
)
def test_ratios_of_responses_and_prefixes(of: str, ratio_T: list[float]) -> None:
    loss = replace(PRESETS["ppo"](), ratio=Ratio(of), bounds=Unbounded())
    found = fixture_loss(unit(loss)).logprob_grad_T
    near(-found / COLUMNS["advantage_T"], ratio_T)


def test_dro_is_reinforce_with_a_squared_distance() -> None:
    found = fixture_loss(unit(PRESETS["dro"]()))
    assert found.loss_T is not None
    near(found.loss_T, [0.5005, 1.202, 2.0125, 0.10002, -0.6395, -2.368, -0.233875])
    near(found.logprob_grad_T, [-0.99, -1.02, -0.95, -0.998, 0.79, 0.72, 0.835])


def test_weights_of_the_mismatch_divided_by_their_mean() -> None:
    factor_T = fixture_loss(unit(replace(PRESETS["ppo"](), behaviour=TIS(1.05, normalize=True))))
    plain = fixture_loss(unit(PRESETS["ppo"]()))
    assert factor_T.loss_T is not None
    assert plain.loss_T is not None
    expected = [1.080375, 1.007335, 0.867021, 1.058982, 1.111931, 0.867021, 1.007335]
    near(factor_T.loss_T / plain.loss_T, expected)


@pytest.mark.parametrize(("mu", "dropped"), [(2.5, []), (0.5, [5, 6])])
def test_clip_b_drops_what_would_lower_the_entropy(mu: float, dropped: list[int]) -> None:
    loss = replace(PRESETS["reinforce"](), keep=(ClipB(mu),))
    found = fixture_loss(loss)
    assert without_gradient_in(found) == dropped
    near(found.logprob_grad_T[:4], [-1 / (7 - len(dropped))] * 4)  # the denominators shrink


def test_clip_v_drops_by_the_exact_change() -> None:
    """Four tokens of one distribution with published probabilities and entropy."""
    logprob_T = tensor([-0.575833, -2.075833, -3.575833, -1.575833])
    same = {"old_logprob_T": logprob_T, "entropy_T": tensor([1.215365] * 4)}
    moments = {"sum_p2_T": tensor([0.381204] * 4), "sum_p2_logp_T": tensor([-0.299840] * 4)}
    advantage_T = tensor([-1, -1, 1, -1])
    loss = replace(PRESETS["reinforce"](), keep=(ClipV(1.2, max_share=1.0),))
    found = policy_loss(logprob_T, advantage_T=advantage_T, loss=loss, **same, **moments)
    assert without_gradient_in(found) == [1, 3]


@pytest.mark.parametrize(
    ("length", "advantage"),
    [
        ([2, 4, 3], [1.870824, -0.534521, -0.534521]),
        ([1, 20, 20], [1.154699, -0.577350, -0.577350]),  # 6.32 would be too far: GRPO's
    ],
)
def test_hapo_s_baseline_is_a_mean_over_tokens(length: list[int], advantage: list[float]) -> None:
    spread = torch.tensor(length)
    reward_T = tensor([1, 0, 0]).repeat_interleave(spread)
    grpo_T = tensor([1.154699, -0.577350, -0.577350]).repeat_interleave(spread)
    loss = replace(PRESETS["reinforce"](), reshape=(TokenGroup(),))
    found = policy_loss(
        reward_T - 1,
        torch.ones_like(reward_T),
        advantage_T=grpo_T,
        reward_T=reward_T,
        offset_N1=torch.tensor([0, *torch.tensor(length).cumsum(0)]),
        group_N=torch.tensor([0, 0, 0]),
        loss=unit(loss),
    )
    near(-found.logprob_grad_T, tensor(advantage).repeat_interleave(spread).tolist())


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [
        (0.8, [1, 0, 0, 1, 0, 0, 0, 0]),
        (0.5, [0, -1, -1, 0, -1, -1, -1, -1]),
        (0.65, [1.620183, -0.540061, -0.540061, 1.620183] + [-0.540061] * 4),
    ],
)
def test_entrocraft_keeps_a_sign_outside_the_band(entropy: float, expected: list[float]) -> None:
    reward_T = tensor([1, -1, -1, 1, -1, -1, -1, -1])
    grpo_T = torch.where(reward_T > 0, 1.620183, -0.540061)
    loss = unit(replace(PRESETS["reinforce"](), reshape=(EntropyBand(),)))
    found = policy_loss(
        reward_T - 2,
        tensor([entropy] * 8),
        advantage_T=grpo_T,
        reward_T=reward_T,
        loss=loss,
        state=LossState(progress=0.0),
    )
    near(-found.logprob_grad_T, expected)


@pytest.mark.parametrize(
    ("cosine", "progress", "low", "high"),
    [
        (False, 0.25, 0.55, 0.65),
        (False, 0.5, 0.5, 0.6),
        (False, 1.0, 0.4, 0.5),
        (True, 0.25, 0.570711, 0.670711),
    ],
)
def test_entrocraft_s_band_falls(cosine: bool, progress: float, low: float, high: float) -> None:
    assert EntropyBand(cosine=cosine).band(progress) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("entropy", "kept"), [(0.3, [1, 2, 4]), (0.8, [0, 3]), (0.65, [0, 1, 2, 3, 4])]
)
def test_entrocraft_s_filter_keeps_answers_of_one_sign(entropy: float, kept: list[int]) -> None:
    advantage_T = tensor([1.224745, -0.816497, -0.816497, 1.224745, -0.816497])
    loss = replace(PRESETS["reinforce"](), keep=(EntropyFilter(),))
    found = policy_loss(
        tensor([-1.0] * 5), tensor([entropy] * 5), advantage_T=advantage_T, loss=loss,
        state=LossState(progress=0.0),
    )  # fmt: skip
    expected = torch.zeros(5).double()
    expected[kept] = -advantage_T[kept] / len(kept)  # the kept ones are the denominator
    near(found.logprob_grad_T, expected.tolist())


def test_entrocraft_s_filter_has_the_printed_band() -> None:
    assert EntropyFilter().band(0.25) == pytest.approx((0.475, 0.575))
    cosine = EntropyFilter(cosine=True).band(0.25)
    assert cosine == pytest.approx((0.526777, 0.626777), abs=1e-6)
    assert EntropyFilter((0.5, 0.5), (0.6, 0.6)).band(0.7) == (0.5, 0.6)


def test_a_dual_cap_beside_a_raised_clip() -> None:
    loss = replace(PRESETS["ppo"](), bounds=Clip(0.2, 0.28), dual=1.4)
    near(fixture_loss(loss).loss, -0.248605)
