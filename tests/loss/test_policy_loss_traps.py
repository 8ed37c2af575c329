"""Mistakes that published implementations make, each with a case that only the right one passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from policy_fixture import (
    COLUMNS,
    NOUGHT_OR_ONE_T,
    PPO,
    RESPONSES,
    fixture_loss,
    near,
    tensor,
    unit,
)
from torch import Tensor

from pyrl.loss import (
    KL,
    TIS,
    Blend,
    Clip,
    ClipB,
    ClipCov,
    ClipV,
    CovarianceBonus,
    EntropyBand,
    EntropyClip,
    EntropySmoothing,
    EntropyZ,
    Improbable,
    Loss,
    LossState,
    Matched,
    NearGenerator,
    Penalty,
    PositionClip,
    Ratio,
    TokenGroup,
    TopEntropy,
)
from pyrl.loss.aggregate import SeqMeanTokenMean, SeqMeanTokenSumNorm, TokenMean
from pyrl.loss.bounds import entropy_heat
from pyrl.loss.columns import LossColumns
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import PRESETS
from pyrl.loss.terms import loss_terms


def core(**changes: Any) -> LossColumns:
    return LossColumns(COLUMNS | changes, **RESPONSES)


def test_tokens_of_low_entropy_have_a_negative_heat() -> None:
    heat = [-0.448607, -0.192224, 0, -1.0, -0.347890, 1.0, -0.574742]
    np.testing.assert_allclose(entropy_heat(core()), heat, atol=1e-6)


@pytest.mark.parametrize("tokens", [4, 5, 9, 14, 100])
def test_the_pivot_of_heat_is_the_nearest_order_statistic(tokens: int) -> None:
    entropy_T = torch.arange(1.0, tokens + 1, dtype=torch.float64)
    heat_T = entropy_heat(LossColumns({"entropy_T": entropy_T}))
    pivot = entropy_T.quantile(0.8, interpolation="nearest")
    assert entropy_T[heat_T == 0].tolist() == [pivot.item()]
    if tokens == 9:
        near(heat_T[6:], [0, 0.531332, 1])


def test_hapo_widens_its_bounds_and_redistributes_as_intended() -> None:
    loss = replace(PPO, bounds=EntropyClip(), dual=10.0, redistribute=1.0)
    near(fixture_loss(loss).loss_T, [-1.105171, -0.818731, -1.2, 0, 0.472043, 1.28, 1.135254])
    near(
        fixture_loss(unit(loss)).logprob_grad_T, [-1.105171, -0.818731, 0, 0, 0.472043, 0, 1.135254]
    )
    assert fixture_loss(loss).loss.item() == pytest.approx(-0.033801, abs=1e-6)
    plain = replace(loss, redistribute=0.0)
    assert fixture_loss(plain).loss.item() == pytest.approx(-0.234997, abs=1e-6)


def test_group_advantages_count_tokens() -> None:
    advantage_T = TokenGroup()(core(reward_T=NOUGHT_OR_ONE_T), LossState())
    np.testing.assert_allclose(advantage_T, [0.866024] * 4 + [-1.154698] * 3, atol=1e-6)
    fallback_T = TokenGroup(limit=1.0)(core(), LossState())
    np.testing.assert_array_equal(fallback_T, COLUMNS["advantage_T"])


def test_entropy_smoothing_moves_the_value_and_not_the_gradient() -> None:
    state = LossState(mean_entropy=1.0)
    loss = replace(PPO, entropy=0.001)
    for low, high, term in ((0.0, 2.0, -0.00132857), (0.8, 1.2, -0.00128571)):
        smooth = replace(loss, penalties=(EntropySmoothing(0.001, 0.1, low, high),))
        entropy_T = COLUMNS["entropy_T"].clone().requires_grad_()
        result = fixture_loss(smooth, entropy_T=entropy_T, state=state)
        assert result.loss.item() == pytest.approx(-0.234997 + term, abs=1e-6)
        near(torch.autograd.grad(result.loss, entropy_T)[0] * 7, [-0.001] * 7)
    weights = [EntropySmoothing().epoch_weight(e) for e in (0, 1, 25, 50, 75, 76, 100, 150)]
    table = [1, 0.994737, 0.902683, 0.852719, 0.827067, 0.768632, 0.294304, 0.039830]
    np.testing.assert_allclose(weights, table, atol=1e-6)


def test_nucleus_peaks_are_strictly_above_the_quantile_of_tokens_that_take_part() -> None:
    result = fixture_loss(replace(PRESETS["siren"](), aggregate=TokenMean()))
    assert result.loss.item() == pytest.approx(-0.234997 + 0.00125, abs=1e-6)
    assert result.nucleus_grad_T is not None
    near(result.nucleus_grad_T, [0, 0, 0.0025, 0, 0, 0.0025, 0])
    mask_T = torch.tensor([True, True, False, True, True, True, True])
    masked = fixture_loss(PRESETS["siren"](), mask_T=mask_T)
    assert masked.nucleus_grad_T is not None
    assert masked.nucleus_grad_T.nonzero()[:, 0].tolist() == [1, 5]


def test_tokens_of_high_covariance_get_most_of_an_entropy_bonus() -> None:
    """Covariances of one response as they are published, in weights and in the gradient."""
    covariance_T = torch.tensor([0.520980, 0.080140, -1.646799, 0.432642], dtype=torch.float64)
    advantage_T = torch.tensor([1.0, 1.0, 1.0, 1.0, -4.0], dtype=torch.float64)
    logprob_T = torch.cat([covariance_T, torch.zeros(1)]) - 9
    # The fifth token, a response of its own, makes the mean of the advantages 0; that of the
    # log-probs moves all covariances of the first response alike, which softmax does not see.
    columns = {"logprob_T": logprob_T, "advantage_T": advantage_T}
    found = LossColumns(columns, None, torch.tensor([0, 4, 5]), torch.tensor([0, 0]))
    weights = [3.740584, 2.407050, 0.428041, 3.424325, 5.0]
    np.testing.assert_allclose(CovarianceBonus().weights(found), weights, atol=2e-6)
    terms = loss_terms(
        PRESETS["light_if"](),
        columns | {"old_logprob_T": logprob_T, "nucleus_entropy_T": torch.ones(5).double()},
        offset_N1=torch.tensor([0, 4, 5]),
    )
    assert terms.nucleus_T is not None
    np.testing.assert_allclose(-5 * terms.nucleus_T, weights, atol=2e-6)


@pytest.mark.parametrize("tokens", [1 << 14, (1 << 14) + 1, 20_001])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_a_quantile_of_many_tokens_is_that_of_the_sorted(
    tokens: int, share: float, masked: bool
) -> None:
    """Ties, both zeros, denormal and negative numbers, far octaves; and NaN outside the mask."""
    rng = np.random.default_rng(tokens)
    entropy_T = rng.normal(size=tokens) * 10.0 ** rng.integers(-3, 3, tokens)
    entropy_T[::7], entropy_T[1::7], entropy_T[2::7] = 0.0, -0.0, 5e-324
    entropy_T[3::7] = np.round(entropy_T[3::7])
    mask_T = rng.random(tokens) < 0.8 if masked else np.ones(tokens, bool)
    threshold = np.quantile(entropy_T[mask_T], 1 - share)
    kept_T = mask_T & (entropy_T >= threshold)
    entropy_T[~mask_T] = np.nan
    used_T = torch.from_numpy(mask_T) if masked else None
    columns = LossColumns({"entropy_T": torch.from_numpy(entropy_T)}, used_T)
    np.testing.assert_array_equal(TopEntropy(share)(columns, LossState()), kept_T)


def test_a_quantile_between_infinities_keeps_none() -> None:
    entropy_T = torch.full((20_000,), -math.inf)
    entropy_T[:10] = 1.0
    columns = LossColumns({"entropy_T": entropy_T})
    # -inf and a share of -inf - -inf: not a number
    assert not TopEntropy(0.5)(columns, LossState()).any()


def test_the_constant_length_divides_by_the_responses_too() -> None:
    norm, mean = (
        fixture_loss(replace(PPO, aggregate=a)).loss.item()
        for a in (SeqMeanTokenSumNorm(4), SeqMeanTokenMean())
    )
    assert norm == pytest.approx(-0.205622, abs=1e-6)
    assert mean == pytest.approx(-0.101492, abs=1e-6)


def test_a_plus_estimator_has_the_gradient_of_k2() -> None:
    zero = {"advantage_T": torch.zeros(7, dtype=torch.float64)}
    plain, plus, square = (
        fixture_loss(replace(PPO, kl=KL(1.0, name)), **zero) for name in ("k3", "k3+", "k2")
    )
    assert plus.loss.item() == plain.loss.item()
    assert plus.logprob_grad_T.tolist() == square.logprob_grad_T.tolist()
    assert plus.logprob_grad_T.tolist() != plain.logprob_grad_T.tolist()


BATCH_WIDE = ("clip_cov", "kl_cov", "lp_reg", "steer", "hapo", "aepo_agentic", "clip_b", "clip_v")


@pytest.mark.parametrize("name", [*BATCH_WIDE, "siren", "gspo", "ctpo", "tis_sequence", "dcpo"])
def test_results_do_not_depend_on_the_passes(name: str) -> None:
    """Terms of the whole mini-batch go with each pass, whatever the pass holds."""
    loss = PRESETS[name]()
    if name == "lp_reg":
        loss = replace(loss, penalties=(Penalty(1.0, "k3", "proxy", Improbable(0.7)),))
    whole = fixture_loss(loss)
    terms = loss_terms(
        loss,
        COLUMNS,
        **RESPONSES,
        state=LossState(entropy=0.3, mean_entropy=0.3, nucleus_entropy=2.0),
    )
    total, parts = 0.0, []
    for leaf, part in ((1, slice(4, 7)), (0, slice(0, 4))):
        taken = terms.take(np.array([leaf]))
        part_of = {k: v[part] for k, v in COLUMNS.items() if k != "ref_logprob_T"}
        result = policy_loss(loss=loss, terms=taken, **part_of)
        total += result.loss.item()
        parts.append(result.logprob_grad_T)
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    torch.testing.assert_close(torch.cat(parts[::-1]), whole.logprob_grad_T)
    alone = policy_loss(
        loss=loss,
        per_token=True,
        offset_N1=torch.tensor([0, 4]),
        group_N=torch.tensor([0]),
        state=LossState(entropy=0.3, mean_entropy=0.3, nucleus_entropy=2.0),
        **{k: v[:4] for k, v in COLUMNS.items() if k != "ref_logprob_T"},
    )
    if name in ("kl_cov", "hapo", "aepo_agentic", "dcpo"):
        assert alone.loss_T is not None
        assert whole.loss_T is not None
        assert alone.loss_T.tolist() != whole.loss_T[:4].tolist()  # the statistic is the batch's


def test_the_ratio_to_the_rollout_is_not_corrected_once_more() -> None:
    """Bypass: with the rollout as anchor nothing multiplies by old / rollout."""
    bypass = fixture_loss(replace(unit(PPO), ratio=Ratio(to="rollout")))
    ratio_T = (COLUMNS["logprob_T"] - COLUMNS["rollout_logprob_T"]).exp()
    expected_T = torch.maximum(
        -COLUMNS["advantage_T"] * ratio_T, -COLUMNS["advantage_T"] * ratio_T.clamp(0.8, 1.2)
    )
    torch.testing.assert_close(bypass.loss_T, expected_T)


@pytest.mark.parametrize("name", ["ctpo", "gspo", "gmpo", "minpro"])
def test_positions_and_lengths_count_tokens_that_take_part(name: str) -> None:
    """A tool's output between two tokens changes nothing."""
    loss, at = PRESETS[name](), torch.tensor([0, 1, 5, 2, 3, 4, 5, 6])
    mask_T = torch.tensor([True, True, False, True, True, True, True, True])
    columns = {k: v[at] for k, v in COLUMNS.items() if k != "ref_logprob_T"}
    tool = fixture_loss(loss, **columns, mask_T=mask_T, offset_N1=torch.tensor([0, 5, 8]))
    torch.testing.assert_close(tool.loss_T[mask_T], fixture_loss(loss).loss_T)


