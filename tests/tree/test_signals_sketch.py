"""The quantiles of a sketch against those of the sorted values."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from signals_reference import bin_edges

from pyrl._core.tree import Sketch

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
