"""Normalised momentum: optimizers whose step is as long as the rate, whatever the gradient.

Both are of Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate
Policies (arXiv:2302.01734), here for a loss that falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrl.ranks.sharded import number


class Normalized(torch.optim.Optimizer):
    """w -= lr d / |d| with d = decay d + (1 - decay) g over all weights; the first d is g.

    A weight's state is d and `scale`, the factor lr / |d| of its last step.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay})
        self.told: dict[str, float] = {}
        """Metrics of the last step."""

    def _moving(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, weight and gradient of each weight that has one."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    yield group, weight, weight.grad

    def _turn(self) -> None:
        """Turn each d towards the gradient, and set the scale of the step along it."""
        square, moving = 0.0, [*self._moving()]
        for group, weight, gradient in moving:
            state = self.state[weight]
            if state:
                state["momentum"].lerp_(gradient, 1 - group["decay"])
            else:
                state["step"] = torch.tensor(0.0)
                state["momentum"] = gradient.clone()
            state["step"] += 1
            square += number(state["momentum"].double().square().sum())
        norm = math.sqrt(square)
        for group, weight, _ in moving:
            scale = group["lr"] / norm if norm else 0.0
            self.state[weight]["scale"] = torch.tensor(scale, dtype=torch.float64)
        self.told = {"optimizer/momentum_norm": norm}

    def _last(self, weight: Tensor) -> tuple[Tensor, float]:
        """d and scale of the weight's last step, which moved it by -scale d; it has had one."""
        state = self.state[weight]
        return state["momentum"], float(state["scale"])


class LookAhead(Normalized):
    """N-PG-IGT: the weights that sample and learn lie ahead of the iterates.

    x is the iterate of `Normalized`; w = x + decay / (1 - decay) (x - x before) is where samples
    and gradients are taken, so that the momentum of gradients is nearly one of x. The model is w,
    also where it is saved.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every weight that has a gradient; there is no closure to call."""
        for group, weight, _ in self._moving():
            if weight in self.state:  # back to the iterate
                momentum, scale = self._last(weight)
                weight.add_(momentum, alpha=scale * group["decay"] / (1 - group["decay"]))
        self._turn()
        for group, weight, _ in self._moving():
            momentum, scale = self._last(weight)
            weight.sub_(momentum, alpha=scale / (1 - group["decay"]))
        self.told["optimizer/ahead"] = self._ahead()

    def _ahead(self) -> float:
        """How far w is from the iterate."""
        square = 0.0
        for group, weight, _ in self._moving():
            momentum, scale = self._last(weight)
            ahead = scale * group["decay"] / (1 - group["decay"])
            square += number(momentum.double().square().sum()) * ahead**2
        return math.sqrt(square)


class Corrected(Normalized):
    """N-HARPG: before its step d gets the change of the gradient since the step before.

    The paper adds H (w - w before), a Hessian-vector product at a random point between the two.
    Second derivatives are none of this library's kernels, so the product is the difference of two
    gradients of the same batch, which is its mean over all these points. That takes another pass.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every weight that has a gradient.

        `closure` leaves the gradient of the same batch at the weights as they are then.
        """
        if closure is None:
            raise ValueError("N-HARPG: expected a closure that computes the gradient again")
        moving = [(weight, gradient.clone()) for _, weight, gradient in self._moving()]
        known = [pair for pair in moving if pair[0] in self.state]
        correction = self._correct(known, closure) if known else 0.0
        for weight, gradient in moving:
            weight.grad = gradient
        self._turn()
        for _, weight, _ in self._moving():
            momentum, scale = self._last(weight)
            weight.sub_(momentum, alpha=scale)
        self.told["optimizer/correction"] = correction

    def _correct(self, known: list[tuple[Tensor, Tensor]], again: Callable[[], Any]) -> float:
        """Add the product to each d; its norm."""
        here = [weight.clone() for weight, _ in known]
        for weight, _ in known:
            momentum, scale = self._last(weight)
            weight.add_(momentum, alpha=scale)
        with torch.enable_grad():
            again()
        square = 0.0
        for (weight, gradient), place in zip(known, here, strict=True):
            weight.copy_(place)
            if weight.grad is not None:
                product = gradient - weight.grad
                self._last(weight)[0].add_(product)
                square += number(product.double().square().sum())
        return math.sqrt(square)
