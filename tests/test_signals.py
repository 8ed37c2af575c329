"""The C++ signals against slow ones that keep the whole history."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from signals_reference import SlowSignals, bin_edges

from pyrl._core import Observed, Signals, SignalSpec, Sketch, Threshold

COLUMNS = {
    "smooth_entropy": "smooth_entropy_B",
    "entropy_rise": "entropy_rise_B",
    "group_confidence": "group_confidence_B",
    "tail_confidence": "tail_confidence_B",
    "min_confidence": "min_confidence_B",
    "width": "width_B",
    "prune": "prune_B",
    "ready": "ready_B",
}


def make_spec(**values: Any) -> SignalSpec:
    """Small windows, decisions from the first token, and no thresholds that stand in the way."""
    defaults: dict[str, Any] = {
        "smooth_window": 2,
        "group_window": 3,
        "tail_window": 4,
        "min_tokens": 0,
        "warmup_traces": 0,
        "entropy_high": Threshold(value=0.5),
        "confidence_fork": Threshold(value=1e30),
        "entropy_rise": Threshold(value=-1e30),
        "confidence_low": Threshold(value=-1e30),
        "tail_low": Threshold(value=-1e30),
        "entropy_spike": Threshold(value=1e30),
        "alpha": 0.0,
        "beta": 0.0,
        "width_min": 2,
        "width_max": 2,
        "cooldown": 0,
    }
    spec = SignalSpec()
    for name, value in (defaults | values).items():
        setattr(spec, name, value)
    return spec


def handles(*branches: int) -> np.ndarray:
    """As a forest makes them: index, generation."""
    return np.array([branch << 32 | 1 for branch in branches], np.int64)


def inherit(signals: Signals, parent: int, children: list[int]) -> None:
    signals.inherit(int(handles(parent)[0]), handles(*children))


def observe(
    signals: Signals, branches: list[int], entropy: list[float], confidence: list[float]
) -> Observed:
    return signals.observe(
        handles(*branches),
        np.array(entropy, np.float32),
        np.array(confidence, np.float32),
    )


def widths(signals: Signals, branch: int, entropies: list[float]) -> list[int]:
    return [int(observe(signals, [branch], [h], [0.9]).width_B[0]) for h in entropies]


def prunes(signals: Signals, rows: list[tuple[float, float]], branch: int = 1) -> list[int]:
    return [int(observe(signals, [branch], [h], [c]).prune_B[0]) for h, c in rows]


# ---- everything against the reference


def random_spec(rng: np.random.Generator) -> SignalSpec:
    def threshold(low: float, high: float) -> Threshold:
        if rng.random() < 0.3:
            return Threshold(value=float(rng.uniform(low, high)))
        return Threshold(q=float(rng.choice([0, 0.1, 0.5, 0.9, 1])))

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
        confidence_fork=threshold(0.6, 1),
        entropy_rise=threshold(-1, 1),
        confidence_low=threshold(0.5, 0.8),
        tail_low=threshold(0.5, 0.9),
        entropy_spike=threshold(0, 1),
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


# ---- windows and decisions, by hand


def test_windows_grow_until_they_are_full_and_then_slide() -> None:
    signals = Signals(make_spec())
    rows = [(1.0, 0.5), (3.0, 1.0), (5.0, 0.0), (7.0, 0.5), (9.0, 1.0)]
    seen = [observe(signals, [1], [h], [c]) for h, c in rows]
    assert [o.smooth_entropy_B[0] for o in seen] == [1, 2, 4, 6, 8]
    assert [o.entropy_rise_B[0] for o in seen] == [0, 2, 3, 3, 3]
    assert [o.group_confidence_B[0] for o in seen] == [0.5, 0.75, 0.5, 0.5, 0.5]
    assert [o.tail_confidence_B[0] for o in seen] == [0.5, 0.75, 0.5, 0.5, 0.625]
    assert [o.min_confidence_B[0] for o in seen] == [0.5, 0.5, 0.5, 0.5, 0.5]


def test_forks_need_enough_tokens() -> None:
    signals = Signals(make_spec(fork=True, min_tokens=3))
    assert widths(signals, 1, [1.0] * 5) == [1, 1, 1, 2, 2]


def test_all_branches_of_a_fork_cool_down() -> None:
    signals = Signals(make_spec(fork=True, cooldown=2))
    assert widths(signals, 1, [1.0]) == [2]
    inherit(signals, 1, [2])
    assert widths(signals, 1, [1.0] * 4) == [1, 1, 2, 2]
    assert widths(signals, 2, [1.0] * 4) == [1, 1, 1, 2]  # its first token was decided already


def test_a_path_has_at_most_max_forks_counted_through_siblings() -> None:
    signals = Signals(make_spec(fork=True, max_forks=2))
    assert widths(signals, 1, [1.0]) == [2]
    inherit(signals, 1, [2])
    assert widths(signals, 2, [1.0] * 2) == [1, 2]
    inherit(signals, 2, [3])
    assert widths(signals, 2, [1.0] * 2) == [1, 1]
    assert widths(signals, 3, [1.0] * 3) == [1, 1, 1]
    assert widths(signals, 1, [1.0] * 2) == [2, 2]


def test_width_follows_echos_formula() -> None:
    spec = make_spec(
        fork=True,
        group_window=1,
        entropy_high=Threshold(value=3.5),
        entropy_low=Threshold(value=1.0),
        confidence_fork=Threshold(value=0.5),
        alpha=2.0,
        beta=1.0,
        width_min=1,
        width_max=4,
    )
    # 1 + 2 (H - 1) / 2.5 + (1 - 0.5 / (1 - C)), rounded half to even
    rows = [(3.5, 0.5, 3), (3.5, 0.0, 4), (4.75, 0.5, 4), (3.4, 0.0, 1), (9.0, 0.6, 1)]
    for branch, (entropy, confidence, width) in enumerate(rows):
        observed = observe(Signals(spec), [branch], [entropy], [confidence])
        assert observed.width_B.tolist() == [width]


def test_forks_need_a_rise_of_entropy() -> None:
    signals = Signals(make_spec(fork=True, entropy_rise=Threshold(value=0.5)))
    assert widths(signals, 1, [1.0, 1.0, 1.5, 1.5]) == [1, 1, 2, 1]


def test_a_policy_without_entropy_never_forks() -> None:
    signals = Signals(make_spec(fork=True, entropy_high=Threshold(q=0.9)))
    for _ in range(2):
        signals.begin_step()
        assert widths(signals, 1, [0.0] * 50) == [1] * 50


def test_low_confidence_prunes_at_once_and_a_memory_of_it_too() -> None:
    signals = Signals(make_spec(prune=True, group_window=1, confidence_low=Threshold(value=0.5)))
    assert prunes(signals, [(0, 0.5), (0, 0.4), (0, 0.9)]) == [0, 1, 1]


def test_tail_decline_needs_a_run_of_drops_and_a_low_tail() -> None:
    spec = make_spec(prune=True, tail_window=1, decline_run=2, tail_low=Threshold(value=0.5))
    falling = [(0, 0.9), (0, 0.8), (0, 0.6), (0, 0.4)]
    assert prunes(Signals(spec), falling) == [0, 0, 0, 2]
    assert prunes(Signals(spec), [(0, 0.9), (0, 0.4), (0, 0.4), (0, 0.3)]) == [0, 0, 0, 0]


def test_entropy_spikes_prune_when_they_come_in_a_row() -> None:
    spec = make_spec(prune=True, smooth_window=1, spike_run=2, entropy_spike=Threshold(value=0.5))
    assert prunes(Signals(spec), [(h, 1) for h in (0, 1, 2, 3)]) == [0, 0, 3, 3]
    assert prunes(Signals(spec), [(h, 1) for h in (0, 1, 1, 2)]) == [0, 0, 0, 0]


def test_nothing_is_pruned_where_all_samples_are_alike() -> None:
    spec = make_spec(
        prune=True,
        decline_run=1,
        spike_run=1,
        confidence_low=Threshold(q=0.1),
        tail_low=Threshold(q=0.1),
        entropy_spike=Threshold(q=0.99),
    )
    signals = Signals(spec)
    rows = [(0.1, 0.7), (0.2, 0.7), (0.3, 0.7), (0.4, 0.6)]
    for _ in range(2):
        signals.begin_step()
        for branch in range(8):
            reasons = prunes(signals, rows, branch)
        signals.close(handles(*range(8)))
    assert reasons == [0, 0, 0, 0]


def test_nothing_is_decided_before_the_warm_up_traces() -> None:
    spec = make_spec(fork=True, prune=True, warmup_traces=3, confidence_low=Threshold(value=2.0))
    signals = Signals(spec)
    for branch in range(3):
        observed = observe(signals, [branch], [1.0], [0.5])
        assert (observed.width_B[0], observed.prune_B[0], observed.ready_B[0]) == (1, 0, 0)
        signals.close(handles(branch))
        signals.calibrate()
        assert signals.thresholds().calibrated == (branch == 2)
    observed = observe(signals, [9], [1.0], [0.5])
    assert (observed.width_B[0], observed.prune_B[0], observed.ready_B[0]) == (1, 1, 1)


def test_a_sibling_repeats_its_parents_distribution_without_counting_it() -> None:
    def thresholds(siblings: int) -> float:
        signals = Signals(make_spec(entropy_high=Threshold(q=0.5)))
        widths(signals, 1, [1.0, 1.0, 4.0])
        children = list(range(2, 2 + siblings))
        inherit(signals, 1, children)
        first = observe(signals, children, [4.0] * siblings, [0.9] * siblings)
        assert set(first.smooth_entropy_B) == {np.float32(2.5)}
        assert not first.ready_B.any()
        signals.calibrate()
        return signals.thresholds().entropy_high

    assert thresholds(siblings=20) == 1.0
    signals = Signals(make_spec())
    widths(signals, 1, [1.0, 3.0])
    inherit(signals, 1, [2])
    widths(signals, 2, [3.0, 5.0])
    widths(signals, 1, [7.0])
    assert observe(signals, [2], [5.0], [0.9]).smooth_entropy_B[0] == 5
    assert observe(signals, [1], [7.0], [0.9]).smooth_entropy_B[0] == 7


def test_rewound_windows_are_those_of_the_time() -> None:
    spec = make_spec(fork=True, prune=True, cooldown=1)
    rows = [(1.0, 0.5), (3.0, 1.0), (5.0, 0.25), (7.0, 0.5), (9.0, 1.0)]
    entropy_T, confidence_T = np.array(rows, np.float32).T
    online, later = Signals(spec), Signals(spec)
    prunes(online, rows[:3])
    inherit(online, 1, [2])
    prunes(later, rows)
    later.close(handles(1))
    later.rewind(int(handles(1)[0]), entropy_T[:3].copy(), confidence_T[:3].copy())
    inherit(later, 1, [2])
    for row in [rows[2], (2.0, 0.75), (4.0, 0.75)]:
        a, b = (observe(signals, [2], [row[0]], [row[1]]) for signals in (online, later))
        assert {c: getattr(a, c)[0] for c in COLUMNS.values()} == {
            c: getattr(b, c)[0] for c in COLUMNS.values()
        }
    with pytest.raises(ValueError, match="as many entropies as confidences"):
        later.rewind(int(handles(1)[0]), entropy_T[:2], confidence_T[:3])


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_raise_and_change_nothing(broken: float) -> None:
    signals = Signals(make_spec(fork=True))
    widths(signals, 1, [1.0])
    state = signals.save()
    for entropy, confidence in [([1.0, broken], [0.9, 0.9]), ([1.0, 1.0], [0.9, broken])]:
        with pytest.raises(ValueError, match="expected finite entropy and confidence"):
            observe(signals, [1, 2], entropy, confidence)
    assert signals.save() == state
    assert observe(signals, [1], [2.0], [0.9]).smooth_entropy_B[0] == 1.5


def test_columns_of_different_lengths_raise() -> None:
    with pytest.raises(ValueError, match="expected 2 entropies and confidences, got 1 and 2"):
        observe(Signals(make_spec()), [1, 2], [1.0], [0.5, 0.5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_window": 0}, "group_window=0"),
        ({"width_min": 0}, "1 <= width_min <= width_max, got 0 and 2"),
        ({"width_max": 1}, "1 <= width_min <= width_max, got 2 and 1"),
        ({"spike_run": 0}, "spike_run=0"),
        ({"history": 0}, "steps >= 1, got 0"),
        ({"entropy_high": Threshold(q=95)}, "quantiles of at most 1.*got q=95"),
        ({"entropy_high": Threshold(value=float("nan"))}, "values that are numbers"),
    ],
)
def test_impossible_settings_raise(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Signals(make_spec(**values))


def test_a_step_forgets_the_branches_of_an_interrupted_one() -> None:
    signals = Signals(make_spec())  # handles begin anew with each forest
    widths(signals, 1, [5.0])
    signals.begin_step()
    assert observe(signals, [1], [1.0], [0.9]).smooth_entropy_B[0] == 1


# ---- sketches

VALUES = st.lists(st.floats(-200, 200) | st.floats(-1, 1) | st.just(0.0), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@example(values=[0.0, -0.0, 2.0**-25], q=0.5)
@example(values=[1.0, 2.0 - 2**-53, -1.0, -2.0], q=1.0)
@given(values=VALUES, q=st.floats(0, 1))
def test_a_sketchs_quantile_is_the_edge_of_the_sorted_quantiles_bin(
    values: list[float], q: float
) -> None:
    sketch = Sketch()
    sketch.add(np.array(values))
    exact = float(np.quantile(values, q, method="lower"))
    assert (sketch.quantile(q), sketch.quantile_above(q)) == bin_edges(exact)
    below, above = sketch.quantile(q), sketch.quantile_above(q)
    if abs(exact) >= 2.0**-24:
        assert below <= exact <= above
        assert above - below <= abs(exact) / 32


@settings(max_examples=50, deadline=None)
@given(values=VALUES, data=st.data())
def test_a_sketch_does_not_depend_on_the_order(values: list[float], data: st.DataObject) -> None:
    one, other = Sketch(), Sketch()
    one.add(np.array(values))
    for value in data.draw(st.permutations(values)):
        other.add(np.array([value]))
    assert all(one.quantile(q) == other.quantile(q) for q in np.linspace(0, 1, 11))


def test_a_sketch_forgets_what_is_older_than_its_steps() -> None:
    sketch = Sketch(steps=3)
    counts, medians = [], []
    for value in [1.0, 2.0, 4.0, 8.0, 16.0]:
        sketch.add(np.full(10, value))
        counts.append(sketch.count())
        medians.append(sketch.quantile(0.5))
        sketch.next_step()
    assert counts == [10, 20, 30, 30, 30]
    assert medians == [1, 1, 2, 4, 8]


def test_values_outside_the_range_fall_into_the_outermost_bins() -> None:
    sketch = Sketch()
    assert (sketch.count(), sketch.quantile(0.5), sketch.quantile_above(0.5)) == (0, 0, 0)
    sketch.add(np.array([-1e30, 1e30]))
    assert (sketch.quantile(0), sketch.quantile_above(1)) == (-256, 256)


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
