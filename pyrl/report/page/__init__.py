"""The page of a run: one HTML file with its curves, alarms, questions and trees, and no network."""

from __future__ import annotations

import html
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Any

import tyro

from pyrl.report.metrics import MEANING
from pyrl.report.page.run_record import run_record
from pyrl.report.page.sections import SECTIONS

PAGE = "report.html"
"""Its name in the directory of a run."""

SCRIPTS = (
    "dom.js",
    "colors.js",
    "curves.js",
    "tree.js",
    "map.js",
    "facts.js",
    "viewer.js",
    "glance.js",
    "tables.js",
    "page.js",
)
"""In this order: a script knows those before it."""

MOST_RUNS = 6
"""Side by side: as many as there are colours of lines."""


@dataclass(frozen=True)
class PageSettings:
    """Write the report of runs as one HTML file that needs no network: curves, the vote's health,
    alarms, what it cost, saved trees, questions with labels and answers, settings."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Output directories of runs, finished or not; several are shown side by side."""
    output: Path | None = None
    """Where to write it, a file or a directory; None: report.html in that of the (first) run."""


def write_page(directories: Sequence[Path], path: Path | None = None) -> Path:
    """Write the page of these runs, whole or not at all; where it is: in the first one by default.

    ValueError says which file of which run cannot be read, and why.
    """
    if not 1 <= len(directories) <= MOST_RUNS:
        raise ValueError(f"expected 1 to {MOST_RUNS} runs side by side, got {len(directories)}")
    path = directories[0] if path is None else path
    path = path / PAGE if path.is_dir() else path
    names = _names(directories)
    runs = [
        run_record(directory, name, len(directories))
        for directory, name in zip(directories, names, strict=True)
    ]
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(_page(runs), "utf-8")
    os.replace(part, path)
    return path


def _page(runs: Sequence[dict[str, Any]]) -> str:
    used = {name for run in runs for name in run["curves"]}
    data = {
        "runs": runs,
        "sections": [section.plain() for section in SECTIONS],
        "meaning": {name: said for name, said in MEANING.items() if name in used},
    }
    title = " and ".join(run["name"] for run in runs)
    return Template(_asset("page.html")).substitute(
        title=html.escape(f"pyrl: {title}"),
        style=_asset("style.css"),
        script="\n".join(map(_asset, SCRIPTS)),
        data=_inline(data),
    )


def _inline(data: object) -> str:
    """JSON that no text of a run can end: every sign that HTML knows is escaped."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _names(directories: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two have the same."""
    last = [directory.resolve().name for directory in directories]
    count = Counter(last)
    return [
        str(directory) if count[name] > 1 else name
        for directory, name in zip(directories, last, strict=True)
    ]