def test_the_dual_clip_caps_the_reshaped_advantage() -> None:
    advantage_T = tensor([-1.0, -1.0])
    entropy_T = tensor([0.0, 2.0])
    loss = replace(unit(PPO), dual=3.0, reshape=(EntropyZ(0.2),))
    old_T = tensor([-4.0, -4.0])
    result = policy_loss(
        tensor([-1.0, -1.0]),
        entropy_T,
        loss=loss,
        per_token=True,
        old_logprob_T=old_T,
        advantage_T=advantage_T,
    )
    near(result.loss_T, [3 * (1 - 0.2 / math.sqrt(2)), 3 * (1 + 0.2 / math.sqrt(2))])


@pytest.mark.parametrize("of", ["seq_prod", "cum_prod", "seq_geo", "cum_geo"])
def test_products_of_ratios_do_not_overflow(of: Any) -> None:
    logprob_T = tensor([-0.1] * 2000).requires_grad_()
    old_T = tensor([-30.0] * 2000)
    result = policy_loss(
        logprob_T,
        logprob_T.detach(),
        loss=replace(PPO, ratio=Ratio(of), bounds=Clip(0.2, math.inf), aggregate=TokenMean()),
        old_logprob_T=old_T,
        advantage_T=torch.ones(2000, dtype=torch.float64),
        offset_N1=torch.tensor([0, 2000]),
    )
    assert result.ratio_max == pytest.approx(math.exp(10))
    assert math.isfinite(result.loss.item())
    assert result.logprob_grad_T.tolist()[-1] == 0  # clamped: no gradient


