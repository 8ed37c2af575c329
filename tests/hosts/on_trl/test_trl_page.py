"""The lines of docs/hosts.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[3] / "docs/hosts.md").read_text("utf-8")


def test_the_lines_of_the_page_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = PAGE.partition("\n## TRL\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.S)
    made: dict[str, Any] = {}
    exec(compile(block, "docs/hosts.md", "exec"), made)
    rows = [row for row in made["trainer"].state.log_history if "train_loss" in row]
    assert rows[0]["step"] == 3
    assert made["trainer"].algorithm.sample.temperature == 0.6
