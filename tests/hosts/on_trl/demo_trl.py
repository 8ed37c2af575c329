"""The demo model and its questions under TRL's trainers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from pyrl.hosts.trl import TreeGRPOTrainer
from pyrl.models import load_model
from pyrl.prompts import load_prompts

EACH = 4
"""Responses to a question."""


def config(folder: Path, **options: Any) -> GRPOConfig:
    """One step on four questions, without clipping of the gradient."""
    given = {
        "max_steps": 1,
        "num_generations": EACH,
        "per_device_train_batch_size": 4 * EACH,
        "max_completion_length": 12,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-4,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return GRPOConfig(str(folder), **(given | options))


def questions(count: int = 32) -> Dataset:
    """Questions of the demo with their true answers, which only some rewards read."""
    found = load_prompts("demo:train", load_model("demo")[1], max_tokens=40, limit=count)
    return Dataset.from_list([{"prompt": p.text, "answer": p.answer} for p in found])


def digits(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that differs between most responses."""
    return [len(set(text)) / (1 + len(text)) for text in completions]


def arguments(args: GRPOConfig, **options: Any) -> dict[str, Any]:
    """What both trainers take."""
    torch.manual_seed(0)
    model, tokenizer = load_model("demo")
    given = {
        "model": model,
        "reward_funcs": digits,
        "args": args,
        "train_dataset": questions(),
        "processing_class": tokenizer,
    }
    return given | options


class Gradients(TrainerCallback):
    """Notes the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def trained(trainer: GRPOTrainer) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """Train it: the rows of its log and the gradients of its steps."""
    noted = Gradients()
    trainer.add_callback(noted)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], noted.steps


class Samples(TreeGRPOTrainer):
    """Notes the responses of each generation."""

    noted: list[list[list[int]]]

    def _generate_single_turn(self, *given: Any) -> Any:
        ids, logprobs = super()._generate_single_turn(*given)
        self.noted = [*vars(self).get("noted", []), ids]
        return ids, logprobs


class Replays(GRPOTrainer):
    """The host's own trainer on responses that were noted."""

    noted: list[list[list[int]]]

    def _generate_single_turn(self, *given: Any) -> Any:
        return self.noted.pop(0), None