def test_a_weight_multiplies_the_clipped_loss_and_not_the_ratio() -> None:
    loss = replace(unit(PPO), behaviour=TIS(1.05))
    near(
        fixture_loss(loss).loss_T,
        [-1.127497, -0.778801, -0.982477, -1.020201, 0.760063, 0.523988, 1.079887],
    )
    assert fixture_loss(loss).clipped_high == fixture_loss(unit(PPO)).clipped_high == 1 / 7
    w = [1.080375, 1.007335, 0.867021, 1.058982, 1.111931, 0.867021, 1.007335]
    np.testing.assert_allclose(TIS(1.05, normalize=True)(core(), LossState()), w, atol=1e-6)


def test_a_filtered_token_of_the_proxy_makes_no_nan() -> None:
    proxy_T = COLUMNS["proxy_logprob_T"].clone()
    proxy_T[5] = -math.inf  # the least probable of A < 0: selected by rank, but noise
    loss = replace(PRESETS["lp_reg"](), penalties=(Penalty(1.0, "k3", "proxy", Improbable(0.7)),))
    for estimator in ("k1", "abs", "k2", "k3", "k3+"):
        of = replace(loss, penalties=(Penalty(1.0, estimator, "proxy", Improbable(0.7)),))  # type: ignore[arg-type]
        result = fixture_loss(of, proxy_logprob_T=proxy_T)
        assert math.isfinite(result.loss.item())
        assert torch.isfinite(result.logprob_grad_T).all()
    unprotected = fixture_loss(unit(loss), proxy_logprob_T=proxy_T)
    near(unprotected.loss_T[5:6], [0.359463])
    near(unprotected.logprob_grad_T[5:6], [0.359463])


