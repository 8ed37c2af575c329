"""Pairs of rules that a rollout must cope with, for property tests."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from pyrl._core.tree import Observed, SignalSpec
from pyrl.fork import EntropyConfidence, EPTree, Flat, OnlineEntropy, RandomTokens, TopEntropy
from pyrl.prune import Doubt, Keep


@dataclass(frozen=True)
class RandomDoubt(Keep):
    """Prunes by a hash of what it sees; a custom rule without C++."""

    share: float
    respawn_share: float

    def lower(self, spec: SignalSpec) -> bool:
        return True

    def reason(self, observed: Observed) -> np.ndarray:
        noise_B = (observed.tail_confidence_B * 1e4) % 1
        return np.where(noise_B < self.share, 4, 0).astype(np.uint8)

    def respawns(self, votes: int) -> int:
        return round(votes * self.respawn_share)


FORKS = st.one_of(
    st.just(Flat()),
    st.builds(
        TopEntropy,
        forks=st.integers(0, 3),
        siblings=st.integers(0, 3),
        min_gap=st.integers(0, 3),
        mask_tail=st.integers(0, 4),
    ),
    st.builds(RandomTokens, min_gap=st.integers(0, 3), mask_tail=st.integers(0, 4)),
    st.builds(
        EPTree,
        forks=st.integers(0, 2),
        siblings=st.integers(0, 2),
        rounds=st.integers(0, 3),
        mask_tail=st.integers(0, 4),
    ),
    st.builds(
        OnlineEntropy,
        forks=st.integers(0, 3),
        siblings=st.integers(0, 3),
        quantile=st.floats(0, 1),
        cooldown=st.integers(0, 3),
        warmup_traces=st.integers(0, 20),
    ),
    st.builds(
        EntropyConfidence,
        entropy_high=st.floats(0, 1),
        entropy_low=st.just(0.0),
        confidence=st.floats(0, 1),
        entropy_rise=st.floats(0, 1),
        max_width=st.integers(1, 4),
        cooldown=st.integers(0, 3),
        trunk_cap=st.integers(1, 6),
        trunk_share=st.sampled_from([0.0, 0.3, 1.0]),
        group_window=st.integers(1, 4),
        min_tokens=st.integers(0, 2),
        warmup_traces=st.integers(0, 20),
    ),
)
PRUNES = st.one_of(
    st.just(Keep()),
    st.builds(
        Doubt,
        confidence_low=st.floats(0, 1),
        tail_low=st.floats(0, 1),
        decline_run=st.integers(1, 3),
        spike=st.floats(0, 1),
        spike_run=st.integers(1, 3),
        tail_window=st.integers(1, 4),
        respawn_share=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    ),
    st.builds(RandomDoubt, share=st.sampled_from([0.05, 0.5]), respawn_share=st.just(1.0)),
)
