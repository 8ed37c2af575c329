"""Sharded: a model of which each process keeps a part of every weight.

torch's FSDP2 (`fully_shard`, arXiv:2304.11277) splits weights, gradients and what the optimizer
remembers. A pass gathers one layer at a time; a rollout, which has no gradients, gathers them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from pyrl.ranks import Ranks

Found = TypeVar("Found")


class Held:
    """A model that this process holds in whole."""

    sharded = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, use: Callable[[PreTrainedModel], Found]) -> Found:
        """What comes of a pass through the model: all weights that `use` reads are there."""
        return use(self.model)

    def gather(self) -> None:
        """Have all weights here until the next pass; any process may then use the model alone."""

    def part(self) -> None:
        """Give back what is another process's: parameters are those that the optimizer has."""

    def weights(self) -> dict[str, Tensor] | None:
        """All weights by name where the model itself has parts of them."""
        return None


class Sharded(Held):
    """A model in parts; all processes make the same calls in the same order."""

    sharded = True

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], ranks: Ranks) -> None:
        """Keep this process's part of the weights, which are the same in all processes."""
        super().__init__(model)
        self._ranks = ranks
        device = model.device
        if device.type == "cuda":  # FSDP is on the thread's device, not on that of the weights
            torch.cuda.set_device(device)
        mesh = DeviceMesh.from_group(ranks.group, device.type)
        self._pass = _Pass(model)
        parts = [fully_shard(module, mesh=mesh) for module in (*layers, self._pass)]
        self._parts: list[FSDPModule] = parts
        # FSDP fetches what came before in its last forward passes, and these differ: processes
        # sample different numbers of tokens.
        for part, before in zip(parts, [parts[-1], *parts], strict=False):
            part.set_modules_to_backward_prefetch([before])
            # The sum of the passes' gradients, also on gloo, which knows no average.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self(lambda model: None)  # FSDP learns from the first pass which module has the others

    def __call__(self, use: Callable[[PreTrainedModel], Found]) -> Found:
        self.part()
        found: Found = self._pass(use)
        return found

    def gather(self) -> None:
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def part(self) -> None:
        for part in self._parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()

    def weights(self) -> dict[str, Tensor] | None:
        """On the CPU, at the first process; in others nothing."""
        self.part()
        known: dict[int, Tensor] = {}
        found = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in known:  # a tied one is one
                known[id(tensor)] = whole(tensor.detach(), keep=not self._ranks.rank)
            found[name] = known[id(tensor)]
        return found


class _Pass(nn.Module):
    """FSDP's outermost module: its forward is all that is done with the model in a pass.

    The loss from hidden states reads the head's weight outside of the model's own forward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, use: Callable[[PreTrainedModel], Any]) -> Any:
        return use(self.model)


def local(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def number(tensor: Tensor) -> float:
    """The number that a tensor without axes is, also where its parts are to be summed."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """All of a tensor in parts, on the CPU, where it is to be kept; one that is whole as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else full.new_empty(0)


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a whole tensor in the parameter's type, on its device, and of it the same part."""
    copy = tensor.to(parameter.device, parameter.dtype, copy=True)
    if not isinstance(parameter, DTensor):
        return copy
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(copy, mesh, placements, src_data_rank=None)
