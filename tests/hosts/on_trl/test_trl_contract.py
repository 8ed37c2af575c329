"""Contract: every name of TRL's trainer that the door uses, so that a rename fails here."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from demo_trl import arguments, config
from trl import GRPOConfig, GRPOTrainer

from pyrl.hosts import trl as door
from pyrl.hosts.trl.options import CREDIT, LOSS, SAMPLING

METHODS = {
    "__init__": (
        "model reward_funcs args train_dataset eval_dataset processing_class "
        "reward_processing_classes callbacks optimizers quantization_config peft_config tools "
        "rollout_func environment_factory"
    ),
    "training_step": "model inputs num_items_in_batch",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "_generate_and_score_completions": "inputs",
    "_generate_single_turn": "prompt_ids images multimodal_fields",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_save_checkpoint": "model trial",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_get_output_dir": "trial",
}
"""What the door overrides or calls, with the first parameters of each."""

LOGPROBS = {"input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"}
"""What `_get_per_token_logps_and_entropies` is called with."""

ATTRIBUTES = (
    "accelerator args model num_generations ref_model reward_funcs reward_weights state "
    "aux_loss_enabled _is_vlm _metrics _step _tokenizer"
)
OPTIONS = (
    "bf16 fp16 generation_kwargs gradient_accumulation_steps gradient_checkpointing "
    "max_completion_length min_p num_generations output_dir per_device_train_batch_size seed "
    "steps_per_generation temperature top_k top_p"
)
FOLDER = Path(door.__file__).parent


def read_from(owner: str) -> set[str]:
    """Attributes that the door's code reads of this expression."""
    trees = [ast.parse(path.read_text("utf-8")) for path in FOLDER.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value) == owner}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    return GRPOTrainer(**arguments(config(tmp_path_factory.mktemp("host"))))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_the_host_begins_with_these_parameters(name: str) -> None:
    found = [*inspect.signature(vars_of(GRPOTrainer, name)).parameters][1:]
    assert found[: len(METHODS[name].split())] == METHODS[name].split()


def vars_of(owner: Any, name: str) -> Any:
    return inspect.getattr_static(owner, name)


def test_log_probs_are_asked_for_by_these_names() -> None:
    of_host = GRPOTrainer._get_per_token_logps_and_entropies
    source = inspect.getsource(of_host) + inspect.getsource(GRPOTrainer)
    assert (
        "per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(" in source
    )
    given = set(inspect.signature(of_host).parameters)
    assert given >= LOGPROBS or {"args", "kwargs"} <= given


def test_the_table_has_every_attribute_that_is_read(host: GRPOTrainer) -> None:
    of_door = set(vars(door.TreeGRPOTrainer)) | {*METHODS, "_get_per_token_logps_and_entropies"}
    own = of_door | {"algorithm", "loss", "learner", "trees", "updates", "_base", "_grown"}
    own |= {"_rows", "_reward_N"}
    of_class = {"_learner", "_accumulation", "_micro", "_parts", "_state"}
    used = (read_from("self") | read_from("trainer")) - own - of_class
    assert used == set(ATTRIBUTES.split())
    assert all(hasattr(host, name) for name in used)


def test_the_table_has_every_option_that_is_read() -> None:
    known = {field.name for field in fields(GRPOConfig)}
    assert read_from("args") | read_from("self.args") <= set(OPTIONS.split())
    assert known >= {*OPTIONS.split(), *SAMPLING, *CREDIT, *LOSS}


def test_rows_come_with_these_names() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for name in ("completion_mask", "advantages", "num_items_in_batch", "tool_mask"):
        assert f'"{name}"' in source
    assert "advantages.dim() == 1" in inspect.getsource(GRPOTrainer._compute_loss)
