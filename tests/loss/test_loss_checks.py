"""A loss that cannot be meant is refused where it is made, or before anything is overwritten."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from policy_fixture import COLUMNS, PPO, RESPONSES, STATE, fixture_loss
from torch import Tensor

from pyrl import _core
from pyrl._core.loss import Scan
from pyrl.loss import (
    KL,
    TIS,
    BinaryKL,
    ClampedLogp,
    Clip,
    EntropyClip,
    IcePop,
    Loss,
    MaskedLogp,
    Matched,
    NucleusAnchor,
    Penalty,
    PositionClip,
    Range,
    Ratio,
    Sigmoid,
    SoftClipped,
    Steer,
    TopCovariance,
    TopEntropy,
)
from pyrl.loss.columns import LossColumns
from pyrl.loss.fused import fused_policy_loss, linear_policy_loss
from pyrl.loss.presets import PRESETS
from pyrl.loss.spec import TOKEN_COLUMNS, lower
from pyrl.loss.terms import loss_terms


def with_ratio(*values: Any) -> Loss:
    return replace(PPO, ratio=Ratio(*values))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: KL(math.nan), "KL.coef: expected a number, got nan"),
        (lambda: Loss(entropy=math.inf), "Loss.entropy: expected a number, got inf"),
        (lambda: Loss(dual=1.0), "loss.dual: expected > 1, got 1.0"),
        (lambda: Clip(-0.1, 0.2), "Clip.low: expected >= 0, got -0.1"),
        (lambda: Clip(0.1, math.nan), "Clip.high: expected >= 0, got nan"),
        (lambda: EntropyClip(-0.5), "EntropyClip.low: expected >= 0, got -0.5"),
        (lambda: Range(2.0, 1.0), "Range: expected low <= high, got 2.0 and 1.0"),
        (lambda: BinaryKL(-0.1), "BinaryKL: expected low <= high, got 0.0 and -0.1"),
        (lambda: PositionClip(low=math.nan), "PositionClip.low: expected a number, got nan"),
        (lambda: PositionClip(power=0.0), "PositionClip.power: expected a number other than 0"),
        (
            lambda: Ratio("one", pre_clip=0.1),
            "Ratio.pre_clip: expected > 0, and a ratio of responses",
        ),
        (
            lambda: Ratio("token", pre_clip=0.1),
            "Ratio.pre_clip: expected > 0, and a ratio of responses",
        ),
        (
            lambda: Ratio("seq_geo", pre_clip=-0.4),
            "Ratio.pre_clip: expected > 0, and a ratio of responses",
        ),
        (lambda: MaskedLogp(-1.0), "MaskedLogp.cap: expected >= 0, got -1.0"),
        (lambda: SoftClipped(low=-0.5), "SoftClipped.low: expected >= 0, got -0.5"),
        (lambda: Sigmoid(positive=0.0), "Sigmoid: expected tau > 0, got 0.0 and 1.05"),
        (lambda: Steer(least=0.0), "Steer: expected 0 < least <= most, got 0.0"),
        (lambda: TIS(cap=-2.0), "TIS: expected low <= high, got 0.0 and -2.0"),
        (lambda: TIS(floor=-1.0), "TIS.floor: expected >= 0, got -1.0"),
        (lambda: IcePop(5.0, 0.5), "IcePop: expected low <= high, got 5.0 and 0.5"),
        (lambda: Matched(2.0, 0.5), "Matched: expected low <= high, got 2.0 and 0.5"),
        (lambda: with_ratio("seq_mean"), "Ratio.of: expected one of one, token, seq_geo"),
        (lambda: with_ratio("token", "ref"), "Ratio.to: expected one of old, rollout, got 'ref'"),
        (lambda: replace(PPO, trust="rollout"), "Loss.trust: expected one of ratio, old, got"),
        (lambda: replace(PPO, kl=KL(0.1, "k4")), "KL.estimator: expected one of k1, abs, k2"),
        (lambda: replace(PPO, behaviour=TIS(level="seq")), "TIS.level: expected one of token"),
        (lambda: replace(PPO, surrogate=ClampedLogp), "Loss.surrogate: expected an instance of"),
        (lambda: replace(PPO, bounds=0.2), "Loss.bounds: expected an instance of Clip, Unbounded"),
        (lambda: replace(PPO, keep=(TopEntropy,)), "Loss.keep: expected an instance of Keep, got"),
        (lambda: replace(PPO, weight=2.0), "Loss.weight: expected an instance of Factor, got 2.0"),
        (lambda: replace(PPO, keep=(TopEntropy(1.5),)), "TopEntropy.share: expected a number in"),
        (lambda: replace(PPO, keep=(TopEntropy(-1),)), "TopEntropy.share: expected a number in"),
        (
            lambda: replace(PPO, penalties=(NucleusAnchor(quantile=-0.5),)),
            "NucleusAnchor.quantile: expected a number in [0, 1], got -0.5",
        ),
        (
            lambda: replace(PPO, penalties=(Penalty(select=TopCovariance(5)),)),
            "TopCovariance.share: expected a number in [0, 1], got 5",
        ),
        (
            lambda: replace(PRESETS["hispo"](), behaviour=TIS()),
            "loss.behaviour: expected None where Ratio.to is 'rollout'",
        ),
    ],
)
def test_a_loss_that_cannot_be_meant_is_refused(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()


def test_every_preset_and_axes_of_ones_own_pass() -> None:
    @dataclass(frozen=True)
    class Half:
        share: float = 0.5

        def __call__(self, columns: Any, state: Any) -> Tensor:
            return torch.full((7,), self.share, dtype=torch.float64)

    for preset in PRESETS.values():
        assert replace(preset(), weight=Half()).weight == Half()
    whole, half = fixture_loss(PPO), fixture_loss(replace(PPO, weight=Half()))
    assert half.loss.item() == whole.loss.item() / 2
    assert fixture_loss(replace(PPO, weight=Half().__call__)).loss.equal(half.loss)
    with pytest.raises(ValueError, match=r"Half\.share: expected a number in \[0, 1\], got 2"):
        replace(PPO, weight=Half(2))


def test_the_core_refuses_what_would_be_read_out_of_bounds() -> None:
    for choose in (TopEntropy, TopCovariance):
        for share in (-1.0, 1e9, math.nan):
            with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
                choose(share)(LossColumns(COLUMNS), STATE)
    given: list[Any] = [None] * len(TOKEN_COLUMNS)
    given[0] = given[2] = given[5] = COLUMNS["logprob_T"].numpy()
    sequence = lower(with_ratio("seq_geo"), has_reference=False).spec.kernel_arguments()
    with pytest.raises(ValueError, match="scan: expected one for a ratio along a response"):
        _core.loss.policy_loss(
            columns=given, mask_T=None, offset_N1=np.array([0, 7]), weight_N=np.ones(1),
            spec=sequence["spec"], scan=Scan.none, position=sequence["position"], loss_T=None,
            logprob_grad_T=None, entropy_grad_T=None,
        )  # fmt: skip


# -- of the mini-batch --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_T": torch.ones(7).double()}, "mask_T: expected bool with one axis, got float64[7]"),
        ({"mask_T": torch.ones(1, 7) > 0}, "mask_T: expected bool with one axis, got bool[1, 7]"),
        ({"offset_N1": torch.tensor([0, 7]).int()}, "offset_N1: expected int64 with one axis, got"),
        (
            {"group_N": torch.tensor([[0, 0]])},
            "group_N: expected int64 with one axis, got int64[1, 2]",
        ),
        ({"columns": {}}, "loss_terms: needs the column advantage_T"),
    ],
)
def test_terms_say_what_was_expected(changes: dict[str, Any], message: str) -> None:
    given = {"columns": {"advantage_T": torch.ones(7)}, "offset_N1": torch.tensor([0, 4, 7])}
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_terms(PPO, **(given | changes))


def test_terms_have_their_own_mask_and_state() -> None:
    terms = loss_terms(PPO, {"advantage_T": COLUMNS["advantage_T"]})
    for name, value in {
        "mask_T": torch.ones(7, dtype=torch.bool), "state": STATE, **RESPONSES,
    }.items():  # fmt: skip
        given = {"offset_N1": None, "group_N": None, "state": None} | {name: value}
        with pytest.raises(ValueError, match=f"{name}: expected None with terms, which have"):
            fixture_loss(PPO, terms=terms, **given)


def test_bands_of_entropy_need_rewards_that_are_signs() -> None:
    """Of 0/1 rewards the branch without positive ones would be all zeros."""
    mask_T, reward_T = torch.tensor([True] * 4 + [False] * 3), COLUMNS["reward_T"].clamp(min=0)
    with pytest.raises(ValueError, match="EntropyBand: expected rewards of -1 or 1, got 0 at 4"):
        fixture_loss(PRESETS["entrocraft"](), reward_T=reward_T)
    fixture_loss(PRESETS["entrocraft"](), reward_T=reward_T, mask_T=mask_T)


# -- of logits --


def rows() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    logits_TV = torch.randn(7, 11, generator=torch.Generator().manual_seed(3))
    columns = {k: COLUMNS[k] for k in ("advantage_T", "old_logprob_T")}
    return logits_TV, torch.arange(7), columns


@pytest.mark.parametrize(
    "returned",
    [
        *(torch.full((n,), 2.0, dtype=torch.float64) for n in (1, 8)),
        *(torch.full((7,), 2, dtype=dtype) for dtype in (torch.int64, torch.float16)),
        torch.ones(7, 1, dtype=torch.float64),
    ],
)
def test_nothing_is_overwritten_for_a_factor_of_another_shape(returned: Tensor) -> None:
    logits_TV, label_T, columns = rows()
    leaf_TV = logits_TV.clone().requires_grad_()
    whole_TV = leaf_TV * 1
    loss = replace(PPO, weight=lambda columns, state: returned)
    with pytest.raises(ValueError, match=r"expected it to return float64\[7\], got"):
        fused_policy_loss(whole_TV, label_T, loss=loss, inplace=True, **columns)
    assert whole_TV.equal(logits_TV)
    terms = replace(loss_terms(PPO, {"advantage_T": torch.ones(7)}), factor_T=returned)
    with pytest.raises(ValueError, match=r"factor_T: expected float32\[7\] or float64\[7\], got"):
        fused_policy_loss(
            whole_TV, label_T, loss=PPO, inplace=True, terms=terms,
            old_logprob_T=columns["old_logprob_T"],
        )  # fmt: skip
    assert whole_TV.equal(logits_TV)


@pytest.mark.parametrize(
    "mask_T",
    [torch.ones(1, dtype=torch.bool), torch.ones(7), torch.ones(7, 1, dtype=torch.bool)],
)
def test_masks_are_not_broadcast(mask_T: torch.Tensor) -> None:
    logits_TV, label_T, columns = rows()
    with pytest.raises(ValueError, match=r"mask_T: expected torch.bool\[7\], got torch\."):
        fused_policy_loss(logits_TV, label_T, loss=PPO, mask_T=mask_T, **columns)
    with pytest.raises(ValueError, match=r"mask_T: expected torch.bool\[7\], got torch\."):
        linear_policy_loss(logits_TV, torch.eye(11), label_T, loss=PPO, mask_T=mask_T, **columns)


@pytest.mark.parametrize("name", ["top_entropy", "hapo", "clip_cov", "dcpo"])
def test_what_is_unknown_before_the_rows_asks_for_terms(name: str) -> None:
    logits_TV, label_T, columns = rows()
    given = {k: v for k, v in COLUMNS.items() if k not in ("logprob_T", "entropy_T")}
    with pytest.raises(ValueError, match=r"needs .*expected terms=pyrl\.loss\.terms"):
        fused_policy_loss(
            logits_TV, label_T, loss=PRESETS[name](), offset_N1=RESPONSES["offset_N1"], **given
        )
    with pytest.raises(TypeError, match="unexpected column 'entropy_T': expected some of adv"):
        fused_policy_loss(logits_TV, label_T, loss=PPO, entropy_T=COLUMNS["entropy_T"], **columns)
