"""Methods that differ in their loss or baseline: each trains, and its metrics say that it acted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("name", ["siren", "opo", "dapo", "ares", "riskpo", "ttrl_guard"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path, resume=True)
    claim(run)
    whole = make_trainer(run)
    stepped(whole)
    whole.save()
    whole.lock.release()
    again = make_trainer(run)
    assert again.step == 1
    assert again.states.state_dict() == whole.states.state_dict()
    rows = [stepped(trainer) for trainer in (whole, again)]
    assert rows[0]["loss"] == rows[1]["loss"] != 0
    assert same_bits(weights(whole), weights(again))


def test_confidence_in_a_prompt_is_the_model_s(tmp_path: Path) -> None:
    """The mean log-prob of its tokens but the first, at the sampling temperature."""
    trainer = make_trainer(run_of("progrpo", tmp_path))
    rows = trainer.train_step().leaves.rows
    found_T = trainer.learner.before(rows)("prompt_logprob_T")
    own_N = np.bincount(rows.leaf_T)
    for leaf in (0, len(own_N) - 1):
        begin, end = rows.cu_seqlens[leaf], rows.cu_seqlens[leaf + 1] - own_N[leaf]
        prompt = torch.from_numpy(rows.input_I[begin:end].astype(np.int64))
        with torch.no_grad():
            logits_TV = trainer.model(prompt[None]).logits[0, :-1]
        logprob_TV = (logits_TV / trainer.algorithm.sample.temperature).log_softmax(-1)
        expected = logprob_TV.gather(1, prompt[1:, None]).mean()
        assert found_T[rows.leaf_T == leaf] == pytest.approx(expected.item(), abs=1e-5)


def test_a_run_without_passes_refuses_what_reads_them(tmp_path: Path) -> None:
    run = run_of("progrpo", tmp_path, old_logprobs="engine")
    with pytest.raises(ValueError, match="got 'engine': ConfidenceReweight needs prompt_logprob_T"):
        make_trainer(run)
