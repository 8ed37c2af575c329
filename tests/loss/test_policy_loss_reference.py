"""Every preset against the slow reference, on ragged responses with masks; numeric gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import reference_loss
from policy_reference_axes import Batch
from torch import Tensor

from pyrl.loss import (
    KL,
    TIS,
    ClampedLogp,
    ClipB,
    ClipCov,
    ClipV,
    CovarianceBonus,
    EntropyFilter,
    Improbable,
    Loss,
    LossState,
    MaskedLogp,
    Matched,
    NearGenerator,
    Penalty,
    Ratio,
    SignFilter,
    Steer,
    SurprisalBand,
    TopCovariance,
)
from pyrl.loss.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, TokenMean
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import PRESETS, ppo

STATE = LossState(seed=7, entropy=0.6, mean_entropy=0.6, nucleus_entropy=0.3, progress=0.5)
# Shares and thresholds that choose tokens even of a few.
LOSSES: dict[str, Loss] = {name: preset() for name, preset in PRESETS.items()} | {
    "ratio seq_prod": replace(ppo(), ratio=Ratio("seq_prod")),
    "pre-clip, masked": replace(
        ppo(), ratio=Ratio("seq_geo", pre_clip=0.2), surrogate=MaskedLogp(5.0)
    ),
    "pre-clip, clamped": replace(
        ppo(), ratio=Ratio("cum_prod", pre_clip=0.2), surrogate=ClampedLogp()
    ),
    "ratio cum_geo": replace(ppo(), ratio=Ratio("cum_geo")),
    "k3+ penalty": replace(ppo(), penalties=(Penalty(0.3, "k3+", "old"),)),
    "kl and entropy": replace(ppo(), kl=KL(0.2), entropy=0.1, aggregate=SeqMeanTokenMean()),
    "normalised TIS": replace(ppo(), behaviour=TIS(1.02, normalize=True)),
    "normalised responses": replace(ppo(), behaviour=TIS(1.1, "sequence", normalize=True)),
    "clip_cov": replace(
        ppo(), keep=(ClipCov(-0.1, 5.0, 0.3),), bounds=PRESETS["clip_cov"]().bounds
    ),
    "clip_b": replace(ppo(), keep=(ClipB(0.5),), aggregate=SeqMeanTokenMean()),
    "clip_v": replace(ppo(), keep=(ClipV(0.2, 0.3),), aggregate=SeqMeanTokenSum()),
    "kl_cov": replace(ppo(), penalties=(Penalty(0.5, "abs", "old", TopCovariance(0.3)),)),
    "lp_reg": replace(ppo(), penalties=(Penalty(1.0, "k3", "proxy", Improbable(0.6)),)),
    "matched k3": replace(ppo(), keep=(Matched(0.0, 0.05, "k3", "seq_max"),)),
    "matched k1": replace(ppo(), keep=(Matched(-0.3, 0.3, "k1", "seq_sum", shrink=False),)),
    "filter": replace(ppo(), keep=(EntropyFilter((0.7, 0.7), (0.8, 0.8)),)),
    "near": replace(ppo(), keep=(NearGenerator(0.05),)),
    "steer exp": replace(ppo(), weight=Steer("exp")),
    "surprisal below": replace(ppo(), penalties=(SurprisalBand(0.3, 2.0, 3.0),)),
    "bounded bonus": replace(ppo(), penalties=(CovarianceBonus(0.3, 2.0, 0.8),)),
    "sign": replace(ppo(), reshape=(SignFilter("negative"),)),
}


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    length = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tokens = sum(length)

    def numbers(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(tokens, generator=generator, dtype=torch.float64)

    leaf_T = torch.repeat_interleave(torch.tensor(length))
    leaf_N = torch.randn(len(length), generator=generator, dtype=torch.float64)
    old = -numbers().abs() - 0.01
    columns = {
        "logprob_T": -(old + numbers(0.3)).abs() - 0.01,
        "entropy_T": numbers().abs() + 0.01,
        "nucleus_entropy_T": numbers().abs(),
        "old_logprob_T": old,
        "rollout_logprob_T": old + numbers(0.1),
        "ref_logprob_T": old + numbers(0.3),
        "proxy_logprob_T": old + numbers(0.3),
        "expert_logprob_T": old + numbers(0.3),
        "second_logprob_T": old + numbers(0.3),
        "advantage_T": leaf_N[leaf_T],
        "reward_T": leaf_N.sign()[leaf_T],
        "sum_p2_T": numbers().abs(),
        "sum_p2_logp_T": -numbers().abs(),
    }
    mask_T = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    return columns, torch.tensor([0, *length]).cumsum(0), mask_T, torch.tensor(length)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_value_and_gradients_are_the_references(
    name: str, problem: tuple[dict[str, Tensor], Tensor, Tensor, Tensor]
) -> None:
    columns, offset_N1, mask_T, length = problem
    loss, group = LOSSES[name], [n % 2 for n in range(len(length))]
    inputs = [
        columns[k].clone().requires_grad_() for k in ("logprob_T", "entropy_T", "nucleus_entropy_T")
    ]
    changed = {**columns, "nucleus_entropy_T": inputs[2]}
    del changed["logprob_T"], changed["entropy_T"]
    result = policy_loss(
        inputs[0],
        inputs[1],
        loss=loss,
        mask_T=mask_T,
        offset_N1=offset_N1,
        group_N=torch.tensor(group),
        state=STATE,
        **changed,
    )
    ours = torch.autograd.grad(result.loss, inputs, allow_unused=True)
    leaf = torch.repeat_interleave(length).tolist()
    again = [x.detach().clone().requires_grad_() for x in inputs]
    names = ("logprob_T", "entropy_T", "nucleus_entropy_T")
    whole = columns | dict(zip(names, again, strict=True))
    whole["ref_T"] = whole["ref_logprob_T"]
    rows = mask_T.nonzero()[:, 0]
    batch = Batch(
        {k: v[rows] for k, v in whole.items()},
        [leaf[t] for t in rows.tolist()],
        rows.tolist(),
        group,
        STATE,
    )
    expected = reference_loss(loss, batch)
    torch.testing.assert_close(result.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    theirs = (
        torch.autograd.grad(expected, again, allow_unused=True)
        if expected.requires_grad
        else [None] * 3
    )
    for a, b, x in zip(ours, theirs, inputs, strict=True):
        zero = torch.zeros_like(x)
        torch.testing.assert_close(
            zero if a is None else a, zero if b is None else b, rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("name", ["ppo", "dual", "sapo", "ce_gppo", "epo", "calibrl", "dro"])
def test_gradcheck_passes_away_from_the_corners(name: str) -> None:
    """Of losses whose gradient is that of their value: no ratio of several tokens, no weight."""
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(30, generator=generator, dtype=torch.float64) - 0.1
    logprob = old + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
    advantage = torch.randn(30, generator=generator, dtype=torch.float64)
    loss = replace(PRESETS[name](), aggregate=TokenMean())

    def value(logprob_T: Tensor, entropy_T: Tensor) -> Tensor:
        return policy_loss(
            logprob_T,
            entropy_T,
            loss=loss,
            old_logprob_T=old,
            expert_logprob_T=old + 0.05,
            reward_T=(advantage > 0).double(),
            advantage_T=advantage,
            state=STATE,
        ).loss

    entropy = torch.rand(30, generator=generator, dtype=torch.float64) + 3.0
    inputs = (logprob.requires_grad_(), entropy.requires_grad_())
    if loss.surrogate == PRESETS["ce_gppo"]().surrogate:
        inputs[0].data = old + 0.1  # inside: outside the gradient is a constant times the bound's
    assert torch.autograd.gradcheck(value, inputs)
