"""Directories of runs that nobody has trained: their logs, alarms, responses and trees."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from pyrl._core.tree import Forest
from pyrl.report import Completion
from pyrl.report.metrics import MEANING
from pyrl.report.saved_trees import FORMAT

SETTINGS = {
    "method": "echo",
    "model": "demo",
    "data": "demo:train",
    "seed": 0,
    "fork": {"max_width": 4},
    "loggers": [],
}

QUESTION = {
    "text": "1+1=",
    "answer": "2",
    "label": "2",
    "label_right": 1.0,
    "share": 0.34,
    "margin": 0.1,
}
LEAF: dict[str, Any] = {
    "elects": False,
    "right": 0.0,
    "reward": 0.0,
    "weight": 1.0,
    "log_mass": None,
    "trains": True,
}


def write_run(
    directory: Path, steps: int, *, alarms: Sequence[tuple[int, str]] = (), text: str = "12"
) -> Path:
    """A run of so many steps with every metric that there is, each a wave of its own."""
    directory.mkdir(parents=True)
    (directory / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"steps": steps}))
    noise = random.Random(0)
    rows: list[dict[str, Any]] = [{"step": 0, "eval/held-out/greedy": 0.4}]
    rows += [
        {"step": step}
        | {
            name: 0.5 + 0.3 * math.sin(step / steps * 6 + n) + 0.1 * noise.random()
            for n, name in enumerate(MEANING)
        }
        for step in range(1, steps + 1)
    ]
    rows[-1]["eval/held-out/greedy"] = 0.9
    said = Completion("1+1=", text, "2", "2", 1.0, "2")
    _write_rows(directory / "metrics.jsonl", rows)
    _write_rows(
        directory / "completions.jsonl", [{"step": row["step"]} | asdict(said) for row in rows[1:]]
    )
    _write_rows(directory / "alarms.jsonl", [{"step": at, "alarm": told} for at, told in alarms])
    (directory / "report.json").write_text("{}")
    return directory


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_trees(
    directory: Path, step: int, words: Sequence[str], *, trunks: int, leaves: int, length: int
) -> Path:
    """One tree of `trunks` samples, each forked in the middle to `leaves` leaves of `length`
    tokens, and a pruned branch. Token n reads `words[n]`."""
    draw = np.random.default_rng(step)
    forest = _grown(draw, len(words), trunks, leaves, length)
    leaf_N, pruned = forest.leaves().tolist(), forest.open().tolist()
    paths = [forest.path(branch) for branch in (*leaf_N, *pruned)]
    parts = [[words[token] for token in path.tokens.tolist()] for path in paths]
    known = np.concatenate([np.full(len(p.tokens), n < len(leaf_N)) for n, p in enumerate(paths)])
    logprob = np.concatenate([path.logprob for path in paths])
    advantage = np.concatenate([np.full(len(p.tokens), n % 3 - 1.0) for n, p in enumerate(paths)])
    columns = {
        "forest": np.frombuffer(forest.save(), np.uint8),
        "end_T": np.concatenate([np.cumsum(list(map(len, p))) for p in parts]).astype(np.int32),
        "advantage_T": np.where(known, advantage, np.nan).astype(np.float32),
        "after_T": np.where(known, logprob + draw.normal(0, 0.1, len(known)), np.nan).astype("f4"),
    }
    about = [LEAF | {"answer": "2", "elects": True, "right": 1.0, "reward": 1.0}]
    about += [LEAF | {"answer": "3"}, LEAF | {"answer": None}]
    told = [about[n % 3] for n in range(len(leaf_N))] + [{"pruned": "low confidence"}] * len(pruned)
    record = {
        "format": FORMAT,
        "step": step,
        "spelled": True,
        "questions": [QUESTION],
        "branches": [{"text": "".join(p)} | fact for p, fact in zip(parts, told, strict=True)],
    }
    path = directory / "trees" / f"{step}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(columns, path, {"record": json.dumps(record)})
    return path


def _grown(draw: np.random.Generator, words: int, trunks: int, leaves: int, length: int) -> Forest:
    forest = Forest()
    forest.add_tree(np.arange(3, dtype=np.int32))

    def grow(branches: list[int], tokens: int) -> None:
        for _ in range(tokens):
            forest.append(
                np.array(branches),
                draw.integers(0, words, len(branches)).astype(np.int32),
                -draw.exponential(0.5, len(branches)).astype(np.float32),
                draw.exponential(0.5, len(branches)).astype(np.float32),
                draw.uniform(0.5, 1, len(branches)).astype(np.float32),
            )

    for trunk in range(trunks):
        first = forest.add_trunk(0, trunk)
        grow([first], length // 2)
        others = forest.fork(first, length // 2, np.arange(1, leaves + 1, dtype=np.uint64)).tolist()
        grow([first, *others], 1)
        kept = [first, *others[:-1]]
        grow(kept, length - length // 2 - 1)
        forest.finish(np.array(kept), np.ones(len(kept), np.uint8))
    return forest
