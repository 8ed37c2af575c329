"""The windows and decisions of the C++ signals, by hand."""

from typing import Any

import numpy as np
import pytest
from signal_spec import make_spec
from signals_reference import COLUMNS

from pyrl._core.tree import Observed, Signals, Sketch, Threshold


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


def test_what_is_no_handle_raises() -> None:
    signals = Signals(make_spec(fork=True))
    one = np.ones(1, np.float32)
    nobody = np.array([-1])
    for call in (
        lambda: signals.observe(nobody, one, one),
        lambda: signals.close(nobody),
        lambda: signals.inherit(-1, nobody),
        lambda: signals.rewind(-(1 << 40), one, one),
    ):
        with pytest.raises(ValueError, match="expected a handle of a forest, got -"):
            call()
    with pytest.raises(ValueError, match=r"expected distinct branches, got \d+ twice"):
        observe(signals, [1, 2, 1], [1.0] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match="rewind: expected finite entropies"):
        signals.rewind(int(handles(1)[0]), one * np.nan, one)
    with pytest.raises(ValueError, match="expected an array with one axis, got 2"):
        signals.observe(nobody[None], one[None], one[None])


def test_a_rise_beyond_all_numbers_is_the_largest() -> None:
    signals = Signals(make_spec(fork=True))
    widths(signals, 1, [-3e38, 3e38])
    sketch = Sketch()
    sketch.add(np.array([np.inf, 1e300, -np.inf]))
    assert sketch.quantile(1.0) == 254  # the last bin's lower edge
    assert sketch.quantile(0.0) <= -254


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
        ({"group_window": 2**31 - 1, "tail_window": 2**31 - 1}, "windows of 1 to 1048576 tokens"),
        ({"alpha": float("nan")}, "expected numbers, got alpha=nan"),
        ({"cooldown": -1}, "cooldown, max_forks and min_tokens >= 0, got -1"),
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
