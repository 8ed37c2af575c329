"""Doors in other trainers, without these: who imports them, and what is said where they lack."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

PYRL = Path(__file__).parents[1] / "pyrl"
HOSTS = ("trl", "verl", "openrlhf")


def test_importing_pyrl_imports_no_host() -> None:
    code = f"import pyrl, pyrl.hosts, sys; print({set(HOSTS)} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_one_file_imports_trl() -> None:
    importing = re.compile(r"^\s*(import trl|from trl)\b", re.M)
    found = [p for p in PYRL.rglob("*.py") if importing.search(p.read_text("utf-8"))]
    assert [p.relative_to(PYRL).as_posix() for p in found] == ["hosts/trl/release.py"]


def test_without_trl_one_sentence_says_which_releases_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for name in [name for name in sys.modules if name.startswith("pyrl.hosts.trl")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ImportError, match=r"^pyrl.hosts.trl: expected TRL 1.14 to 1.16 .* not inst"
    ):
        importlib.import_module("pyrl.hosts.trl")
