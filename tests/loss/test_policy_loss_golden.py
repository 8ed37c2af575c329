"""Published values of each preset on two responses: loss, loss per token, gradient per token.

Parameters that differ from the presets' are in the table beside the numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_fixture import NOUGHT_OR_ONE_T, fixture_loss, near, unit

from pyrl.loss import TIS, Clip, IcePop, Improbable, Loss, Matched, Penalty, SoftClipped, Steer
from pyrl.loss.aggregate import SeqMeanTokenSumNorm
from pyrl.loss.presets import PRESETS


def preset(name: str) -> Loss:
    return PRESETS[name]()


LOSSES: dict[str, Loss] = {
    "ppo": preset("ppo"),
    "clip_higher": preset("dapo"),
    "dual": replace(preset("dual"), dual=1.4),
    "cispo": replace(preset("cispo"), bounds=Clip(0.2, 0.2)),
    "cispo_up": preset("cispo"),
    "gspo": replace(preset("gspo"), bounds=Clip(0.2, 0.2)),
    "gspo_real": preset("gspo"),
    "gmpo": preset("gmpo"),
    "clip_cov": preset("clip_cov"),
    "kl_cov": preset("kl_cov"),
    "steer_lin": replace(preset("steer"), bounds=Clip(0.2, 0.28)),
    "steer_exp": replace(preset("steer"), weight=Steer("exp")),
    "aepo_agentic": preset("aepo_agentic"),
    "ce_gppo": replace(preset("ce_gppo"), surrogate=SoftClipped(0.25, 1.0)),
    "ctpo": replace(preset("ctpo"), behaviour=None),
    "minpro_ppo": preset("minpro"),
    "minpro_cispo": preset("minpro_cispo"),
    "tis_tok": replace(preset("tis"), behaviour=TIS(1.05)),
    "tis_seq": replace(preset("tis_sequence"), behaviour=TIS(1.05, "sequence")),
    "icepop": replace(preset("icepop"), behaviour=IcePop(0.85, 1.1)),
    "hispo": replace(
        preset("hispo"),
        dual=1.3,
        keep=(
            Matched(0.9, 1.1, "rho", "seq_mean", shrink=False),
            Matched(0.88, 1.12, "rho", "token", shrink=False),
        ),
        aggregate=SeqMeanTokenSumNorm(4),
    ),
    "minirl": preset("minirl"),
    "dcpo": preset("dcpo"),
    "lpreg": replace(preset("lp_reg"), penalties=(Penalty(1.0, "k3", "proxy", Improbable(0.7)),)),
    "calibrl": preset("calibrl"),
    "sapo": preset("sapo"),
    "dppo": preset("dppo"),
    "reinforce": preset("reinforce"),
}

GOLDEN: dict[str, tuple[float, list[float], list[float]]] = {
    "ppo": (
        -0.234997,
        [-1.105171, -0.818731, -1.2, -1.020201, 0.72387, 0.64, 1.135254],
        [-1.105171, -0.818731, 0.0, -1.020201, 0.72387, 0.0, 1.135254],
    ),
    "clip_higher": (
        -0.246426,
        [-1.105171, -0.818731, -1.28, -1.020201, 0.72387, 0.64, 1.135254],
        [-1.105171, -0.818731, 0.0, -1.020201, 0.72387, 0.0, 1.135254],
    ),
    "dual": (
        -0.237176,
        [-1.105171, -0.818731, -1.2, -1.020201, 0.72387, 0.64, 1.12],
        [-1.105171, -0.818731, 0.0, -1.020201, 0.72387, 0.0, 0.0],
    ),
    "cispo": (
        0.178570,
        [0.552585, 0.982477, 2.4, 0.10202, -0.579096, -1.92, -0.288],
        [-1.105171, -0.818731, -1.2, -1.020201, 0.72387, 0.64, 0.96],
    ),
    "cispo_up": (
        0.298800,
        [0.552585, 0.982477, 2.4, 0.10202, -0.579096, -1.07839, -0.288],
        [-1.105171, -0.818731, -1.2, -1.020201, 0.72387, 0.359463, 0.96],
    ),
    "gspo": (
        -0.222359,
        [-1.110711, -1.110711, -1.110711, -1.110711, 0.665992, 0.665992, 0.665992],
        [-1.110711, -1.110711, -1.110711, -1.110711, 0.665992, 0.665992, 0.665992],
    ),
    "gspo_real": (
        -0.100320,
        [-1.0004, -1.0004, -1.0004, -1.0004, 0.79976, 0.79976, 0.79976],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ),
    "gmpo": (
        -0.161152,
        [-1.083287, -1.083287, -1.083287, -1.083287, 0.760984, 0.760984, 0.760984],
        [-1.083287, -1.083287, 0.0, -1.083287, 0.760984, 0.0, 0.760984],
    ),
    "clip_cov": (
        -0.390529,
        [-1.105171, -0.818731, -1.648721, -1.020201, 0.72387, 0.0, 1.135254],
        [-1.105171, -0.818731, -1.648721, -1.020201, 0.72387, 0.0, 1.135254],
    ),
    "kl_cov": (
        -0.224891,
        [-1.105171, -0.818731, -1.648721, -1.020201, 0.72387, 1.159463, 1.135254],
        [-1.105171, -0.818731, -1.648721, -1.020201, 0.72387, -0.640537, 1.135254],
    ),
    "steer_lin": (
        -0.205356,
        [-1.069112, -0.794853, -1.024, -1.224242, 0.759487, 0.720889, 1.194341],
        [-1.069112, -0.794853, 0.0, -1.224242, 0.759487, 0.0, 1.194341],
    ),
    "steer_exp": (
        -0.201130,
        [-0.964513, -0.715816, -1.024, -1.004815, 0.659196, 0.606681, 1.035355],
        [-0.964513, -0.715816, 0.0, -1.004815, 0.659196, 0.0, 1.035355],
    ),
    "aepo_agentic": (
        -0.220483,
        [-0.990233, -0.845339, -1.430099, -0.774843, 0.681524, 0.85008, 0.965534],
        [-0.990233, -0.845339, -1.430099, -0.774843, 0.681524, 0.0, 0.965534],
    ),
    "ce_gppo": (
        -0.303568,
        [-1.105171, -0.818731, -1.2, -1.020201, 0.72387, 0.16, 1.135254],
        [-1.105171, -0.818731, -1.2, -1.020201, 0.72387, 0.16, 1.135254],
    ),
    "ctpo": (
        -0.261884,
        [-1.051271, -0.904837, -1.090463, -1.105171, 0.780248, 0.77221, 0.766098],
        [0.0, -0.904837, 0.0, 0.0, 0.0, 0.0, 0.0],
    ),
    "minpro_ppo": (
        -0.291630,
        [-1.105171, -0.904837, -1.2, -0.83527, 0.72387, 0.64, 0.64],
        [-1.105171, -0.904837, 0.0, -0.83527, 0.72387, 0.0, 0.0],
    ),
    "minpro_cispo": (
        0.344860,
        [0.552585, 1.085805, 2.4, 0.083527, -0.579096, -0.975767, -0.153031],
        [-1.105171, -0.904837, -1.2, -0.83527, 0.72387, 0.325256, 0.510103],
    ),
    "tis_tok": (
        -0.220720,
        [-1.127497, -0.778801, -0.982477, -1.020201, 0.760063, 0.523988, 1.079887],
        [-1.127497, -0.778801, 0.0, -1.020201, 0.760063, 0.0, 1.079887],
    ),
    "tis_seq": (
        -0.178074,
        [-0.878095, -0.650509, -0.95344, -0.810584, 0.592655, 0.523988, 0.929467],
        [-0.878095, -0.650509, 0.0, -0.810584, 0.592655, 0.0, 0.929467],
    ),
    "icepop": (
        -0.155090,
        [-1.127497, -0.778801, 0.0, -1.020201, 0.760984, 0.0, 1.079887],
        [-1.127497, -0.778801, 0.0, -1.020201, 0.760984, 0.0, 1.079887],
    ),
    "hispo": (
        -0.140689,
        [-1.127497, -0.778801, 0.0, -1.020201, 0.760984, 0.0, 1.04],
        [-1.127497, -0.778801, 0.0, -1.020201, 0.760984, 0.0, 0.0],
    ),
    "minirl": (
        0.333788,
        [0.563748, 0.934561, 0.0, 0.10202, -0.608787, 0.0, -0.323966],
        [-1.127497, -0.778801, 0.0, -1.020201, 0.760984, 0.0, 1.079887],
    ),
    "dcpo": (
        -0.294050,
        [-1.071782, -0.799724, -1.269972, -0.999473, 0.603225, 0.533333, 0.946045],
        [-1.071782, -0.799724, 0.0, -0.999473, 0.603225, 0.0, 0.946045],
    ),
    "lpreg": (
        -0.268330,
        [-1.105171, -0.818731, -1.648721, -1.020201, 0.730148, 0.84911, 1.135254],
        [-1.105171, -0.818731, -1.648721, -1.020201, 0.607592, -0.980184, 1.135254],
    ),
    "calibrl": (
        -0.225068,
        [-1.107671, -0.798731, -1.15, -1.030201, 0.73187, 0.62, 1.159254],
        [-1.155171, -0.918731, -0.1, -1.070201, 0.80387, 0.04, 1.215254],
    ),
    "sapo": (
        -0.338649,
        [-2.105074, -1.819225, -2.626889, -2.020201, 1.447743, 1.095149, 1.853757],
        [-1.10212, -0.812042, -1.486739, -1.020097, 0.722066, 0.331017, 1.082028],
    ),
    "dppo": (
        0.419495,
        [0.552585, 0.982477, 3.297443, 0.10202, -0.579096, -1.07839, -0.340576],
        [-1.105171, -0.818731, -1.648721, -1.020201, 0.72387, 0.359463, 1.135254],
    ),
    "reinforce": (
        0.074286,
        [0.5, 1.2, 2.0, 0.1, -0.64, -2.4, -0.24],
        [-1.0, -1.0, -1.0, -1.0, 0.8, 0.8, 0.8],
    ),
}


REWARDS = {"dcpo": {"reward_T": NOUGHT_OR_ONE_T}}


def test_every_published_value_has_a_loss() -> None:
    assert set(LOSSES) == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_are_the_golden_ones(name: str) -> None:
    value, loss_T, _ = GOLDEN[name]
    result = fixture_loss(LOSSES[name], **REWARDS.get(name, {}))
    assert result.loss.item() == pytest.approx(value, abs=1e-6)
    near(result.loss_T, loss_T)


@pytest.mark.parametrize("name", GOLDEN)
def test_gradients_are_the_golden_ones(name: str) -> None:
    result = fixture_loss(unit(LOSSES[name]), **REWARDS.get(name, {}))
    near(result.logprob_grad_T, GOLDEN[name][2])
