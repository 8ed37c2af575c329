"""How to add an engine: a class with the methods of `pyrl.engine.Engine`, and a line in ENGINES.

This one keeps no cache: each step reads every running path from its first token. It is slow, and
samples what every engine must sample.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driven_engine import EOS, PROMPTS, llama
from numpy.typing import NDArray
from tiny_run import tiny_run, trained
from torch import Tensor
from toy_rollout import answers, assert_forgotten, check_budgets, rollout
from transformers import PreTrainedModel

from pyrl.engine import (
    NO_TOKENS,
    RUNNING,
    STOPPED,
    TRUNCATED,
    Branches,
    Dtype,
    Engine,
    Sampled,
    Work,
)
from pyrl.engine.admission import Admission, find
from pyrl.engine.hf import HFEngine
from pyrl.engine.launch import ENGINES, Carry, Request
from pyrl.engine.sync import Shared
from pyrl.fork import Flat, Fork, TopEntropy
from pyrl.logits.sample_tokens import sample_tokens
from pyrl.logits.sampling import Exclude, Sampling
from pyrl.methods import METHODS
from pyrl.models import room
from pyrl.run.parsing import parse_run


@dataclass
class Row:
    prompt: NDArray[np.int32]
    seed: int
    limit: int
    retain: bool
    tokens: list[int]
    finish: int = RUNNING
    exclude: NDArray[np.int32] = field(default_factory=lambda: NO_TOKENS)


class PlainEngine:
    """The shortest engine over a transformers model; it shares the learner's weights."""

    dtype: Dtype = "float32"

    def __init__(self, model: PreTrainedModel, eos: Collection[int], max_rows: int) -> None:
        self.model, self.eos, self.max_rows = model, eos, max_rows
        vocabulary = model.get_input_embeddings().num_embeddings
        self.admission = Admission(vocabulary, room(model))
        self.rows: dict[int, Row] = {}
        self.version = self.computed = 0

    def start(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def submit(self, branches: Branches) -> None:
        prompts = self.admission.submit(branches, self.rows)
        columns = (branches.branch_B, branches.prompt_B, branches.seed_B, branches.limit_B)
        for branch, p, seed, limit in zip(*(x.tolist() for x in columns), strict=True):
            self.rows[branch] = Row(prompts[p], seed, limit, branches.retain, [])

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        row = find(parent, self.rows)
        finished = row.finish != RUNNING
        self.admission.fork(
            keep, len(row.tokens), branch_B, seed_B, exclude, finished=finished, known=self.rows
        )
        fork = replace(row, finish=RUNNING, exclude=exclude.copy())
        for branch, seed in zip(branch_B.tolist(), seed_B.tolist(), strict=True):
            self.rows[branch] = replace(fork, seed=seed, tokens=row.tokens[:keep])

    def finish(self, branch_B: NDArray[np.int64]) -> None:
        for branch in branch_B.tolist():
            self._end(branch, find(branch, self.rows), STOPPED)

    def abort(self, branch_B: NDArray[np.int64]) -> None:
        for branch in branch_B.tolist():
            find(branch, self.rows)
            del self.rows[branch]

    def step(self) -> Sampled:
        open_rows = (item for item in self.rows.items() if item[1].finish == RUNNING)
        running = dict(islice(open_rows, self.max_rows))
        logits_BV = torch.empty(len(running), self.admission.vocabulary, dtype=self.model.dtype)
        for b, row in enumerate(running.values()):
            logits_BV[b] = self._logits(row)
        drawn = sample_tokens(
            logits_BV,
            np.array([row.seed for row in running.values()], np.uint64),
            np.array([len(row.tokens) for row in running.values()], np.int64),
            self.sampling,
            Exclude.of_rows([row.exclude for row in running.values()]),
        )
        for (branch, row), token in zip(running.items(), drawn.token_B.tolist(), strict=True):
            row.tokens.append(token)
            row.exclude = NO_TOKENS
            spent = len(row.tokens) == row.limit
            if spent or token in self.eos:
                self._end(branch, row, STOPPED if token in self.eos else TRUNCATED)
        return Sampled(
            np.array(list(running), np.int64),
            drawn.token_B,
            drawn.logprob_B,
            drawn.entropy_B,
            drawn.confidence_B,
            np.array([row.finish for row in running.values()], np.uint8),
            drawn.truncated_logprob_B,
            drawn.rest_logprob_B,
        )

    def _end(self, branch: int, row: Row, finish: int) -> None:
        row.finish = finish
        if not row.retain:
            del self.rows[branch]

    def _logits(self, row: Row) -> Tensor:
        path_T = torch.tensor([*row.prompt.tolist(), *row.tokens])
        self.computed += len(path_T)
        with torch.no_grad():
            logits_V: Tensor = self.model(input_ids=path_T[None], use_cache=False).logits[0, -1]
        return logits_V

    def load_weights(self, weights: Iterable[tuple[str, Any]] | None, version: int) -> None:
        if self.rows:
            raise RuntimeError(f"load_weights: {len(self.rows)} branches are open; abort them")
        self.version = version

    def weight_version(self) -> int:
        return self.version

    def work(self) -> Work:
        return Work(prompt_tokens=0, decode_tokens=self.computed, copied_tokens=0)

    def close(self) -> None:
        self.rows.clear()


def launch_plain(request: Request) -> tuple[Engine, Carry]:
    engine = PlainEngine(request.model, request.eos, request.max_rows)
    return engine, Shared(engine)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENGINES["plain"] = launch_plain, until the test ends."""
    monkeypatch.setitem(ENGINES, "plain", launch_plain)


@pytest.mark.parametrize("fork", [Flat(), TopEntropy(mask_tail=2)], ids=repr)
@pytest.mark.parametrize("max_rows", [3, 64])
def test_it_grows_the_trees_of_the_embedded_engine(fork: Fork, max_rows: int) -> None:
    model = llama()
    tokens = []
    for engine in (PlainEngine(model, [EOS], max_rows), HFEngine(model, [EOS])):
        run = rollout(engine, PROMPTS, fork=fork, votes=10, limit=12)
        forest = run.run()
        check_budgets(run)
        assert_forgotten(engine)
        tokens.append([row[:3] for row in answers(forest)])
    assert tokens[0] == tokens[1]


@pytest.mark.usefixtures("plain")
def test_a_run_names_it_and_trains_with_it(tmp_path: Path) -> None:
    trainer, rows = trained(tiny_run(tmp_path, engine="plain"), 2)
    assert isinstance(trainer.engine, PlainEngine)
    assert trainer.engine.weight_version() == trainer.step == 2
    for metrics in rows:
        assert 0 < metrics["sampling/sampling_logp_difference/max"] < 1e-3
        assert metrics["tree/leaves"] == 12


@pytest.mark.usefixtures("plain")
def test_the_command_line_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "demo", "--data", "demo:train", "--engine"]
    assert parse_run([*options, "plain"], "ttrl", METHODS["ttrl"]()).engine == "plain"
    with pytest.raises(SystemExit) as stop:
        parse_run([*options, "plane"], "ttrl", METHODS["ttrl"]())
    assert stop.value.code == 2
    assert "there is no engine 'plane'; the nearest is 'plain'" in capsys.readouterr().err


def test_what_it_cannot_sample_is_refused_as_by_every_engine() -> None:
    engine = PlainEngine(llama(), [EOS], max_rows=4)
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="prompt of 5 tokens fits the model's 64 positions"):
        engine.submit(Branches(PROMPTS[:1], one, one, one.astype(np.uint64), one + 60))
    with pytest.raises(ValueError, match="branch 7 is unknown"):
        engine.fork(7, 0, one, one.astype(np.uint64))
