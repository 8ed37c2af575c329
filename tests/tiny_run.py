"""Runs of the demo model that take seconds, for tests of what learns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pyrl import demo
from pyrl.algorithm import Algorithm
from pyrl.demo.run import ttrl
from pyrl.evaluate import Scoring
from pyrl.report import Progress
from pyrl.run.config import Run
from pyrl.train import Trainer

SCORING = Scoring(temperature=0.6, samples=2, votes=3, low_temperature=0.3, max_tokens=21)


def write_questions(path: Path, count: int, answers: Sequence[str | None] | None = None) -> Path:
    """The first questions of the demo with their true answers, or these (None: without)."""
    rows = [json.loads(line) for line in demo.QUESTIONS["train"].read_text().splitlines()[:count]]
    for row, answer in zip(rows, answers or [row["answer"] for row in rows], strict=True):
        row["answer"] = answer
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny(
    algorithm: Algorithm, *, votes: int = 6, train: int | None = None, updates: int = 1
) -> Algorithm:
    """With few votes, answers of the demo's length, and updates that are on policy."""
    sample = replace(algorithm.sample, votes=votes, train=train or votes, max_tokens=21)
    return replace(algorithm, sample=sample, updates_per_step=updates)


def tiny_run(folder: Path, algorithm: Algorithm | None = None, **settings: Any) -> Run:
    """Two questions a step, of the file `questions.jsonl` in the folder (four, if it is not).

    The rate is small because the first steps of Adam move all weights by it: 1e-4 is the end of
    this model.
    """
    data = folder / "questions.jsonl"
    if not data.exists():
        write_questions(data, 4)
    values: dict[str, Any] = {
        "model": "demo",
        "data": str(data),
        "method": "ttrl",
        "algorithm": algorithm or tiny(ttrl()),
        "output": folder / "run",
        "steps": 3,
        "prompts_per_step": 2,
        "learning_rate": 1e-6,
        "warmup_steps": 0,
        "schedule": "constant",
        "threads": 1,
        "device": "cpu",
        "extractor": "whole",
        "equivalence": "exact",
        "chat": False,
        "loggers": (),
        "eval_limit": 0,
    }
    return Run(**values | settings)


def make_trainer(run: Run) -> Trainer:
    return Trainer(run, quiet(), scoring=SCORING)


def quiet() -> Progress:
    return Progress(console=Console(quiet=True))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def trained(run: Run, steps: int) -> tuple[Trainer, list[dict[str, Any]]]:
    """After so many steps, and the metrics of each."""
    trainer = make_trainer(run)
    return trainer, [stepped(trainer) for _ in range(steps)]


def stepped(trainer: Trainer) -> dict[str, Any]:
    """One training step; its metrics."""
    return trainer.observe(trainer.train_step())


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
