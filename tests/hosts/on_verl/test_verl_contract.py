"""Every name of verl that its adapter uses, with its signature: a rename fails here first."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from verl_host import (
    ABSENT,
    actor,
    agent_loop,
    agent_loop_tq,
    core_algos,
    door,
    llm_server,
    ray_trainer,
    replica,
    single_turn_agent_loop,
    verl_trees,
)

from pyrl.hosts.versions import require
from pyrl.presets import PRESETS

SIGNATURES: list[tuple[Any, list[str]]] = [
    (core_algos.register_policy_loss, ["name"]),
    (core_algos.register_adv_est, ["name_or_enum"]),
    (
        core_algos.compute_policy_loss_vanilla,
        [
            *("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode"),
            *("config", "rollout_is_weights"),
        ],
    ),
    (
        core_algos.agg_loss,
        [
            *("loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens"),
            *("global_batch_size", "loss_scale_factor"),
        ],
    ),
    (agent_loop.AgentLoopOutput.as_dict, ["self"]),
    (
        single_turn_agent_loop.SingleTurnAgentLoop.run,
        ["self", "sampling_params", "priority", "kwargs"],
    ),
]
"""What is called, or has a function of pyrl's in its place, and all its parameters."""

SOME: list[tuple[Any, list[str]]] = [
    (
        agent_loop.AgentLoopBase.__init__,
        ["trainer_config", "server_manager", "tokenizer", "data_config", "kwargs"],
    ),
    (
        llm_server.LLMServerClient.generate,
        ["request_id", "prompt_ids", "sampling_params"],
    ),
]
"""What is called with some of its parameters."""

FIELDS: list[tuple[Any, list[str]]] = [
    (
        agent_loop.AgentLoopOutput,
        [
            *("prompt_ids", "response_ids", "response_mask", "response_logprobs", "reward_score"),
            *("num_turns", "metrics", "extra_fields"),
        ],
    ),
    (replica.TokenOutput, ["token_ids", "log_probs", "stop_reason", "extra_fields"]),
]


def parameters(function: Any) -> list[str]:
    return [*inspect.signature(function).parameters]


@pytest.mark.parametrize(("function", "names"), SIGNATURES)
def test_functions_have_the_parameters_that_pyrl_counts_on(function: Any, names: list[str]) -> None:
    assert parameters(function) == names


@pytest.mark.parametrize(("function", "names"), SOME)
def test_functions_take_what_pyrl_gives_them(function: Any, names: list[str]) -> None:
    assert [name for name in names if name not in parameters(function)] == []


@pytest.mark.parametrize(("record", "names"), FIELDS)
def test_records_have_the_fields_that_pyrl_fills_or_reads(record: Any, names: list[str]) -> None:
    assert [name for name in names if name not in record.model_fields] == []


def test_options_of_losses_are_those_that_pyrl_checks() -> None:
    config = actor()
    assert [name for name in door.NUMBERS if name not in config] == []
    assert [name for name in door.LOSS_NUMBERS if name not in config.policy_loss] == []
    assert config.global_batch_info == {}


def test_losses_of_pyrl_have_verls_signature() -> None:
    own = parameters(core_algos.compute_policy_loss_vanilla)
    assert parameters(core_algos.get_policy_loss_fn("pyrl/gspo")) == own
    estimator = parameters(core_algos.get_adv_estimator_fn("pyrl/grpo"))
    assert estimator == ["token_level_rewards", "response_mask", "config", "index", "others"]


def test_verl_reads_a_loop_as_pyrl_writes_it() -> None:
    source = inspect.getsource(agent_loop_tq)
    for words in (
        "isinstance(output, list)",
        "output.as_dict()",
        'extra_fields["reward_extra_info"]',
    ):
        assert words in source
    assert "adv_estimator_fn(**adv_kwargs)" in inspect.getsource(ray_trainer.compute_advantage)
    assert "logprobs=config.calculate_log_probs" in source
    assert issubclass(verl_trees.TreeAgentLoop, single_turn_agent_loop.SingleTurnAgentLoop)


PLUGIN = """
import sys
from absent import stand_ins
with stand_ins(*{absent!r}):
    import verl
    from verl.trainer.ppo import core_algos
names = [n for n in core_algos.POLICY_LOSS_REGISTRY if n.startswith("pyrl/")]
print(len(names), "pyrl/given" in core_algos.ADV_ESTIMATOR_REGISTRY)
"""


def test_verl_loads_the_plugin_when_it_is_imported(tmp_path: Path) -> None:
    """By the entry point as pyproject.toml names it, from a package that is installed."""
    root = Path(__file__).resolve().parents[3]
    text = (root / "pyproject.toml").read_text("utf-8")
    (line,) = (
        text.partition('[project.entry-points."verl.plugins"]\n')[2].split("\n\n")[0].split("\n")
    )
    installed = tmp_path / "pyrl_plugin-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: pyrl-plugin\nVersion: 0\n")
    points = f"[verl.plugins]\n{line.replace(chr(34), '')}\n"
    (installed / "entry_points.txt").write_text(points)
    paths = [str(tmp_path), *sys.path]
    code = f"import sys; sys.path[:0] = {paths!r}\n" + PLUGIN.format(absent=ABSENT)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert ran.stdout.strip().split("\n")[-1] == f"{len(PRESETS)} True", ran.stderr


def test_a_release_that_pyrl_does_not_know_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pyrl.hosts.versions.version", lambda package: "0.11.0")
    expected = (
        r"^pyrl.hosts.verl: expected verl >=0.9,<0.10 to be installed, got 0.11.0 \(pip .*\)$"
    )
    with pytest.raises(ImportError, match=expected):
        require("verl")
    assert "got 0.11.0" in caplog.text
