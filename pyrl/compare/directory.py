"""The directory of a comparison: whose it is, and whether it is the same one again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from pyrl.compare.contestants import Comparison
from pyrl.run.config import Run
from pyrl.run.directory import FREE
from pyrl.run.lock import LOCK, RunError
from pyrl.run.parsing import settings_of

PLAN = "compare.yaml"
ELSEWHERE = FREE - {"steps", "eval_data", "eval_samples"}
"""Settings that a resumed comparison may change, as each of its runs may."""
FORMAT = 1
"""What the plan and the results of a comparison have in them."""


def claim(comparison: Comparison) -> None:
    """Write the plan, or see that it is the one that was written.

    RunError: the directory has another comparison, one of another version, or no comparison to
    resume.
    """
    settings = comparison.settings
    path = settings.output / PLAN
    plan = _plan(comparison)
    if settings.resume:
        if not path.is_file():
            raise RunError(f"{settings.output}: nothing to resume, there is no {PLAN}")
        _check_same(path, plan)
        return
    if settings.output.exists() and {p.name for p in settings.output.iterdir()} - {LOCK}:
        raise RunError(
            f"{settings.output}: expected a new or empty directory; choose another --output, or go "
            f"on with --resume"
        )
    settings.output.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(yaml.safe_dump(plan, sort_keys=False, allow_unicode=False), "utf-8")
    os.replace(part, path)


def _plan(comparison: Comparison) -> dict[str, Any]:
    """What decides the results, as YAML has it."""
    return {
        "format": FORMAT,
        "budget": str(comparison.budget),
        "seeds": comparison.settings.seeds,
        "temperatures": list(comparison.settings.temperatures),
        "contestants": {c.label: _settings(c.run) for c in comparison.contestants},
    }


def _settings(run: Run) -> dict[str, Any]:
    return {name: value for name, value in settings_of(run).items() if name not in ELSEWHERE}


def _check_same(path: Path, plan: dict[str, Any]) -> None:
    try:
        before = yaml.safe_load(path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(before, dict) or "format" not in before:
        raise RunError(f"{path}: expected the plan of a comparison, got {before!r}")
    if before["format"] != FORMAT:
        raise RunError(
            f"{path}: expected a comparison of format {FORMAT}, got format {before['format']}: "
            f"another version of pyrl wrote it"
        )
    for name, value in plan.items():
        if before.get(name) == value:
            continue
        was, now = (
            ", ".join(v) if isinstance(v, dict) else repr(v) for v in (before.get(name), value)
        )
        raise RunError(
            f"{path}: expected the {name} that the comparison began with ({was}), got "
            f"{now if now != was else 'other settings of the same names'}"
        )
