"""Rows of finished steps that were cut or changed are noticed before a run goes on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tiny_run import make_trainer, tiny_run

from pyrl.run.config import Run
from pyrl.run.directory import RunError, find_start
from pyrl.run.log import LOGS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps, as it is resumed."""
    made = tiny_run(tmp_path_factory.mktemp("log"), steps=2)
    make_trainer(made).train()
    return replace(made, resume=True, steps=3)


def changes(whole: bytes) -> Iterator[bytes]:
    """Without rows, or some of them; a row more; a bit flipped anywhere."""
    dice = random.Random(len(whole))
    yield b""
    yield whole[: dice.randrange(1, len(whole))]
    yield whole.partition(b"\n")[2]
    yield b"\n" + whole
    for _ in range(20):
        at = dice.randrange(len(whole))
        yield whole[:at] + bytes([whole[at] ^ (1 << dice.randrange(8))]) + whole[at + 1 :]


@pytest.mark.parametrize("name", LOGS)
def test_a_changed_log_is_refused(name: str, run: Run) -> None:
    path = run.output / name
    whole = path.read_bytes()
    for changed in changes(whole):
        path.write_bytes(changed)
        with pytest.raises(RunError, match=rf"{name}: expected the {len(whole):,} bytes .*cut or"):
            find_start(run)
    path.write_bytes(whole)
    assert find_start(run) is not None


def test_later_rows_may_be_whole_or_torn(run: Run) -> None:
    path = run.output / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "rew')
    assert find_start(run) is not None
    path.write_bytes(whole)


def test_a_log_that_is_gone_is_said_and_begun_again(run: Run) -> None:
    for name in LOGS:
        (run.output / name).rename(run.output / f"{name}.kept")
    trainer = make_trainer(run)
    said = " ".join(trainer.first_words)
    trainer.train()
    for name in LOGS:
        assert f"{name} is gone: the log goes on without the rows of finished steps" in said
        assert b'"step": 3' in (run.output / name).read_bytes()