def test_on_the_first_step_kl_cov_does_nothing() -> None:
    on_policy = {"logprob_T": COLUMNS["old_logprob_T"]}
    result = fixture_loss(unit(PRESETS["kl_cov"]()), **on_policy)
    near(result.logprob_grad_T, (-COLUMNS["advantage_T"]).tolist())


def test_rewards_of_entrocraft_are_signs() -> None:
    band = EntropyBand()
    assert band.band(0.25) == pytest.approx((0.55, 0.65))
    assert EntropyBand(cosine=True).band(0.25) == pytest.approx((0.570711, 0.670711), abs=1e-6)
    """0/1 rewards, of which the branch without positive ones is all zeros, are refused."""
    signs = tensor([1.0, 1, -1, -1, 1, -1, -1])
    above = band(core(reward_T=signs), LossState())
    below = EntropyBand((9, 9), (10, 10))(core(reward_T=signs), LossState())
    between = EntropyBand((0, 0), (10, 10))(core(reward_T=signs), LossState())
    assert above.tolist() == [1, 1, 0, 0, 1, 0, 0]
    assert below.tolist() == [0, 0, -1, -1, 0, -1, -1]
    assert between.tolist() == COLUMNS["advantage_T"].tolist()
    with pytest.raises(ValueError, match="EntropyBand: expected rewards of -1 or 1, got 0 at 2"):
        band(core(reward_T=signs.clamp(min=0)), LossState())


