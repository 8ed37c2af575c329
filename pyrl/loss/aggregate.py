"""Aggregate: from the losses of tokens to one number, by a weight per response."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
from torch import Tensor

RESPONSES = ("offset_N1",)
"""What an aggregate needs unless it says that it needs nothing."""


class Aggregate(Protocol):
    """The weight of each token of a response in the loss, which is the weighted sum of all."""

    def __call__(self, tokens_N: Tensor) -> Tensor:
        """Weights, float64 [N], from the tokens (int64 [N]) of each response that take part.

        B responses have any.
        """


@dataclass(frozen=True)
class TokenMean:
    """Mean over all tokens: 1 / n (arXiv:2503.14476). Long responses weigh more."""

    needs = ()

    def __call__(self, tokens_N: Tensor) -> Tensor:
        return _inverse(tokens_N.sum().expand_as(tokens_N))


@dataclass(frozen=True)
class TokenSum:
    """Sum over all tokens."""

    needs = ()

    def __call__(self, tokens_N: Tensor) -> Tensor:
        return torch.ones_like(tokens_N, dtype=torch.float64)


@dataclass(frozen=True)
class SeqMeanTokenMean:
    """Mean over responses of the mean over their tokens: 1 / (B l_i) (arXiv:2402.03300)."""

    needs = RESPONSES

    def __call__(self, tokens_N: Tensor) -> Tensor:
        return _inverse(tokens_N.count_nonzero() * tokens_N)


@dataclass(frozen=True)
class SeqMeanTokenSum:
    """Mean over responses of the sum over their tokens: 1 / B."""

    needs = RESPONSES

    def __call__(self, tokens_N: Tensor) -> Tensor:
        return _inverse(tokens_N.count_nonzero().expand_as(tokens_N))


@dataclass(frozen=True)
class SeqMeanTokenSumNorm:
    """Mean over responses of the sum over their tokens / length: 1 / (B length).

    Dr. GRPO (arXiv:2503.20783). Divides by B, as newer verl does; older verl did not.
    """

    length: float
    """A constant, such as the largest response length: not the length of any response."""
    needs = RESPONSES

    def __post_init__(self) -> None:
        if not 0 < self.length < inf:
            raise ValueError(f"length: expected a finite number > 0, got {self.length}")

    def __call__(self, tokens_N: Tensor) -> Tensor:
        return _inverse(tokens_N.count_nonzero().expand_as(tokens_N).double() * self.length)


def _inverse(divisor_N: Tensor) -> Tensor:
    """0 where there is nothing to divide by."""
    return divisor_N.double().reciprocal().nan_to_num(posinf=0.0)
