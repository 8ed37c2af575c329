"""What docs/hosts.md says of OpenRLHF runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from openrlhf_host import ppo_actor, vllm_engine
from pages import blocks
from test_openrlhf_losses import own
from test_openrlhf_trees import actor, installed, responses
from whole_replies import Server

__all__ = ["installed", "own"]


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    (text,) = blocks("docs/hosts.md", "OpenRLHF", "python")
    path = tmp_path / "tree_agent.py"
    path.write_text(text)
    return path


def test_the_file_of_the_page_is_an_executor_and_a_setup_hook(agent: Path) -> None:
    (group,) = responses(actor(vllm_engine._load_agent_executor(str(agent)), Server()), "a b")
    assert len(group) == 13
    before = ppo_actor.PolicyLoss.forward
    names: dict[str, object] = {}
    exec(agent.read_text(), names)
    setup = names["setup"]
    assert callable(setup)
    setup()
    assert ppo_actor.PolicyLoss.forward is not before


def test_the_options_of_the_command_are_openrlhfs() -> None:
    command = blocks("docs/hosts.md", "OpenRLHF", "bash")[0].replace("\\\n", " ")
    options = [word for word in shlex.split(command) if re.match(r"--\w+\.", word)]
    source = Path(vllm_engine.__file__).parents[2] / "cli" / "train_ppo_ray.py"
    text = source.read_text("utf-8")
    assert len(options) == 6
    assert [option for option in options if f'"{option}"' not in text] == []
