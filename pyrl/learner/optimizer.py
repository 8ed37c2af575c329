"""Optimizers by name: what `--optimizer` chooses, and what a checkpoint keeps of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyrl.learner.adamw import RoundingAdamW
from pyrl.learner.momentum import Corrected, LookAhead, Normalized

if TYPE_CHECKING:
    from pyrl.run.config import Run

NORMALIZED: dict[str, type[Normalized]] = {"n_pg_igt": LookAhead, "n_harpg": Corrected}


def learning_rate(run: Run, step: int, spent: float | None = None) -> float:
    """The rate of a step (from 0): a linear warm-up, then the schedule down to its end.

    `spent`: the share of its total that a run has spent, and with it the place in the schedule;
    None: the steps after the warm-up say it.
    """
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    done = (step - run.warmup_steps) / max(1, run.steps - run.warmup_steps)
    done = done if spent is None else spent
    rest = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    end = 1.0 if run.schedule == "constant" else run.min_learning_rate
    return run.learning_rate * (end + (1 - end) * rest[run.schedule])


def make_optimizer(parameters: Sequence[Tensor], run: Run) -> torch.optim.Optimizer:
    """The optimizer that the run names. ValueError: it does not work on weights of this type."""
    rounds = parameters[0].dtype == torch.bfloat16
    if run.optimizer != "adamw":
        if rounds:
            raise ValueError(
                f"weights: expected float32 with --optimizer {run.optimizer}, got bfloat16: only "
                f"adamw rounds updates so that none of them is lost"
            )
        return NORMALIZED[run.optimizer](parameters, lr=run.learning_rate, decay=run.betas[0])
    lr, betas, decay = run.learning_rate, run.betas, run.weight_decay
    if rounds:
        return RoundingAdamW(parameters, lr=lr, betas=betas, weight_decay=decay, seed=run.seed)
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=decay)


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The optimizer's tensors and step counts by the names of these parameters."""
    names = {id(parameter): name for name, parameter in named.items()}
    tensors: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        counts[name] = float(state["step"])
        tensors |= {f"{name}.{part}": state[part] for part in state if part != "step"}
    return tensors, counts


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, float],
) -> None:
    """Take over what `optimizer_state` returned; ValueError if it is of another model."""
    unknown = sorted(set(counts) - set(named))
    if unknown:
        raise ValueError(f"optimizer state: expected parameters of the model, got {unknown[:3]}")
    states: dict[str, dict[str, Tensor]] = {
        name: {"step": torch.tensor(count)} for name, count in counts.items()
    }
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if not tensor.ndim:  # a number
            states[name][part] = tensor.clone()
            continue
        if tensor.shape != named[name].shape:
            raise ValueError(
                f"optimizer state: {key}: expected shape {tuple(named[name].shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        states[name][part] = tensor.to(named[name], copy=True)
    for name, state in states.items():
        optimizer.state[named[name]] = state
