"""Whether the rewards of a step hang by a thread: signs of advantages without one of them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np

from pyrl.advantage import Stage, advantages
from pyrl.leaves import Scored


def advantage_flips(
    stages: Sequence[Stage], states: Sequence[Any], scored: Scored
) -> dict[str, float]:
    """The advantages once for each leaf of a question, whose reward is unknown then: a jackknife.

    Where several answers are about as good, a small change of the rewards changes what is learnt
    (The Policy Cliff, arXiv:2507.20150). Of the tokens of the other leaves that have an advantage,
    mean over these rounds: the share whose advantage changes its sign (`flipped`), and the share
    that has none any more (`vanished`). The k-th leaves of all questions are left out together.
    """
    start_N = np.searchsorted(scored.group_N, scored.group_N)
    place_N = np.arange(len(scored.group_N)) - start_N
    whole_T, _ = advantages(stages, scored, deepcopy(states))
    flipped = vanished = tokens = 0
    for place in range(int(place_N.max(initial=-1)) + 1):
        hidden_N = place_N == place
        reward_N = np.where(hidden_N, np.nan, scored.reward_N)
        without_T, _ = advantages(stages, replace(scored, reward_N=reward_N), deepcopy(states))
        others_N = np.isin(scored.group_N, scored.group_N[hidden_N]) & ~hidden_N
        asked_T = (whole_T != 0) & others_N[scored.leaf_T]
        flipped += int((whole_T * without_T < 0)[asked_T].sum())
        vanished += int((without_T == 0)[asked_T].sum())
        tokens += int(asked_T.sum())
    return {
        "diagnostics/flipped": flipped / max(1, tokens),
        "diagnostics/vanished": vanished / max(1, tokens),
    }
