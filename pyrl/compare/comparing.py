"""Comparing: everything that a comparison does, in its order, and what it leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from pyrl.compare.contestants import TRUE, Comparison
from pyrl.compare.directory import claim
from pyrl.compare.page import page
from pyrl.compare.picture import save_picture
from pyrl.compare.result import result, sampled_tokens
from pyrl.compare.runs import Say, Task, do_all
from pyrl.compare.tables import facts, tables, title
from pyrl.compare.untrained import before, more_votes
from pyrl.report import Progress
from pyrl.run.evaluation import TRAINED
from pyrl.run.interrupt import RESUME
from pyrl.run.lock import Lock, one_process

FILES = ("comparison.html", "comparison.png", "comparison.md", "comparison.json")


def compare(comparison: Comparison, say: Say) -> dict[str, Any]:
    """Run all that is missing, and leave `FILES`; the record that is in the last of them.

    RunError: the directory is in use, has another comparison, or one of its runs failed.
    KeyboardInterrupt: it goes on when it is resumed.
    """
    one_process()
    with Lock(comparison.settings.output):
        claim(comparison)
        try:
            record = _record(comparison, say)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(RESUME) from None
        save(record, comparison.settings.output)
    return record


def _record(comparison: Comparison, say: Say) -> dict[str, Any]:
    do_all(comparison, [Task(None, seed) for seed in comparison.seeds], say)
    controls = [contestant for contestant in comparison.contestants if contestant.control]
    if controls and TRAINED not in before(comparison, 0):
        say("The training questions have no true answers: no control trains on them.")
        known = [c for c in comparison.contestants if c.label != TRUE or not c.control]
        comparison = replace(comparison, contestants=tuple(known))
    places = range(len(comparison.contestants))
    do_all(comparison, [Task(n, seed) for seed in comparison.seeds for n in places], say)
    say("the untrained model at other temperatures, and with more votes")
    tokens = comparison.budget.amount
    if comparison.budget.kind == "seconds":
        tokens = sampled_tokens(comparison)
    with Progress(console=Console(file=StringIO())) as progress:
        more = more_votes(comparison, tokens, progress)
    return result(comparison, more)


def save(record: Mapping[str, Any], output: Path) -> None:
    """Write the files, each whole or not at all."""
    picture = output / "comparison.png.part"
    save_picture(record, picture, title(record))
    _write(output / "comparison.html", page(record, picture.read_bytes()))
    os.replace(picture, output / "comparison.png")
    parts = [f"# {title(record)}", "", facts(record), "", *(t.markdown() for t in tables(record))]
    _write(output / "comparison.md", "\n".join(parts))
    _write(output / "comparison.json", json.dumps(record, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)
