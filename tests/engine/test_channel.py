"""The ring between the process that samples and the one that asked."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyrl.engine.vllm.channel import RECORD, Channel


def records(first: int, count: int) -> np.ndarray:
    made_B = np.zeros(count, RECORD)
    made_B["ticket"] = first + np.arange(count) + 2**40
    made_B["position"], made_B["token"] = np.arange(count), 7 * np.arange(count) + first
    made_B["logprob"], made_B["entropy"] = -np.arange(count) / 3, first / 7
    made_B["truncated_logprob"], made_B["confidence"] = -1.5, 0.25
    return made_B


@pytest.fixture
def ring(tmp_path: Path) -> Channel:
    return Channel.create(tmp_path / "ring", 10)


def test_frames_come_in_order_and_once_however_they_wrap(ring: Channel) -> None:
    rng = np.random.default_rng(0)
    written, read = [], 0
    for frame in range(400):
        written.append(records(frame, int(rng.integers(0, 5))))
        ring.write(frame, written[-1], seconds=0)
        if frame % 2:
            for expected in written[read:]:
                found = ring.read()
                assert found is not None
                assert found.version == read
                np.testing.assert_array_equal(found.records_B, expected)
                read += 1
            assert ring.read() is None
    assert read == 400


def test_a_full_ring_waits_then_says_so_and_loses_nothing(ring: Channel) -> None:
    ring.write(1, records(0, 9), seconds=0)
    with pytest.raises(TimeoutError, match=r"ring of 10 records is full .* for 0.01 s"):
        ring.write(2, records(1, 0), seconds=0.01)
    found = ring.read()
    assert found is not None
    np.testing.assert_array_equal(found.records_B, records(0, 9))
    ring.write(2, records(1, 9), seconds=0)
    found = ring.read()
    assert found is not None
    assert (found.version, len(found.records_B)) == (2, 9)


def test_what_was_read_is_not_overwritten(ring: Channel) -> None:
    ring.write(1, records(0, 9), seconds=0)
    found = ring.read()
    assert found is not None
    ring.write(2, records(5, 9), seconds=0)
    np.testing.assert_array_equal(found.records_B, records(0, 9))


def test_a_ring_is_not_made_twice(tmp_path: Path, ring: Channel) -> None:
    with pytest.raises(FileExistsError):
        Channel.create(tmp_path / "ring", 10)


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_channel import records
from pyrl.engine.vllm.channel import Channel
ring = Channel(sys.argv[1])
for frame in range(2000):
    ring.write(frame, records(frame, frame % 5), seconds=60)
"""


def test_another_process_writes_while_this_one_reads(tmp_path: Path, ring: Channel) -> None:
    """2000 frames through 10 records: the writer waits for the reader hundreds of times."""
    here = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(tmp_path / "ring"), here]
    ) as writer:
        frame = 0
        while frame < 2000:
            ended = writer.poll() is not None
            found = ring.read()
            if found is None:
                assert not ended, f"the writer ended before frame {frame}"
                continue
            assert found.version == frame
            np.testing.assert_array_equal(found.records_B, records(frame, frame % 5))
            frame += 1
    assert writer.returncode == 0
