"""What docs/hosts.md says of verl runs as it stands there."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pages import ROOT, blocks
from test_verl_trees import Manager, config, rollout
from verl_host import OmegaConf, core_algos, door, verl_trees

from pyrl.presets import PRESETS

PAGE = (ROOT / "docs" / "hosts.md").read_text("utf-8")


def named(row: str) -> list[str]:
    """The names in the second cell of the row of the table that begins so."""
    (line,) = [line for line in PAGE.split("\n") if line.startswith(f"| {row}")]
    return re.findall(r"`(\w+)`", line.split("|")[2])


def test_the_file_of_loops_grows_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks("docs/hosts.md", "verl", "yaml")
    (entry,) = OmegaConf.to_container(OmegaConf.create(text))
    manager = Manager()
    queue = rollout(manager, monkeypatch, entry=entry)
    assert queue.tags["question"] == {"status": "finished"}
    assert len(queue.rows) == 11
    assert len(manager.server.asked) == entry["votes"] == 32


def test_the_options_of_the_command_do_not_contradict_each_other() -> None:
    command = blocks("docs/hosts.md", "verl", "bash")[2]
    given = dict(re.findall(r"([\w.]+)=(\S+)", command))
    settings: Any = config()
    for name, value in given.items():
        OmegaConf.update(settings, name, int(value) if value.isdigit() else value, force_add=True)
    verl_trees.check_config(settings)
    assert settings.actor_rollout_ref.rollout.n == 16


def test_the_module_with_other_numbers_registers_its_loss() -> None:
    (text,) = blocks("docs/hosts.md", "verl", "python")
    exec(text, {})
    assert core_algos.get_policy_loss_fn("pyrl/gspo_wide").args[1].bounds.low == 1e-3


def test_tables_name_what_is_carried() -> None:
    carried = [name for name, preset in PRESETS.items() if not door.refusal(preset())]
    assert sorted(named("carried")) == sorted(carried)
    others = named("need the sampler's") + named("need entropies")
    assert sorted(others) == sorted({*PRESETS} - {*carried})
