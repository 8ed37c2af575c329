"""Methods by name. A method is its parent with some choices replaced."""

from __future__ import annotations

from collections.abc import Callable

from pyrl.algorithm import Algorithm
from pyrl.methods import (
    clipping,
    consensus,
    entropy,
    expert,
    mismatch,
    reinforce,
    sequence,
    shaping,
)
from pyrl.methods.echo import echo, echo_fixed, echo_paper, echo_released
from pyrl.methods.ettrl import ettrl
from pyrl.methods.grpo import dr_grpo, grpo, rloo
from pyrl.methods.treerl import treerl
from pyrl.methods.ttrl import ttrl
from pyrl.methods.unique import grpo_unique, ttrl_unique

METHODS: dict[str, Callable[[], Algorithm]] = {
    method.__name__: method
    for method in (
        *(ttrl, ttrl_unique, ettrl, echo, echo_paper, echo_fixed, echo_released, treerl),
        *(grpo, dr_grpo, rloo, grpo_unique),
        *(reinforce.reinforce, reinforce.reinforce_pp, reinforce.reinforce_pp_baseline),
        *(reinforce.opo, reinforce.gpg),
        *(clipping.dapo, clipping.cispo, clipping.sapo, clipping.dppo, clipping.dppo_kl),
        *(sequence.gspo, sequence.gmpo, sequence.ctpo, sequence.minpro, sequence.minpro_cispo),
        *(mismatch.minirl, mismatch.ftis, mismatch.hispo, expert.calibrl),
        *(entropy.clip_cov, entropy.kl_cov, entropy.steer, entropy.steer_exp, entropy.clip_b),
        *(entropy.clip_v, entropy.top_entropy, entropy.lp_reg, entropy.siren, entropy.hapo),
        *(entropy.dcpo, entropy.epo, entropy.entrocraft, entropy.entrocraft_filter),
        *(entropy.entropic, entropy.aepo, entropy.aepo_agentic),
        *(consensus.empo, consensus.scrl, consensus.ddrl, consensus.ttrl_guard),
        *(consensus.evol_rl, consensus.om_grpo),
        *(shaping.funrl, shaping.empg, shaping.erpo, shaping.progrpo, shaping.g2rpo),
        *(shaping.riskpo, shaping.ares, shaping.d3s, shaping.light_if, shaping.ib_tpo),
        shaping.spear,
    )
}
