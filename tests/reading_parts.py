"""A plugin whose parts read all that a reward, a stage and a selection can read, and remember it.

What they find is in their metrics and states, where tests look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers
from pyrl.leaves import Leaves, Scored
from pyrl.reward import VoteReward
from pyrl.select import First
from pyrl.vote import Votes


@dataclass(frozen=True)
class Calm(VoteReward):
    """The vote's reward less a share of the entropy of each step's first token."""

    share: float = 0.1
    separator: str = "1"
    needs = ("rows", "texts", "progress")

    def initial(self) -> dict[str, Any]:
        return {"progress": []}

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Any
    ) -> NDArray[np.float64]:
        leaves.state["progress"].append(leaves.progress)
        rows, step_T = leaves.rows, leaves.texts.steps(self.separator)
        first_T = np.diff(rows.leaf_T * 1000 + step_T, prepend=-1) > 0
        start_T = np.where(first_T, rows.entropy_T.astype(np.float64), 0.0)
        entropy_N = np.bincount(rows.leaf_T, start_T, len(leaves.leaf_N))
        return super().__call__(leaves, answers, votes, prompts) - self.share * entropy_N


@dataclass(frozen=True)
class Drift:
    """Advantages less a distance from the first model, in units of the largest ones so far.

    It keeps the entropies of the last `window` tokens, as a quantile tracker would.
    """

    coef: float = 0.1
    window: int = 64
    needs = ("advantage_T", "old_logprob_T", "ref_logprob_T", "texts", "progress", "token_T")

    def initial(self) -> dict[str, Any]:
        return {"seen": np.zeros(0, np.float32), "largest": 0.0, "log": {"progress": []}}

    def __call__(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.float64]:
        state = scored.state
        state["log"]["progress"].append(scored.progress)
        state["seen"] = np.append(state["seen"], scored.entropy_T)[-self.window :]
        state["largest"] = max(state["largest"], float(np.abs(advantage_T).max()))
        unsure_T = scored.entropy_T > np.median(state["seen"])
        away_T = scored.old_logprob_T - scored.ref_logprob_T
        return advantage_T / (1 + state["largest"]) - self.coef * unsure_T * away_T

    def metrics(self, scored: Scored, advantage_T: NDArray[np.float64]) -> dict[str, float]:
        begin_T, end_T = scored.texts.span_T2.T
        texts = [scored.texts.text_N[n] for n in scored.leaf_T.tolist()]
        spelled = [t[b:e] for t, b, e in zip(texts, begin_T, end_T, strict=True)]
        alone = scored.texts.decode([*scored.token_T.reshape(-1, 1)])
        return {
            "drift/spelled": float(np.mean([a == b for a, b in zip(alone, spelled, strict=True)])),
            "drift/sampler": float(np.abs(scored.old_logprob_T - scored.logprob_T).max()),
            "drift/away": float(np.abs(scored.old_logprob_T - scored.ref_logprob_T).max()),
            "drift/known": float(len(scored.state["seen"])),
        }


@dataclass(frozen=True)
class Largest(First):
    """The tokens of the largest advantages, a share of them; how many there were."""

    share: float = 0.5

    def initial(self) -> dict[str, Any]:
        return {"tokens": 0}

    def after(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.bool_]:
        size_T = np.abs(advantage_T)
        chosen_T = np.zeros(size_T.size, bool)
        chosen_T[np.argsort(-size_T, kind="stable")[: round(self.share * size_T.size)]] = True
        if scored.state is not None:
            scored.state["tokens"] += int(chosen_T.sum())
        return chosen_T


ADVANTAGES = {"drift": Drift}
SELECTS = {"largest": Largest}
REWARDS = {"calm": Calm}
