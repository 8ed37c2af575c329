"""Loss: the choices of a policy loss. `policy_loss` computes; these say with which numbers.

Each choice is an axis with a neutral value, and a method names what differs. In their order: the
advantage is reshaped, the ratio R of policies is bounded, a surrogate of R and the advantage is
capped, multiplied by detached factors, regularised and aggregated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pyrl.checks import check_axes, described
from pyrl.logits.token_stats import Options
from pyrl.loss.aggregate import RESPONSES, Aggregate, TokenMean
from pyrl.loss.axis import Factor, Keep, LossState, Need, Reshape, needs_of
from pyrl.loss.bounds import (
    RADII,
    BinaryKL,
    Bounds,
    Clip,
    EntropyClip,
    PositionClip,
    Range,
    TotalVariation,
    Unbounded,
)
from pyrl.loss.penalties import (
    KL,
    CovarianceBonus,
    EntropySmoothing,
    ExpertLeak,
    NucleusAnchor,
    OfLogprob,
    OfNucleus,
    Penalty,
    SurprisalBand,
)
from pyrl.loss.surrogates import ClampedLogp, Clipped, MaskedLogp, Sigmoid, SoftClipped

LEARNED = frozenset(
    {
        *("sum_p2_T", "sum_p2_logp_T", "proxy_logprob_T", "second_logprob_T"),
        *("nucleus_entropy_T", "expert_logprob_T"),
    }
)
"""Columns that no engine reports."""


@dataclass(frozen=True)
class Ratio:
    """R of the current policy to another one; its gradient goes through the token's own share."""

    of: Literal["one", "token", "seq_geo", "seq_prod", "cum_prod", "cum_geo", "min_prefix"] = (
        "token"
    )
    """1; the token's own; the response's geometric mean (GSPO) or product; the same of the prefix
    (CTPO); the token's times the smallest before it (MinPRO)."""
    to: Literal["old", "rollout"] = "old"
    """The policy before the update, or the one that the rollout engine reported."""
    pre_clip: float | None = None
    """GMPO: largest |log R| of a token, on the side to which its advantage pushes, before tokens
    are reduced to a response's ratio; beyond it a token has no gradient (arXiv:2507.20673)."""

    def __post_init__(self) -> None:
        if self.pre_clip is None:
            return
        if self.of in ("one", "token") or not self.pre_clip > 0:
            got = f"{self.pre_clip} of {self.of}"
            raise ValueError(f"Ratio.pre_clip: expected > 0, and a ratio of responses, got {got}")

    @property
    def anchor(self) -> str:
        """The log-probability in the denominator."""
        return f"{self.to}_logprob_T"


