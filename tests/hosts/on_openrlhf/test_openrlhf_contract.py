"""Every name of OpenRLHF that its adapter uses, with its signature: a rename fails here first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from openrlhf_host import (
    agent,
    door,
    experience_maker,
    losses,
    openrlhf_trees,
    ppo_actor,
    samples_generator,
    vllm_engine,
)

from pyrl.hosts.versions import require
from pyrl.presets import ppo

EXECUTE = [
    *("self", "prompt", "label", "sampling_params", "max_length", "hf_tokenizer", "llm_engine"),
    "images",
]
FORWARD = [
    *("self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs"),
    *("dp_size", "batch_num_tokens", "global_batch_size"),
]
GENERATOR = samples_generator.SamplesGenerator
SIGNATURES: list[tuple[Any, list[str]]] = [
    (agent.AgentExecutorBase.execute, EXECUTE),
    (
        vllm_engine.RolloutRayActor.generate,
        ["self", "prompt_token_ids", "sampling_params", "multi_modal_data"],
    ),
    (
        vllm_engine.RolloutRayActor.generate_responses,
        [
            *("self", "prompt", "label", "sampling_params", "max_length", "hf_tokenizer"),
            *("num_samples", "images"),
        ],
    ),
    (GENERATOR._process_response_into_experience, ["self", "response", "generate_kwargs"]),
    (GENERATOR.generate_eval_samples, ["self", "generate_kwargs"]),
    (
        GENERATOR._dispatch_prompts_to_vllm,
        ["self", "prompts", "labels", "images", "generate_kwargs"],
    ),
    (
        experience_maker.RemoteExperienceMaker.compute_advantages_and_returns,
        ["self", "experiences"],
    ),
    (losses.PolicyLoss.forward, FORWARD),
    (
        losses.aggregate_loss,
        [
            *("loss", "loss_mask", "token_level_loss", "dp_size", "batch_num_tokens"),
            "global_batch_size",
        ],
    ),
]
"""What is called, or has a function of pyrl's in its place, and all its parameters."""


def parameters(function: Any) -> list[str]:
    return [*inspect.signature(function).parameters]


@pytest.mark.parametrize(("function", "names"), SIGNATURES)
def test_functions_have_the_parameters_that_pyrl_counts_on(function: Any, names: list[str]) -> None:
    assert parameters(function) == names


def test_functions_of_pyrl_have_the_same() -> None:
    assert parameters(openrlhf_trees.TreeExecutor.execute) == EXECUTE
    assert parameters(door._forward(ppo(), "token-mean")) == FORWARD


def test_options_of_the_loss_are_those_that_pyrl_checks() -> None:
    options = vars(ppo_actor.PolicyLoss())
    assert {name: options[name] for name in door.OWN} == door.OWN
    corrections = {name: options[name] for name in door.CORRECTIONS if name in options}
    assert len(corrections) == 1
    assert corrections.items() <= door.CORRECTIONS.items()
    assert options["token_level_loss"] is True


def test_openrlhf_reads_a_response_as_pyrl_writes_it() -> None:
    source = inspect.getsource(GENERATOR._process_response_into_experience)
    for name in ("observation_tokens", "action_ranges", "rollout_log_probs", "extra_logs"):
        assert f'"{name}"' in source
    assert "asyncio.gather(*tasks)" in inspect.getsource(vllm_engine.RolloutRayActor)
    actor = inspect.getsource(ppo_actor)
    assert "rollout_log_probs=experience.rollout_log_probs" in actor


def test_a_release_that_pyrl_does_not_know_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyrl.hosts.versions.version", lambda package: "0.12.0")
    expected = r"^pyrl.hosts.openrlhf: expected openrlhf >=0.10.4,<0.12 to be installed, got 0.12.0"
    with pytest.raises(ImportError, match=expected):
        require("openrlhf")
