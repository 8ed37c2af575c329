"""What shows in the metrics of a run that the idea of a method acted, in runs made for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from pyrl.advantage import grpo
from pyrl.advantage.difficulty import DynamicKL, WindowEntropy
from pyrl.advantage.shaping import StepModulation
from pyrl.algorithm import Algorithm
from pyrl.fork import FixedEntropyConfidence
from pyrl.loss import (
    ClipB,
    ClipCov,
    ClipV,
    EntropySmoothing,
    Improbable,
    Matched,
    NearGenerator,
    Penalty,
)
from pyrl.methods import METHODS
from pyrl.methods.registry import choose
from pyrl.prune import FixedDoubt
from pyrl.replay import Replay
from pyrl.reward import RandomReward
from pyrl.reward.consensus import BalancedReward
from pyrl.reward.guard import GuardedReward
from pyrl.select import WithoutAnswer

CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean")


@dataclass(frozen=True)
class Acting:
    """A method in a short run."""

    metrics: tuple[str, ...]
    """Their sum over the steps says that it acted."""
    most: float = 1.0
    """The idea acted where the mean of the sum is above 0, and below this."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Changes of its loss: numbers that act on a few tokens."""
    choices: dict[str, Any] = field(default_factory=dict)
    """Other changes of the method; rewards are coins unless given."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run."""
    votes: int = 4
    """Answers of a question."""


MATCHED = (
    Matched(0.999, 1.001, level="seq_mean", shrink=False),
    Matched(0.9, 1.1, shrink=False),
)
SIMPLE_TREES = {
    "fork": FixedEntropyConfidence(0.5, 0.1, 0.999, 0.0, cooldown=2),
    "prune": FixedDoubt(confidence_low=0.5),
}

ACTS: dict[str, Acting] = {
    "reinforce": Acting(("sampling/importance_sampling_ratio/max",), most=1.0 + 1e-9),
    "reinforce_pp": Acting(("advantage/whiten_mean",)),
    "reinforce_pp_baseline": Acting(("advantage/whiten_std",)),
    "opo": Acting(("advantage/baseline_shift",)),
    "gpg": Acting(("advantage/informative",), choices={"reward": RandomReward(0.1)}),
    "pass_at_k": Acting(("advantage/pass_at_k",), choices={"reward": RandomReward(0.3)}, votes=8),
    "dapo": Acting(
        (*CLIPPED, "select/refused", "reward/overlong"), most=inf, choices={"reward": None}
    ),
    "cispo": Acting(CLIPPED),
    "sapo": Acting(("sampling/importance_sampling_ratio/max",), most=inf),
    "dppo": Acting(CLIPPED),
    "dppo_kl": Acting(CLIPPED),
    "gspo": Acting(CLIPPED),
    "gmpo": Acting(("sampling/importance_sampling_ratio/max",), most=inf),
    "ctpo": Acting(CLIPPED),
    "minpro": Acting(CLIPPED),
    "minpro_cispo": Acting(CLIPPED),
    "minirl": Acting(CLIPPED),
    "hispo": Acting(("loss/kept",), loss={"keep": MATCHED}, settings={"dtype": "bfloat16"}),
    "ftis": Acting(
        ("loss/kept",), loss={"keep": (NearGenerator(0.001),)}, settings={"dtype": "bfloat16"}
    ),
    "calibrl": Acting(("loss/penalized",)),
    "clip_cov": Acting(("loss/kept",), loss={"keep": (ClipCov(0.1, 9.0),)}),
    "kl_cov": Acting(("loss/penalized",)),
    "steer": Acting(("loss/factor",), most=1.2),
    "steer_exp": Acting(("loss/factor",)),
    "clip_b": Acting(("loss/kept",), loss={"keep": (ClipB(0.5),)}),
    "clip_v": Acting(("loss/kept",), loss={"keep": (ClipV(0.5, 0.2),)}),
    "top_entropy": Acting(("loss/kept",)),
    "lp_reg": Acting(
        ("loss/penalized",), loss={"penalties": (Penalty(1.0, "k3", "proxy", Improbable(0.5)),)}
    ),
    "siren": Acting(("loss/nucleus_gap",)),
    "hapo": Acting(("loss/reshaped",), most=inf),
    "dcpo": Acting(("loss/reshaped",), most=inf),
    "epo": Acting(
        ("loss/outside_band",), loss={"penalties": (EntropySmoothing(low=0.0, high=1.2),)}
    ),
    "entrocraft": Acting(("loss/reshaped",), most=inf, choices={"reward": None}),
    "entrocraft_filter": Acting(("loss/kept",)),
    "entropic": Acting(("advantage/entropic",), choices={"reward": None}),
    "aepo": Acting(("temper/rows",), most=inf),
    "aepo_agentic": Acting(("loss/reshaped",), most=inf),
    "funrl": Acting(("advantage/bonus",)),
    "empg": Acting(
        ("advantage/step_shift",),
        choices={"advantage": (*grpo(), StepModulation(separator="1"))},
    ),
    "erpo": Acting(("advantage/gated",), votes=8),
    "progrpo": Acting(("advantage/confidence_shift",)),
    "g2rpo": Acting(("advantage/rank_max",), most=inf),
    "riskpo": Acting(("advantage/risk_high",), most=inf),
    "ares": Acting(
        ("advantage/places_bonus",), choices={"advantage": (WindowEntropy(words=""), DynamicKL())}
    ),
    "d3s": Acting(("select/leaves", "select/tokens")),
    "light_if": Acting(("loss/weighted_entropy",), most=inf),
    "spear": Acting(
        ("replay/trained",), most=inf, choices={"replay": Replay(4, rise=0.0)}, votes=8
    ),
    "ib_tpo": Acting(("advantage/ib_score",), most=inf, votes=10),
    "empo": Acting(("reward/class_share",), choices={"reward": None}),
    "scrl": Acting(("reward/taken_right", "reward/taken_wrong"), choices={"reward": None}),
    "ddrl": Acting(("reward/dropped",), choices={"reward": BalancedReward(keep=2)}),
    "ttrl_guard": Acting(
        ("reward/guard_weight",), choices={"reward": GuardedReward(trusted=0.0, window=1)}
    ),
    "evol_rl": Acting(("reward/novelty_std",), choices={"reward": None}),
    "om_grpo": Acting(
        ("select/tokens",), choices={"reward": None, "select": WithoutAnswer("number")}
    ),
    "echo_fixed": Acting(("tree/forks", "tree/pruned"), most=inf, choices=SIMPLE_TREES, votes=8),
    "echo_released": Acting(CLIPPED),
}
"""By the name of a method, or of an advantage in the place of GRPO's."""


def acting(name: str) -> Algorithm:
    """The method with the numbers with which it acts."""
    how = ACTS[name]
    method = METHODS[name]() if name in METHODS else choose(METHODS["grpo"](), advantage=name)
    choices = {"reward": RandomReward()} | how.choices
    choices = {kind: choice for kind, choice in choices.items() if choice is not None}
    return replace(method, loss=replace(method.loss, **how.loss), **choices)
