"""Log: the rows of the finished steps, which a resumed run must find as they were written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyrl.report.metrics import size_before
from pyrl.run.lock import RunError

LOGS = ("metrics.jsonl", "completions.jsonl")


def digests(output: Path, before: int) -> dict[str, dict[str, Any]]:
    """For each file of the log: the bytes of its rows before a step, and their digest."""
    paths = {name: output / name for name in LOGS}
    return {n: _digest(p, size_before(p, before)) for n, p in paths.items() if p.exists()}


def check(output: Path, written: Mapping[str, Mapping[str, Any]]) -> None:
    """RunError names a file whose first rows are no longer those that `digests` read.

    Later rows may be there or not: their steps are made again. So may the whole file; `lost` says
    whether it is.
    """
    for name, recorded in written.items():
        path = output / name
        if path.exists() and _digest(path, recorded["bytes"]) != recorded:
            raise RunError(
                f"{path}: expected the {recorded['bytes']:,} bytes that the run had written with "
                f"its last checkpoint, they were cut or changed; put them back, or remove the file "
                f"to go on without these rows"
            )


def lost(output: Path, written: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Files of the log that had rows and are gone."""
    return [n for n, of in written.items() if of["bytes"] and not (output / n).exists()]


def _digest(path: Path, size: int) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": size, "sha256": hashlib.sha256(file.read(size)).hexdigest()}
