"""Moments: what an optimizer remembers of each parameter, by names and in whole, for a checkpoint.

It does not depend on how many processes have parts of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.ranks.sharded import like, whole


def moments(
    optimizer: torch.optim.Optimizer, model: PreTrainedModel, *, keep: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors and step counts by parameter name. `keep`: this process is to have those that are in
    parts; in others they are empty."""
    names = {id(p): n for n, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        counts[name] = float(state["step"])
        for part, tensor in state.items():
            if part != "step":
                tensors[f"{name}.{part}"] = whole(tensor, keep=keep)
    return tensors, counts


def load_moments(
    optimizer: torch.optim.Optimizer,
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, float],
) -> None:
    """Take over what `moments` returned; ValueError if it is of another model."""
    named = dict(model.named_parameters())
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
        states[name][part] = like(tensor, named[name])
    for name, state in states.items():
        optimizer.state[named[name]] = state
