"""Choices by name, a table for each field of a method; losses are in `pyrl.presets`.

A line adds one: its name, and what gives the choice with its defaults. The docstring of that
says what it is and names its source.
"""

from __future__ import annotations

from collections.abc import Callable

from pyrl import advantage, baselines
from pyrl.advantage import AdvantageClip, EntropyReshape, Hybrid, MassBaseline, Stage, WhitenTokens
from pyrl.advantage.difficulty import DynamicKL, WindowEntropy
from pyrl.advantage.information import InformationScore
from pyrl.advantage.ranks import RankNormal
from pyrl.advantage.risk import MixedRisk
from pyrl.advantage.shaping import ConfidenceReweight, EntropyBonus, GatedTokens, StepModulation
from pyrl.baselines import Entropic, LengthBaseline, PassAtK, Return
from pyrl.distilled import Distilled
from pyrl.fork import (
    EntropyConfidence,
    EPTree,
    FixedEntropyConfidence,
    Flat,
    Fork,
    OnlineEntropy,
    Probed,
    RandomTokens,
    TopEntropy,
    WithoutReplacement,
)
from pyrl.judger import Judger
from pyrl.prune import Doubt, FixedDoubt, Keep, Prune
from pyrl.reward import (
    LengthReward,
    OverlongReward,
    RandomReward,
    Reward,
    TrueReward,
    VoteReward,
)
from pyrl.reward.consensus import BalancedReward, FrequencyReward, NoveltyReward, SelectiveReward
from pyrl.reward.guard import GuardedReward
from pyrl.select import (
    DownSample,
    Dynamic,
    First,
    Known,
    Rejection,
    Select,
    Stratified,
    WithoutAnswer,
)
from pyrl.vote import Majority, Mass, Vote, Weighted


def inverse_width() -> Vote:
    """A trunk's leaves share one vote, so that a prefix that forked often does not outvote."""
    return Weighted("inverse_width")


def confidence() -> Vote:
    """A leaf votes with the mean confidence of its last tokens (DeepConf, arXiv:2508.15260)."""
    return Weighted("confidence")


ADVANTAGES: dict[str, Callable[[], Stage | tuple[Stage, ...]]] = {
    "grpo": advantage.grpo,
    "dr_grpo": advantage.dr_grpo,
    "rloo": advantage.rloo,
    "return": Return,
    "reinforce_pp": baselines.reinforce_pp,
    "reinforce_pp_baseline": baselines.reinforce_pp_baseline,
    "opo": LengthBaseline,
    "gpg": baselines.gpg,
    "pass_at_k": PassAtK,
    "entropic": Entropic,
    "treerl": advantage.tree_rl,
    "treerl_released": advantage.tree_rl_released,
    "treepo": advantage.tree_po,
    "tree_grpo": advantage.tree_grpo,
    "mass": MassBaseline,
    "ear": EntropyReshape,
    "ear_clip": AdvantageClip,
    "hybrid": Hybrid,
    "whiten": WhitenTokens,
    "funrl": EntropyBonus,
    "empg": StepModulation,
    "erpo": GatedTokens,
    "progrpo": ConfidenceReweight,
    "g2rpo": RankNormal,
    "riskpo": MixedRisk,
    "ares": WindowEntropy,
    "ares_kl": DynamicKL,
    "ib_tpo": InformationScore,
}
"""Stages of the advantage; several run in the order in which they are named."""

FORKS: dict[str, Callable[[], Fork]] = {
    "flat": Flat,
    "top_entropy": TopEntropy,
    "random": RandomTokens,
    "ep_tree": EPTree,
    "online_entropy": OnlineEntropy,
    "aepo_agentic": Probed,
    "entropy_confidence": EntropyConfidence,
    "entropy_confidence_fixed": FixedEntropyConfidence,
    "without_replacement": WithoutReplacement,
    "distilled": Distilled,
}
"""Where trees fork."""

PRUNES: dict[str, Callable[[], Prune]] = {
    "keep": Keep,
    "doubt": Doubt,
    "doubt_fixed": FixedDoubt,
}
"""Which branches stop early."""

VOTES: dict[str, Callable[[], Vote]] = {
    "majority": Majority,
    "inverse_width": inverse_width,
    "confidence": confidence,
    "mass": Mass,
    "judger": Judger,
}
"""How a label is elected."""

SELECTS: dict[str, Callable[[], Select]] = {
    "first": First,
    "dynamic": Dynamic,
    "stratified": Stratified,
    "rso": Rejection,
    "known": Known,
    "d3s": DownSample,
    "om_grpo": WithoutAnswer,
}
"""Which leaves train."""

REWARDS: dict[str, Callable[[], Reward]] = {
    "vote": VoteReward,
    "true": TrueReward,
    "overlong": OverlongReward,
    "length": LengthReward,
    "empo": FrequencyReward,
    "scrl": SelectiveReward,
    "ddrl": BalancedReward,
    "ttrl_guard": GuardedReward,
    "evol_rl": NoveltyReward,
    "random": RandomReward,
}
"""What a leaf earns."""