def test_scores_of_clip_b_and_clip_v_are_the_published_ones() -> None:
    assert ClipB(2.5)(core(), LossState()).all()
    assert ClipB(0.5)(core(), LossState()).tolist() == [True] * 5 + [False] * 2
    p = tensor([2.0, 1.0, 0.5, 0.0, -1.0, -4.0]).softmax(0)
    chosen = p.log()[torch.tensor([0, 2, 4, 1])]
    entropy = float(-(p * p.log()).sum())
    four = {
        "advantage_T": tensor([-1.0, -1.0, 1.0, -1.0]),
        "old_logprob_T": chosen,
        "entropy_T": tensor([entropy] * 4),
        "sum_p2_T": tensor([float((p**2).sum())] * 4),
        "sum_p2_logp_T": tensor([float((p**2 * p.log()).sum())] * 4),
    }
    columns = LossColumns(four)
    assert ClipV(1.2, 1.0)(columns, LossState()).tolist() == [True, False, True, False]
    assert ClipV(1.2, 0.25)(columns, LossState()).tolist() == [True, False, True, True]
    assert ClipV(8.5)(columns, LossState()).all()


def test_dropped_tokens_leave_the_denominator_only_where_they_shrink_it() -> None:
    keep = TopEntropy(0.2)
    near(fixture_loss(replace(PPO, keep=(keep,))).loss_T, [0, 0, -1.2, 0, 0, 0.64, 0])
    shrunk = fixture_loss(replace(PPO, keep=(replace(keep, shrink=True),))).loss.item()
    constant = fixture_loss(replace(PPO, keep=(replace(keep, shrink=False),))).loss.item()
    assert shrunk == pytest.approx(-0.56 / 2)
    assert constant == pytest.approx(-0.56 / 7)
    # The published one divides by all tokens: else it would learn 1 / share times as fast.
    assert fixture_loss(PRESETS["top_entropy"]()).loss.item() == constant
    half = TopEntropy(0.5)(core(), LossState())
    assert half.tolist() == [False, True, True, False, True, True, False]


def test_far_responses_of_positive_advantage_stay() -> None:
    far = COLUMNS["old_logprob_T"] + 20.0
    keep = NearGenerator(50.0)
    assert keep(core(rollout_logprob_T=far), LossState()).tolist() == [True] * 4 + [False] * 3
    assert keep(core(), LossState()).all()


