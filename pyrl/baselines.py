"""Baselines: what rewards of independent answers are compared with, other than by `GroupBaseline`.

Each is a stage of `pyrl.advantage`: a leaf of unknown reward counts nowhere and gets 0, and where a
prompt's rewards are compared with each other, equal ones give exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrl.advantage import Floats, Stage, WhitenTokens, dr_grpo, known_groups
from pyrl.checks import at_least, finite, shares
from pyrl.leaves import Scored


@dataclass(frozen=True)
class Return:
    """A = r, without a baseline (Williams 1992). The input is ignored."""

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        return np.nan_to_num(scored.reward_N, nan=0.0)[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class LengthBaseline:
    """OPO: A = r - sum L r / sum L over a prompt's leaves of L tokens (arXiv:2505.23585).

    The baseline of least variance where a response's gradient grows with its length. The input is
    ignored.
    """

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        advantage_N = np.zeros(scored.reward_N.size)
        for known in known_groups(scored):
            reward = scored.reward_N[known]
            if reward.min() != reward.max():
                advantage_N[known] = reward - self._baseline(scored, known)
        return advantage_N[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        shift = [
            abs(self._baseline(scored, known) - scored.reward_N[known].mean())
            for known in known_groups(scored)
        ]
        return {"advantage/baseline_shift": float(np.mean(shift)) if shift else 0.0}

    def _baseline(self, scored: Scored, known: NDArray[np.int64]) -> float:
        length = scored.length_N[known]
        return float((length * scored.reward_N[known]).sum() / length.sum())


@dataclass(frozen=True)
class Informative:
    """GPG: A *= 1 / s, s the share of prompts whose rewards are not all equal (arXiv:2504.02546).

    The others have no gradient, and would make the mean over the batch smaller. The source samples
    further prompts while s is below `least`; here s counts as `least` then.
    """

    least: float = 0.5
    """Smallest share: no advantage grows by more than 1 / least."""
    needs = ("advantage_T",)

    def __post_init__(self) -> None:
        shares(self, "least")
        if self.least == 0:
            raise ValueError("least: expected a share above 0, got 0")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        return advantage_T / max(self.least, self._share(scored))

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        return {"advantage/informative": self._share(scored)}

    def _share(self, scored: Scored) -> float:
        rewards = [scored.reward_N[known] for known in known_groups(scored)]
        return float(np.mean([r.min() != r.max() for r in rewards])) if rewards else 1.0


@dataclass(frozen=True)
class PassAtK:
    """Pass@k training: what a leaf adds to the best of k of its prompt (arXiv:2508.10751).

    Of n leaves c are right (a reward above 0). With R = 1 - C(n - c, k) / C(n, k), the chance that
    k of them have a right one, and s = sqrt(R (1 - R)): A = (1 - R) / s for the right ones, and
    (1 - R - C(n - c - 1, k - 1) / C(n - 1, k - 1)) / s for the others, over all choices of k at
    once. k = 1 is GRPO with the deviation of a population. The input is ignored.
    """

    k: int = 4
    """Answers of which the best counts; at most n."""
    eps: float = 1e-6
    """Added to s."""

    def __post_init__(self) -> None:
        finite(self, "eps")
        at_least(1, self, "k")
        at_least(0, self, "eps")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        advantage_N = np.zeros(scored.reward_N.size)
        for known in known_groups(scored):
            right = scored.reward_N[known] > 0
            wrong, k = int((~right).sum()), min(self.k, known.size)
            failing = _all_among(wrong, known.size, k)
            deviation = np.sqrt(failing * (1 - failing))
            if deviation > 0:
                others = failing - _all_among(wrong - 1, known.size - 1, k - 1)
                advantage_N[known] = np.where(right, failing, others) / (deviation + self.eps)
        return advantage_N[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        passing = []
        for known in known_groups(scored):
            wrong = int((scored.reward_N[known] <= 0).sum())
            passing.append(1 - _all_among(wrong, known.size, min(self.k, known.size)))
        return {"advantage/pass_at_k": float(np.mean(passing)) if passing else 0.0}


@dataclass(frozen=True)
class Entropic:
    """A = r (1 + alpha) where r > 0, r (1 - alpha) where r < 0, to hold the entropy at a target.

    alpha = carry + (H - target), H the mean entropy of the step's tokens (nats); then carry becomes
    alpha - decay (H - target): a controller of proportion and sum, in the released code of
    arXiv:2604.26326. It works on rewards of two signs. The input is ignored.
    """

    target: float = 0.5
    """Entropy (nats) at which rewards stay as they are."""
    decay: float = 0.99
    """Share of the last step's distance that the next one does not carry on."""

    def __post_init__(self) -> None:
        finite(self, "target")
        shares(self, "decay")

    def initial(self) -> dict[str, float]:
        """The sum of what earlier steps carried on."""
        return {"carry": 0.0}

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        alpha = self._alpha(scored)
        scored.state["carry"] = alpha - self.decay * self._distance(scored)
        reward_N = np.nan_to_num(scored.reward_N, nan=0.0)
        return (reward_N * (1 + np.sign(reward_N) * alpha))[scored.leaf_T]

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        return {"advantage/entropic": self._alpha(scored)}

    def _alpha(self, scored: Scored) -> float:
        carry: float = scored.state["carry"]
        return carry + self._distance(scored)

    def _distance(self, scored: Scored) -> float:
        entropy_T = scored.entropy_T
        return float(entropy_T.mean(dtype=np.float64)) - self.target if entropy_T.size else 0.0


def reinforce_pp() -> tuple[Stage, ...]:
    """REINFORCE++: rewards whitened over all tokens of the step (arXiv:2501.03262)."""
    return (Return(), WhitenTokens())


def reinforce_pp_baseline() -> tuple[Stage, ...]:
    """REINFORCE++ with the prompt's mean as baseline, then whitened (arXiv:2501.03262)."""
    return (*dr_grpo(), WhitenTokens())


def gpg() -> tuple[Stage, ...]:
    """Centred rewards, larger where other prompts have no gradient (arXiv:2504.02546)."""
    return (*dr_grpo(), Informative())


def _all_among(some: int, n: int, k: int) -> float:
    """C(some, k) / C(n, k): the chance that k of n are all among `some` of them."""
    if some < k:
        return 0.0
    return float(np.prod([(some - j) / (n - j) for j in range(k)]))
