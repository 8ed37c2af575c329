"""What TRL's trainer can be asked for and trees cannot give is refused by name, at construction."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from demo_trl import EACH, arguments, config, digits, questions
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import GRPOConfig

from pyrl.algorithm import Algorithm
from pyrl.hosts.trl import TreeGRPOTrainer
from pyrl.hosts.trl.options import LOSS
from pyrl.hosts.versions import require
from pyrl.methods import METHODS
from pyrl.replay import Replay

OTHER = {
    "use_vllm": True,
    "use_transformers_continuous_batching": True,
    "repetition_penalty": 1.1,
    "cache_implementation": "static",
    "scale_rewards": "none",
    "multi_objective_aggregation": "normalize_then_sum",
    "generation_kwargs": {"num_beams": 2},
}
"""Options that contradict, whichever loss trains."""

OF_LOSS: dict[str, Any] = {
    "beta": 0.1,
    "loss_type": "grpo",
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "delta": 2.0,
    "importance_sampling_level": "sequence",
    "num_iterations": 2,
    "mask_truncated_completions": True,
    "off_policy_mask_threshold": 0.5,
    "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "top_entropy_quantile": 0.2,
    "entropy_coef": 0.1,
    "use_adaptive_entropy": True,
    "sync_ref_model": True,
    "router_aux_loss_coef": 0.1,
    "fp16": True,
}


def method(votes: int = EACH, **sample: Any) -> Algorithm:
    base = METHODS["ettrl"]()
    return replace(base, sample=replace(base.sample, votes=votes, train=votes, **sample))


def refused(match: str, args: GRPOConfig, **options: Any) -> None:
    own = {name: options.pop(name) for name in ("algorithm", "loss") if name in options}
    with pytest.raises(ValueError, match=match):
        TreeGRPOTrainer(**(arguments(args) | options), **own)


@pytest.mark.parametrize("name", OTHER)
def test_an_option_of_other_samplers_or_advantages(name: str, tmp_path: Path) -> None:
    refused(f"^{name}: expected .* got ", config(tmp_path, **{name: OTHER[name]}))


def test_every_option_of_the_hosts_loss_beside_the_methods(tmp_path: Path) -> None:
    assert OF_LOSS.keys() == set(LOSS)
    for name, value in OF_LOSS.items():
        args = config(tmp_path)
        setattr(args, name, value)
        refused(f"^{name}: expected .* takes its place", args, algorithm=method(), loss="pyrl")


def test_sizes_of_batches_and_groups(tmp_path: Path) -> None:
    args = config(tmp_path)
    refused("^num_generations: expected at most sample.votes, 2, got 4", args, algorithm=method(2))
    args.per_device_train_batch_size = 6
    refused("^num_generations: expected a divisor of .*, 6, got 4", args)
    parts = {"gradient_accumulation_steps": 2, "steps_per_generation": 3}
    refused("^steps_per_generation: .* of .*, 2, got 3", config(tmp_path, **parts), loss="pyrl")
    for name in ("max_tokens_per_prompt", "max_seconds"):
        ragged = method(**{name: 100})
        refused(f"^sample.{name}: expected 0, got 100", config(tmp_path), algorithm=ragged)


def test_responses_of_earlier_steps(tmp_path: Path) -> None:
    replaying = replace(method(), replay=Replay(capacity=4))
    refused(r"^replay.capacity: expected 0 in TRL", config(tmp_path), algorithm=replaying)


def test_other_writers_of_responses_and_evaluation_without_rewards(tmp_path: Path) -> None:
    for name in ("tools", "rollout_func", "environment_factory"):
        refused(f"^{name}: expected None", config(tmp_path), **{name: [digits]})
    without = {"reward_funcs": None, "eval_dataset": questions(4)}
    refused("^eval_dataset: expected reward_funcs", config(tmp_path), **without)


def test_a_loss_and_an_equivalence_that_there_are_not(tmp_path: Path) -> None:
    refused("^loss: expected 'host' or 'pyrl', got 'both'", config(tmp_path), loss="both")
    with pytest.raises(ValueError, match="equivalence"):
        TreeGRPOTrainer(**arguments(config(tmp_path)), equivalence="fuzzy")


def test_a_tokenizer_of_another_vocabulary(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small = LlamaConfig(vocab_size=4, intermediate_size=8, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(small)
    refused(
        "^processing_class: expected ids below 4, .* got a tokenizer", config(tmp_path), model=model
    )


def test_a_group_that_a_selection_cuts(tmp_path: Path) -> None:
    class Two:
        def __call__(self, leaves: Any, train: int) -> Any:
            return leaves.group_N.searchsorted(range(leaves.groups))

    args = config(tmp_path)
    trainer = TreeGRPOTrainer(**arguments(args), algorithm=replace(method(), select=Two()))
    with pytest.raises(ValueError, match=r"^select: expected num_generations, 4, .* kept \[1"):
        trainer.train()
    with pytest.raises(ValueError, match=r"pyrl_0\.safetensors: expected what pyrl saves"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))


def test_a_release_that_the_door_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    require("trl")
    monkeypatch.setattr("pyrl.hosts.versions.version", lambda name: "2.0.0")
    with pytest.raises(ImportError, match=r"expected trl >=1\.14,<1\.17 .* got 2\.0\.0"):
        require("trl")
    assert importlib.metadata.version("trl")[:4] in ("1.14", "1.15", "1.16")
