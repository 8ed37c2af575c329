"""docs/seeds.md: the names, sources and tests on it are there, and so is every method's paper."""

from __future__ import annotations

import re
from pathlib import Path

from pyrl.methods.about import about, named
from pyrl.methods.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
REGISTRY = Registry()
KIN = {
    *("ttrl_unique", "grpo_unique", "treerl", "grpo", "dr_grpo", "rloo", "reinforce"),
    *("reinforce_pp", "reinforce_pp_baseline", "opo", "gpg", "dapo", "cispo", "sapo", "dppo"),
    *("dppo_kl", "gspo", "gmpo", "top_entropy"),
}
"""Methods beside the seeds: what these are derived from or compared with."""


def rows() -> list[list[str]]:
    """Cells of the rows that name something."""
    lines = (ROOT / "docs" / "seeds.md").read_text("utf-8").splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    return [row for row in cells if len(row) == 5 and "`" in row[2]]


def test_what_the_page_names_is_of_the_paper_that_it_names() -> None:
    for paper, what, names, _, tests in rows():
        ids = set(re.findall(r"\d{4}\.\d{5}", paper))
        assert len(ids) == 1, paper
        assert what.strip()
        for name in re.findall(r"`(\w+)`", names):
            papers = {found.paper for found in named(name, REGISTRY)}
            assert papers - {""} <= ids, name
            assert papers & ids or name == "known"
        (file,) = re.findall(r"`([\w/.]+)`", tests)
        assert (ROOT / file).is_file(), file


def test_every_method_of_a_paper_is_on_the_page() -> None:
    on_page = {name for row in rows() for name in re.findall(r"`(\w+)`", row[2])}
    methods = [about(entry, REGISTRY) for entry in REGISTRY.entries("method")]
    with_paper = {found.entry.name for found in methods if found.paper}
    assert with_paper - on_page == KIN
