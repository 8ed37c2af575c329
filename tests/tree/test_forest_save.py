"""A forest as bytes: it loads equal, and nothing else loads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from grow import append, finish, seeds, trunk
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.forest import Forest


def bushy() -> Forest:
    forest, branch = trunk(130)
    forks = forest.fork(branch, 70, seeds(1, 2)).tolist()
    append(forest, forks[0], [1.0] * 5, version=4)
    forest.prune(forks[1], 3)
    finish(forest, branch)
    forest.add_tree(np.array([1], np.int32))
    return forest


def test_a_saved_forest_loads_equal_and_goes_on_the_same_way() -> None:
    forest = bushy()
    data = forest.save()
    loaded = Forest.load(data)
    assert loaded == forest
    assert loaded.save() == data
    for twin in (forest, loaded):
        append(twin, twin.fork(int(twin.leaves()[0]), 65, seeds(8, 9))[0].item(), [2.0] * 80)
        twin.add_trunk(1, 3)
    assert loaded == forest
    assert loaded.open().tolist() == forest.open().tolist()
    loaded.add_trunk(1, 3)
    assert loaded != forest
    assert forest != "a forest"


def test_every_changed_or_missing_byte_is_noticed() -> None:
    data = bushy().save()
    for i in [*range(64), *range(64, len(data), 7)]:
        changed = bytearray(data)
        changed[i] ^= 1 << i % 8
        with pytest.raises(ValueError, match="forest bytes: "):
            Forest.load(bytes(changed))
        with pytest.raises(ValueError, match="forest bytes: expected"):
            Forest.load(data[:i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "expected a header of 28 bytes, got 0"),
        (lambda data: b"PK" + data[2:], "this is no saved forest"),
        (lambda data: data[:8] + b"\x07" + data[9:], "expected format 3, got 7"),
        (lambda data: data[:-1], "bytes after the header, got"),
        (lambda data: data + b"\0", "bytes after the header, got"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
    ],
)
def test_bad_bytes_are_named(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forest.load(change(bushy().save()))


def fnv1a(data: bytes) -> int:
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


def load_or_message(data: bytes) -> Forest | str:
    try:
        return Forest.load(data)
    except ValueError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_with_a_right_checksum_but_broken_structure_are_refused_or_harmless(
    data: st.DataObject,
) -> None:
    saved = bushy().save()
    payload = bytearray(saved[28:])
    for _ in range(data.draw(st.integers(1, 3))):
        # Behind the structure come the tokens, where any value is a token.
        payload[data.draw(st.integers(0, len(payload) - 1 - 135 * 16))] ^= data.draw(
            st.integers(1, 255)
        )
    forged = saved[:20] + fnv1a(payload).to_bytes(8, "little") + bytes(payload)
    loaded = load_or_message(forged)
    if isinstance(loaded, str):
        assert loaded.startswith("forest")
    else:
        loaded.check()
        assert len(loaded.segments(loaded.open()).leaf_segment_N) == len(loaded.open())
