"""The C++ signals on random streams against slow ones with the whole history, and their state."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from signal_spec import make_spec
from signals_reference import COLUMNS, SlowSignals

from pyrl._core.tree import Signals, SignalSpec, Threshold

# ---- everything against the reference


def random_spec(rng: np.random.Generator) -> SignalSpec:
    def threshold(low: float, high: float) -> Threshold:
        if rng.random() < 0.3:
            return Threshold(value=float(rng.uniform(low, high)))
        return Threshold(q=float(rng.choice([0, 0.1, 0.5, 0.9, 1])))

    def threshold_or_none(low: float, high: float) -> Threshold | None:
        return None if rng.random() < 0.1 else threshold(low, high)

    return make_spec(
        smooth_window=int(rng.integers(1, 5)),
        group_window=int(rng.integers(1, 6)),
        tail_window=int(rng.integers(1, 9)),
        min_tokens=int(rng.integers(0, 4)),
        warmup_traces=int(rng.integers(0, 12)),
        history=int(rng.integers(1, 4)),
        fork=True,
        prune=bool(rng.random() < 0.7),
        entropy_high=threshold(0.2, 1.5),
        entropy_low=threshold(0, 0.5),
        confidence_fork=threshold_or_none(0.6, 1),
        entropy_rise=threshold_or_none(-1, 1),
        confidence_low=threshold_or_none(0.5, 0.8),
        tail_low=threshold_or_none(0.5, 0.9),
        entropy_spike=threshold_or_none(0, 1),
        alpha=float(rng.choice([0, 2])),
        beta=float(rng.choice([0, 1])),
        width_min=1,
        width_max=4,
        cooldown=int(rng.integers(0, 5)),
        max_forks=int(rng.integers(0, 3)),
        decline_run=int(rng.integers(1, 4)),
        spike_run=int(rng.integers(1, 3)),
    )


class Twins:
    """Feeds both, and compares all that comes back."""

    def __init__(self, spec: SignalSpec, rng: np.random.Generator) -> None:
        self.fast, self.slow, self.rng = Signals(spec), SlowSignals(spec), rng
        self.open: list[int] = []
        self.generation = 0
        self.seen: set[Any] = set()

    def opened(self) -> int:
        """A handle whose index may have belonged to a closed branch, as in a forest."""
        taken = {branch >> 32 for branch in self.open}
        index = next(i for i in range(16) if i not in taken)
        self.generation += 1
        self.open.append(index << 32 | self.generation)
        return self.open[-1]

    def step(self, tokens: int) -> None:
        self.fast.begin_step()
        self.slow.begin_step()
        self.compare_thresholds()
        for _ in range(4):
            self.opened()
        for _ in range(tokens):
            self.token()
        self.close(self.open)

    def token(self) -> None:
        self.rng.shuffle(self.open)
        # Binary fractions from a small set: sums are exact, and ties and plateaus are frequent.
        entropy = (self.rng.integers(0, 8, len(self.open)) ** 2 / 32).tolist()
        confidence = (1 - self.rng.integers(0, 6, len(self.open)) ** 2 / 64).tolist()
        observed = self.fast.observe(
            np.array(self.open, np.int64),
            np.array(entropy, np.float32),
            np.array(confidence, np.float32),
        )
        for row, branch in enumerate(self.open):
            expected = self.slow.observe(branch, entropy[row], confidence[row])
            got = {name: getattr(observed, column)[row] for name, column in COLUMNS.items()}
            assert got == expected
            self.seen |= {("width", expected["width"]), ("prune", expected["prune"])}
        self.fork_some(observed.width_B.tolist())
        self.close([branch for branch in self.open if self.rng.random() < 0.05])

    def fork_some(self, width: list[int]) -> None:
        for branch, siblings in zip(list(self.open), width, strict=True):
            if siblings > 1 and len(self.open) + siblings < 12:
                children = [self.opened() for _ in range(siblings - 1)]
                self.fast.inherit(branch, np.array(children, np.int64))
                self.slow.inherit(branch, children)

    def close(self, branches: list[int]) -> None:
        self.fast.close(np.array(branches, np.int64))
        for branch in branches:
            self.slow.close(branch)
        self.open = [branch for branch in self.open if branch not in branches]

    def compare_thresholds(self) -> None:
        thresholds = self.fast.thresholds()
        assert thresholds.calibrated == self.slow.calibrated
        for name, value in self.slow.thresholds.items():
            assert getattr(thresholds, name) == value, name


def test_random_streams_are_read_and_decided_as_the_slow_reference_does() -> None:
    seen: set[Any] = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        twins = Twins(random_spec(rng), rng)
        for _ in range(4):
            twins.step(tokens=15)
        seen |= twins.seen
    assert seen == {("width", w) for w in (1, 2, 3, 4)} | {("prune", p) for p in (0, 1, 2, 3)}


def test_long_streams_do_not_drift() -> None:
    rng = np.random.default_rng(0)
    signals = Signals(make_spec(smooth_window=4, group_window=32, tail_window=64))
    entropy = rng.exponential(size=20_000).astype(np.float32)
    confidence = rng.random(20_000).astype(np.float32)
    for t in range(20_000):
        last = signals.observe(np.array([1]), entropy[t : t + 1], confidence[t : t + 1])
    assert last.smooth_entropy_B[0] == pytest.approx(entropy[-4:].mean(), rel=1e-6)
    assert last.group_confidence_B[0] == pytest.approx(confidence[-32:].mean(), rel=1e-6)
    assert last.tail_confidence_B[0] == pytest.approx(confidence[-64:].mean(), rel=1e-6)


# ---- state


def grown(spec: SignalSpec, seed: int) -> Twins:
    twins = Twins(spec, np.random.default_rng(seed))
    for _ in range(3):
        twins.step(tokens=10)
    return twins


def test_saved_signals_load_and_decide_the_same() -> None:
    spec = random_spec(np.random.default_rng(3))
    before = grown(spec, seed=0)
    after = Twins(spec, np.random.default_rng())
    after.fast.load(before.fast.save())
    after.slow, after.generation = before.slow, before.generation
    after.rng = np.random.default_rng(5)
    after.fast.begin_step()
    after.slow.begin_step()
    after.compare_thresholds()
    assert after.slow.calibrated
    for _ in range(2):
        after.step(tokens=10)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda state: b"",
        lambda state: state[:-1],
        lambda state: state + b"\0",
        lambda state: state[:4000] + bytes([state[4000] ^ 1]) + state[4001:],
        lambda state: bytes([state[0] ^ 1]) + state[1:],
        lambda state: state[:-1] + bytes([state[-1] ^ 1]),
    ],
)
def test_corrupted_state_raises_and_changes_nothing(corrupt: Callable[[bytes], bytes]) -> None:
    signals = grown(make_spec(fork=True, entropy_high=Threshold(q=0.5)), seed=1).fast
    state = signals.save()
    with pytest.raises(ValueError, match=r"Signals\.load"):
        signals.load(corrupt(state))
    assert signals.save() == state


def test_state_of_another_history_raises() -> None:
    with pytest.raises(ValueError, match=r"\(2 steps of history\)"):
        Signals(make_spec(history=2)).load(Signals(make_spec(history=3)).save())
