"""Methods that differ in their loss or baseline: each trains, and its metrics say that it acted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from acting import ACTS, acting
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, weights, write_questions

from pyrl.report.metrics import MEANING
from pyrl.run.config import Run
from pyrl.run.directory import claim


def run_of(name: str, folder: Path, **settings: object) -> Run:
    """Two updates a step, whose second is off policy."""
    algorithm = tiny(acting(name), votes=ACTS[name].votes, updates=2)
    write_questions(folder / "questions.jsonl", 4)
    if name == "calibrl":  # the true answers are an expert's
        lines = (folder / "questions.jsonl").read_text().replace('"answer"', '"expert"')
        (folder / "questions.jsonl").write_text(lines)
    own = {"learning_rate": 3e-4} | ACTS[name].settings
    return tiny_run(folder, algorithm, **(own | settings))


@pytest.mark.parametrize("name", ACTS)
def test_each_of_a_family_trains_and_acts(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(run_of(name, tmp_path))
    before = weights(trainer)
    rows = [stepped(trainer) for _ in range(2)]
    after = weights(trainer)
    assert [part for part in before if torch.equal(before[part], after[part])] == []
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    how = ACTS[name]
    for row in rows:
        assert {m for m in row if m.startswith(("loss/", "advantage/"))} <= MEANING.keys()
    acted = sum(abs(row.get(metric, 0.0)) for row in rows for metric in how.metrics)
    assert 0 < acted / len(rows) < how.most


@pytest.mark.parametrize("name", ["siren", "opo", "dapo"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path, resume=True)
    claim(run)
    whole = make_trainer(run)
    stepped(whole)
    whole.save()
    whole.lock.release()
    again = make_trainer(run)
    assert again.step == 1
    rows = [stepped(trainer) for trainer in (whole, again)]
    assert rows[0]["loss"] == rows[1]["loss"] != 0
    assert same_bits(weights(whole), weights(again))
