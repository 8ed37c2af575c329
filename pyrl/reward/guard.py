"""Guard: the vote as a reward that trusts questions less whose label has changed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers
from pyrl.checks import at_least, shares
from pyrl.reward.consensus import OfConsensus, class_share_N, groups_of
from pyrl.vote import Votes

if TYPE_CHECKING:
    from pyrl.leaves import Leaves
    from pyrl.reward import Question


@dataclass(frozen=True)
class GuardedReward(OfConsensus):
    """TTRL-Guard: w (the vote's 1 or 0 + a bonus for minorities), or unknown (arXiv:2605.19444).

    With F = 1 if a question's label is another one than at its last visit, else 0, and M the share
    of the votes for it: w = 1 - flip F, times 1 - sure where M > `trusted` too; times 1 - sure / 2,
    for `window` visits, if the label never changed in so many visits while the mean of the last M
    is above `trusted`. Where F = 1 a minority of at least a quarter of the leaves gets its share of
    `minority` among such, times 2 M (1 - M), the mean size of an advantage. A question whose label
    has changed once and whose mean M is above `settled` now is skipped at random, at most a quarter
    of a step's: its rewards are unknown. The source has all this on advantages: behind a baseline
    without a deviation (--advantage dr_grpo) it is the same but for the bonus, which is centred.
    """

    flip: float = 0.5
    """What a changed label takes from the weight; 0: nothing."""
    sure: float = 0.3
    """What it takes beyond that where most leaves agree nevertheless."""
    trusted: float = 0.6
    """Share of the votes from which on a label counts as sure."""
    minority: float = 0.3
    """The bonus for all minorities of a question; 0: none."""
    skip: float = 0.7
    """Probability that a settled question is skipped; 0: never."""
    settled: float = 0.7
    """Mean share of the votes above which a question that once changed has settled."""
    window: int = 5
    """Visits of a question that are looked back on."""
    seed: int = 0
    """Another seed skips other questions."""

    def __post_init__(self) -> None:
        shares(self, "flip", "sure", "trusted", "minority", "skip", "settled")
        at_least(1, self, "window")

    def initial(self) -> dict[str, Any]:
        """What is known of each question, by a digest of its text; the number of draws; and what
        the last step came to."""
        return {"questions": {}, "draws": 0, "weights": [], "flips": [], "skipped": []}

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        state, reward_N = leaves.state, np.zeros(len(answers.class_N))
        state |= {"weights": [], "flips": [], "skipped": []}
        groups, share_N = [*groups_of(leaves)], class_share_N(leaves, answers)
        for group, member in groups:
            label, ratio = votes.class_G[group], float(votes.ratio_G[group])
            key = hashlib.blake2b(prompts[group].text.encode(), digest_size=8).hexdigest()
            known = state["questions"].setdefault(
                key, {"label": None, "ratios": [], "visits": 0, "changed": False, "slowed": 0}
            )
            flip = self._visit(known, votes.label_G[group], ratio, answers)
            right = (answers.class_N[member] == label) & (label >= 0)
            bonus = np.zeros(member.size)
            if flip:
                other = (answers.class_N[member] >= 0) & ~right & (share_N[member] >= 0.25)
                whole = self.minority * 2 * ratio * (1 - ratio)
                bonus[other] = whole * share_N[member][other] / max(1e-9, other.mean())
            weight = self._weight(known, flip, ratio)
            skipped = self._skips(state, known, len(groups))
            reward_N[member] = math.nan if skipped else weight * (right + bonus)
            state["weights"].append(weight)
            state["flips"].append(flip)
            state["skipped"].append(skipped)
        return reward_N

    def metrics(self, leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
        names = {"guard_weight": "weights", "guard_flips": "flips", "guard_skipped": "skipped"}
        state = leaves.state
        return {f"reward/{n}": float(np.mean(state[of] or [0.0])) for n, of in names.items()}

    def _visit(
        self, known: dict[str, Any], label: str | None, ratio: float, answers: Answers
    ) -> bool:
        """Take in a vote; whether it has another label than the last one."""
        before = known["label"]
        both = label is not None and before is not None
        flip = both and answers.equivalence.same(str(before), str(label)) is False
        known["label"] = before if label is None else label
        known["ratios"] = [*known["ratios"], ratio][-self.window :]
        known["visits"] += 1
        known["changed"] = known["changed"] or flip
        return flip

    def _weight(self, known: dict[str, Any], flip: bool, ratio: float) -> float:
        weight = 1 - self.flip * flip
        if flip and ratio > self.trusted:
            weight *= 1 - self.sure
        stuck = not known["changed"] and known["visits"] >= self.window
        if stuck and np.mean(known["ratios"]) > self.trusted and known["slowed"] < self.window:
            known["slowed"] += 1
            weight *= 1 - self.sure / 2
        return max(0.1, weight)

    def _skips(self, state: dict[str, Any], known: dict[str, Any], questions: int) -> bool:
        settled = known["changed"] and known["visits"] >= self.window
        if not (settled and np.mean(known["ratios"]) > self.settled):
            return False
        draw = np.random.default_rng((self.seed, state["draws"])).random()
        state["draws"] += 1
        return bool(draw < self.skip and sum(state["skipped"]) < max(1, questions // 4))
