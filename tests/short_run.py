"""A run of seconds: the packaged model on a few short questions, with every part at work."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

TIMINGS = (
    *(
        "step_time",
        "cpu_time",
        "ahead/idle",
        "seconds",
        "seconds of training",
        "old_logprobs/seconds",
        "log",
    ),
)
"""What differs between equal runs; `log` has digests of rows with their timings."""

SETTINGS = shlex.split("""
    --model demo --device cpu --threads 1 --chat False --extractor whole --equivalence exact
    --prompts-per-step 4 --sample.votes 8 --sample.train 8 --sample.max-tokens 12
    --sample.temperature 1.2 --learning-rate 1e-4 --eval-samples 2 --eval-limit 0 --loggers
""")

ECHO = shlex.split("""
    --fork.cooldown 2 --fork.group-window 2 --fork.min-tokens 1
    --prune.tail-window 2 --prune.decline-run 2 --prune.spike-run 1 --loss.kl.coef 0
""")


def write_questions(path: Path, *, answers: bool = True) -> Path:
    """Ten questions to sort eight digits."""
    digits = random.Random(0)
    rows = []
    for _ in range(10):
        text = "".join(digits.choices("0123456789", k=8))
        row = {"prompt": f"{text}="} | ({"answer": "".join(sorted(text))} if answers else {})
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return path


def outcome(output: Path, step: int) -> dict[str, Any]:
    """All that a finished run leaves, apart from timings."""
    final = output / f"checkpoint-{step}"
    kept = {
        name: (final / name).read_bytes()
        for name in (
            "model.safetensors",
            "optimizer.safetensors",
            "signals.bin",
            "states.safetensors",
        )
    }
    return {
        **kept,
        "record": _timeless(json.loads((final / "pyrl.json").read_text())["record"]),
        "metrics": _rows(output / "metrics.jsonl"),
        "completions": _rows(output / "completions.jsonl"),
        "report": _timeless(json.loads((output / "report.json").read_text())),
        "model": (output / "model" / "model.safetensors").read_bytes(),
        "trees": {path.name: path.read_bytes() for path in sorted(output.glob("trees/*"))},
    }


def _rows(path: Path) -> list[Any]:
    return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {n: v for n, v in value.items() if n not in TIMINGS and "timing/" not in n}
        return {name: _timeless(v) for name, v in kept.items()}
    return [_timeless(v) for v in value] if isinstance(value, list) else value