def test_mismatch_statistics_are_the_published_ones() -> None:
    def kept(statistic: Any, level: Any, low: float, high: float) -> list[bool]:
        keep = Matched(low, high, statistic, level)
        return [bool(x) for x in keep(core(), LossState())[[0, 4]]]

    assert kept("rho", "seq_sum", 0.79, 0.80) == [True, False]  # products .794534 and .818731
    assert kept("rho", "seq_mean", 0.94, 0.95) == [True, False]  # means .944122 and .935507
    assert kept("k3", "seq_sum", 0.0201, 0.0202) == [True, False]  # sums .020162 and .021231
    assert kept("k3", "seq_mean", 0.0070, 0.0071) == [False, True]  # means .005040 and .007077


def test_dcpo_blends_by_the_share_of_rewards() -> None:
    advantage_T = Blend()(core(reward_T=NOUGHT_OR_ONE_T), LossState(entropy=0.3))
    expected = [0.969788, 0.976785, 1.058310, 0.979683] + [-0.666667] * 3
    np.testing.assert_allclose(advantage_T, expected, atol=1e-6)
    without = Blend()(core(reward_T=torch.zeros(7)), LossState(entropy=0.3))
    assert without.tolist() == COLUMNS["advantage_T"].tolist()  # nothing to divide by


def test_random_choices_are_a_function_of_seed_and_token() -> None:
    columns = {
        "advantage_T": torch.ones(400, dtype=torch.float64),
        "old_logprob_T": -torch.rand(400, generator=torch.Generator().manual_seed(1)).double(),
    }
    columns["advantage_T"][::2] = -1
    keep = ClipCov(-1.0, 1.0, 0.25)

    def kept(seed: int, tokens: int = 400) -> Tensor:
        held = {k: v[:tokens] for k, v in columns.items()}
        core = LossColumns(held | {"logprob_T": held["old_logprob_T"]})
        return keep(core, LossState(seed=seed))

    assert int((~kept(1)).sum()) == 100
    assert torch.equal(kept(1), kept(1))
    assert not torch.equal(kept(1), kept(2))


def test_ctpo_has_the_published_bounds_on_a_gentler_batch() -> None:
    old_T = COLUMNS["old_logprob_T"]
    close = {"logprob_T": old_T + (COLUMNS["logprob_T"] - old_T) / 20}
    loss = replace(PRESETS["ctpo"](), behaviour=None)
    result = fixture_loss(unit(loss), **close)
    near(
        result.loss_T,
        [-1.005013, -0.995012, -1.020201, -1.021222, 0.796010, 0.772210, 0.778300],
    )
    near(result.logprob_grad_T[5:6], [0.0])
    tight = replace(loss, bounds=replace(loss.bounds, low=0.01, high=0.01, dual=0.01))  # type: ignore[type-var]
    near(
        fixture_loss(unit(tight), **close).logprob_grad_T,
        [-1.005013, -0.995012, 0, 0, 0.796010, 0, 0],
    )
    shrinking = replace(loss.bounds, power=-0.5)  # type: ignore[type-var]
    mean: Loss = replace(loss, ratio=Ratio("cum_geo"), bounds=shrinking)
    near(
        fixture_loss(unit(mean), **close).logprob_grad_T,
        [-1.005013, -0.997503, -1.006689, -1.005264, 0.796010, 0, 0.792700],
    )


def test_a_dual_bound_of_zero_is_a_cap_of_one() -> None:
    bounds = PositionClip(low=5.0, high=5.0, dual=0.0)
    loss = replace(PPO, ratio=Ratio("cum_prod"), bounds=bounds)
    result = fixture_loss(loss, logprob_T=COLUMNS["old_logprob_T"] + 0.1)
    near(result.loss_T[4:], [0.8] * 3)
    assert result.clipped_dual == pytest.approx(3 / 7)
