"""AdamW for bfloat16 weights: eight bytes a parameter in the place of sixteen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pyrl.ranks.sharded import local

CHUNK = 1 << 20
"""Elements that are in float32 at a time."""

DROPPED = 16
"""Bits of a float32 that a bfloat16 does not have."""


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) whose weights and moments are bfloat16, rounded at random.

    An update is mostly smaller than half the distance to the next bfloat16, so that rounding to the
    nearest would drop it. Here a number goes up with a probability of what it lies above the lower
    neighbour, so that sums are right in the mean (arXiv:2010.06192). The draws are fixed by `seed`,
    the step and the place of the parameter: a run that goes on repeats them. Of a weight in parts
    each process draws for its own.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        seed: int,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        )
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient; there is no closure to call."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, place)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        drawer = [parameter.device_mesh.get_local_rank()] if isinstance(parameter, DTensor) else []
        entropy = np.random.SeedSequence([self._seed, step, place, *drawer])
        generator = torch.Generator(parameter.device)
        generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        rate = group["lr"] / (1 - beta1**step)
        kept = parameter, state["exp_avg"], state["exp_avg_sq"]
        own = [local(tensor).view(-1) for tensor in (grad.contiguous(), *kept)]
        parts = [torch.split(tensor, CHUNK) for tensor in own]
        for g, w, m, v in zip(*parts, strict=True):
            gradient, weight = g.float(), w.float()
            first = m.float().lerp_(gradient, 1 - beta1)
            second = v.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scale = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
            weight.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, scale, value=-rate)
            noise = torch.randint(
                1 << DROPPED, g.shape, dtype=torch.int32, device=g.device, generator=generator
            )
            for target, value in ((w, weight), (m, first), (v, second)):
                target.copy_(_rounded(value, noise))


def _rounded(value: Tensor, noise: Tensor) -> Tensor:
    """A bfloat16 neighbour of each float32, the upper one where the noise carries over."""
    bits = value.view(torch.int32).add(noise)
    return bits.bitwise_and_(-1 << DROPPED).view(torch.float32)
