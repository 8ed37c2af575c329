"""Run record: what the page has of a run, read from the files of its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pyrl.report.metrics import Row, read_metrics, read_rows, step_of
from pyrl.report.page.thinning import curves
from pyrl.report.page.trees import questions
from pyrl.report.saved_trees import read_trees, saved_steps

POINTS = 300
"""Of a curve, at most; runs side by side share them."""
TEXT_BYTES = 600_000
"""Of responses in the table of questions, of all runs together."""
TREE_BYTES = 2_500_000
"""Of trees, of all runs together."""
TOKEN_BYTES = 45
"""Of a token of a tree, about."""
LONGEST = 4_000
"""Characters of a text in the table; of a longer one its beginning and its end are shown."""


def run_record(directory: Path, name: str, runs: int) -> dict[str, Any]:
    """A run of `runs` that are shown side by side, by this name, as JSON has it.

    ValueError says which file is none of a run, or none that this version of pyrl can read.
    """
    settings = _settings(directory)
    rows = _rows(directory)
    last = step_of(rows[-1])
    return {
        "name": name,
        "title": f"{settings['method']} on {settings['model']}, {settings['data']}",
        "steps": settings["steps"],
        "last": last,
        "finished": last >= settings["steps"] and (directory / "report.json").is_file(),
        "curves": curves(rows, max(50, POINTS // runs)),
        "alarms": _alarms(directory),
        "settings": dict(_flat(settings)),
        "completions": _completions(directory, TEXT_BYTES // runs),
        "trees": _trees(directory, TREE_BYTES // runs),
    }


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "run.yaml"
    if not directory.is_dir():
        raise ValueError(f"{directory}: expected the output directory of a run, there is none")
    if not path.is_file():
        raise ValueError(f"{directory}: expected the output directory of a run, it has no run.yaml")
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected the settings of a run, got {settings!r}")
    for name, kind in (("method", str), ("model", str), ("data", str), ("steps", int)):
        if not isinstance(settings.get(name), kind):
            raise ValueError(
                f"{path}: expected the setting {name!r}, got {settings.get(name)!r}: this is no "
                f"run of this version of pyrl"
            )
    return settings


def _rows(directory: Path) -> list[Row]:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{directory}: expected the log of a run, it has no metrics.jsonl")
    rows = read_metrics(path)
    if not rows:
        raise ValueError(f"{path}: expected at least one step, got none: the run has just begun")
    return rows


def _alarms(directory: Path) -> list[Row] | None:
    """What alarms said, once each; None of a run that kept no record of it."""
    path = directory / "alarms.jsonl"
    if not path.is_file():
        return None
    said = {(step_of(row), str(row.get("alarm"))): None for row in read_rows(path)}
    return [{"step": step, "alarm": alarm} for step, alarm in said]


def _completions(directory: Path, most: int) -> dict[str, Any]:
    """Rows of completions.jsonl: the newest ones, and as many of earlier steps as fit."""
    path = directory / "completions.jsonl"
    rows = read_rows(path) if path.is_file() else []
    texts = [{name: _excerpt(value) for name, value in row.items()} for row in rows]
    return {"rows": _spread(texts, most), "all": len(rows)}


def _excerpt(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= LONGEST:
        return value
    half = LONGEST // 2
    return f"{value[:half]} [... {len(value) - 2 * half:,} characters ...] {value[-half:]}"


def _trees(directory: Path, most: int) -> dict[str, Any]:
    """Saved trees that fit, of steps all over the run, and of how many steps there are any."""
    saved = saved_steps(directory)
    found: dict[int, list[dict[str, Any]]] = {}
    used = 0
    for step, path in (saved[n] for n in _everywhere(len(saved))):
        step_trees = read_trees(path)
        share = most // (TOKEN_BYTES * len(step_trees.record["questions"]))
        trees = list(questions(step_trees, share))
        used += len(json.dumps(trees))
        if used > most and found:
            break
        found[step] = trees
    return {"shown": [tree for step in sorted(found) for tree in found[step]], "steps": len(saved)}


def _spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    used, kept = 0, []
    for n in _everywhere(len(rows)):
        used += len(json.dumps(rows[n]))
        if used > most:
            break
        kept.append(n)
    return [rows[n] for n in sorted(kept)]


def _everywhere(count: int) -> list[int]:
    """All ordinals in an order of which every beginning is spread over them: the last one, the
    first one, the middle, the quarters, and so on."""
    order = [count - 1, 0][:count]
    parts = 2
    while parts < 2 * count:
        order += [(2 * k + 1) * count // parts for k in range(parts // 2)]
        parts *= 2
    return [n for n in dict.fromkeys(order) if 0 <= n < count]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values, a list as its text."""
    flat: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append(
                (f"{prefix}{name}", value if isinstance(value, int | float) else _text(value))
            )
    return flat


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return None if value is None else str(value)