@dataclass(frozen=True)
class Loss:
    """The axes of a policy loss. The defaults are PPO with a dual clip and a KL penalty."""

    bounds: (
        Bounds | Clip | Unbounded | Range | PositionClip | EntropyClip | TotalVariation | BinaryKL
    ) = field(default_factory=Clip)
    dual: float | None = 3.0
    """Cap on the ratio of tokens with a negative advantage (arXiv:1912.09729); None is no cap."""
    kl: KL = field(default_factory=KL)
    entropy: float = 0.0
    """Coefficient of the entropy bonus."""
    aggregate: Aggregate = field(default_factory=TokenMean)
    ratio: Ratio = field(default_factory=Ratio)
    trust: Literal["ratio", "old"] = "ratio"
    """What the bounds test: the ratio, or the token's own ratio to the old policy."""
    surrogate: Clipped | MaskedLogp | ClampedLogp | SoftClipped | Sigmoid = field(
        default_factory=Clipped
    )
    reshape: tuple[Reshape, ...] = ()
    """Changes of the advantages, in order."""
    redistribute: float = 0.0
    """HAPO: A (1 + redistribute heat), for positive heat outside half the bounds, for negative heat
    inside (`EntropyClip` says what heat is)."""
    behaviour: Factor | None = None
    """Correction of the rollout engine's mismatch with the old policy."""
    weight: Factor | None = None
    """A further factor of the policy term."""
    keep: tuple[Keep, ...] = ()
    """A token stays if all of them keep it."""
    penalties: tuple[
        Penalty | ExpertLeak | SurprisalBand | EntropySmoothing | NucleusAnchor | CovarianceBonus,
        ...,
    ] = ()
    """Terms that are added to the loss of a token, or of a mini-batch."""

    def __post_init__(self) -> None:
        check_axes(self)
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"loss.dual: expected > 1, got {self.dual}")
        if self.ratio.to == "rollout" and self.behaviour is not None:
            raise ValueError(
                "loss.behaviour: expected None where Ratio.to is 'rollout', which it would count "
                f"twice, got {self.behaviour}"
            )

    @property
    def has_reference(self) -> bool:
        """A penalty is measured from the frozen initial model."""
        targets = [p.target for p in self.penalties if isinstance(p, Penalty)]
        return self.kl.coef != 0 or "ref" in targets

    @property
    def reads_heat(self) -> bool:
        """Bounds or advantages move with `entropy_heat`."""
        return isinstance(self.bounds, EntropyClip) or self.redistribute != 0

    @property
    def reads_anchor(self) -> bool:
        """The kernels read the log-probability in the ratio's denominator."""
        return self.ratio.of != "one" or isinstance(self.bounds, TotalVariation | BinaryKL)

    @property
    def terms_needs(self) -> list[Need]:
        """What the terms of a mini-batch are computed from, beside the advantages."""
        needs = needs_of(self.aggregate, RESPONSES)
        for axis in (*self.reshape, self.behaviour, self.weight, *self.keep):
            needs += needs_of(axis)
        needs += needs_of(self.bounds, RADII)
        if self.redistribute:
            needs.append(Need("loss.redistribute", "entropy_T"))
        for penalty in self.penalties:
            if isinstance(penalty, Penalty):
                needs += needs_of(penalty.select)
            else:
                needs += needs_of(penalty)
            if isinstance(penalty, OfLogprob) and penalty.aggregate is not None:
                needs += needs_of(penalty.aggregate, RESPONSES)
        return needs

    @property
    def token_needs(self) -> list[Need]:
        """What the loss of each token is computed from, beside the terms."""
        needs = []
        if self.reads_anchor:
            needs.append(Need("loss.ratio", self.ratio.anchor))
        if self.trust == "old":
            needs.append(Need("loss.trust", "old_logprob_T"))
        if self.kl.coef:
            needs.append(Need("loss.kl", "ref_logprob_T"))
        for penalty in self.penalties:
            if isinstance(penalty, OfLogprob):
                needs.append(Need("loss.penalties", penalty.column))
            elif isinstance(penalty, OfNucleus):
                needs.append(Need(type(penalty).__name__, penalty.column))
        return needs

    @property
    def needs(self) -> list[Need]:
        """Everything that the axes read."""
        return [*self.terms_needs, *self.token_needs]

    @property
    def compares_sampler(self) -> bool:
        """The policy before the update and the one that sampled are two, and compared."""
        return {"old_logprob_T", "rollout_logprob_T"} <= {need.name for need in self.needs}

    @property
    def learner_needs(self) -> list[Need]:
        """What only a pass of the learner over the samples can give, before it updates.

        The engine that sampled has one log-prob of a token, so a loss that compares it with the
        old policy's needs the learner's too.
        """
        names = LEARNED | {"rollout_logprob_T"} if self.compares_sampler else LEARNED
        return [need for need in self.needs if need.name in names]

    @property
    def follows_signs(self) -> bool:
        """A penalty pushes by the sign of a difference to the old policy, also where it is noise.

        From the reference it is none: one learner computes both with the same kernels.
        """
        penalties = [p for p in self.penalties if isinstance(p, Penalty)]
        return any(p.estimator == "abs" and p.target == "old" for p in penalties)

    @property
    def off_policy_parts(self) -> list[str]:
        """What acts only where the policy that learns is not the old one, by the fields' names."""
        of_ratio = {
            "loss.bounds": not isinstance(self.bounds, Unbounded),
            "loss.dual": self.dual is not None,
            "loss.ratio.pre_clip": self.ratio.pre_clip is not None,
            "loss.surrogate": isinstance(self.surrogate, Sigmoid),
        }
        parts = [name for name, acts in of_ratio.items() if acts and self.ratio.of != "one"]
        penalties = [p for p in self.penalties if isinstance(p, Penalty) and p.target == "old"]
        return parts + ["loss.penalties"] * bool(penalties)

    def asks(self, temperature: float, state: LossState) -> Options:
        """What `token_stats` is to compute of the old policy, beside log-prob and entropy."""
        options = Options()
        axes: list[Any] = [*self.reshape, self.behaviour, self.weight, *self.keep, *self.penalties]
        for axis in axes:
            if hasattr(axis, "asks"):
                options |= axis.asks(temperature, state)
        return options

    @property
    def nucleus(self) -> OfNucleus | None:
        """The penalty on an entropy of the nucleus, whose gradient the current pass computes."""
        return next((p for p in self.penalties if isinstance(p, OfNucleus)), None)

    @property
    def expert(self) -> ExpertLeak | None:
        """The penalty that reads an expert's responses."""
        return next((p for p in self.penalties if isinstance(p, ExpertLeak)), None)

    @property
    def needs_advantage(self) -> bool:
        """A token without an advantage has no gradient."""
        return not (self.kl.coef or self.entropy or self.penalties)


def check_loss(loss: object) -> None:
    """TypeError unless it is a loss, and not a preset's name or one that was not called."""
    if not isinstance(loss, Loss):
        raise TypeError(
            f"loss: expected a pyrl.loss.Loss, such as pyrl.presets.dapo(), got {described(loss)}"
        )
