"""The door trains: methods, with their loss or the host's; its log, and what a checkpoint keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_trl import EACH, arguments, config, digits, trained
from torch import Tensor

from pyrl.hosts.trl import TreeGRPOTrainer
from pyrl.methods import METHODS


def tree_trainer(folder: Path, method: str, loss: Any, **options: Any) -> TreeGRPOTrainer:
    """Three steps, with twice as many votes as leaves that train."""
    algorithm = METHODS[method]()
    algorithm = replace(algorithm, sample=replace(algorithm.sample, votes=2 * EACH, train=EACH))
    given = {"max_steps": 3, "max_completion_length": 24, "seed": 3} | options
    args = config(folder, **given)
    of_host = arguments(args, reward_funcs=None)
    answers = {"extractor": "whole", "equivalence": "exact"}
    return TreeGRPOTrainer(**of_host, algorithm=algorithm, loss=loss, **answers)


def weights(trainer: TreeGRPOTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "loss"),
    [("echo", "pyrl"), ("ettrl", "pyrl"), ("ttrl", "pyrl"), ("ettrl", "host")],
)
def test_a_method_trains_in_the_host(method: str, loss: Any, tmp_path: Path) -> None:
    trainer = tree_trainer(tmp_path, method, loss)
    before = weights(trainer)
    rows, gradients = trained(trainer)
    after = weights(trainer)
    assert len(rows) == len(gradients) == 3
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(math.isfinite(value) for row in rows for value in row.values() if value is not None)
    assert all(row["tree/leaves"] == 4 * 2 * EACH for row in rows)
    assert all(0 < row["vote/majority_ratio"] <= 1 for row in rows)
    assert any("vote/label_accuracy" in row for row in rows)
    assert all(row["rewards/method_reward/mean"] == row["reward"] for row in rows)
    if method == "ettrl":
        assert all(row["tree/forks"] > 0 for row in rows)
    if loss == "pyrl":
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)
        assert rows[2]["kl"] > 1e-6
        assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in rows)
        assert all(row["pack/unique"] < row["pack/tokens"] for row in rows)
    assert trainer.model.config._attn_implementation != "pyrl"


def test_several_updates_of_a_generation_in_micro_batches(tmp_path: Path) -> None:
    cut = {
        "per_device_train_batch_size": EACH,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    }
    whole = {
        "per_device_train_batch_size": 2 * EACH,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
    }
    _, of_parts = trained(tree_trainer(tmp_path, "ettrl", "pyrl", max_steps=2, **cut))
    _, of_whole = trained(tree_trainer(tmp_path, "ettrl", "pyrl", max_steps=2, **whole))
    for part, other in zip(of_parts, of_whole, strict=True):
        assert part.keys() == other.keys() != {}
        for name, gradient in other.items():
            assert torch.equal(part[name], gradient)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    saved = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = tree_trainer(tmp_path / "whole", "echo", "pyrl", **saved)
    trained(whole)
    resumed = tree_trainer(tmp_path / "resumed", "echo", "pyrl", **saved)
    first = weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again = weights(resumed)
    for name, tensor in weights(whole).items():
        assert torch.equal(again[name], tensor), name
        assert not torch.equal(first[name], tensor), name


def test_reward_functions_of_the_host_are_called_as_it_calls_them(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def right(prompts: Any, completions: Any, answer: Any, **more: Any) -> list[float | None]:
        seen.append((len(prompts), len(completions)))
        found = zip(completions, answer, strict=True)
        return [None if not text else float(text == true) for text, true in found]

    async def slowly(completions: Any, log_metric: Any, **more: Any) -> list[float]:
        log_metric("asked", len(completions))
        return digits(completions)

    args = config(tmp_path, reward_weights=[1.0, 0.5], eval_strategy="steps", eval_steps=1)
    given = arguments(args, reward_funcs=[right, slowly])
    given["eval_dataset"] = given["train_dataset"].select(range(4))
    algorithm = METHODS["ettrl"]()
    algorithm = replace(algorithm, sample=replace(algorithm.sample, votes=EACH, train=EACH))
    trainer = TreeGRPOTrainer(**given, algorithm=algorithm)
    rows, _ = trained(trainer)
    assert rows[0]["asked"] == 4 * EACH
    expected = rows[0]["rewards/right/mean"] + 0.5 * rows[0]["rewards/slowly/mean"]
    assert rows[0]["reward"] == pytest.approx(expected, rel=0.2)
    assert seen[0] == (4 * EACH, 4 * EACH)
    (evaluation,) = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert "eval_tree/leaves" not in evaluation
