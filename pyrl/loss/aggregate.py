"""Aggregate: from the losses of tokens to one number, by a weight per response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Aggregate(Protocol):
    """The weight of each token of a response in the loss, which is the weighted sum of all."""

    def __call__(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights [N] from the tokens of each response that take part; B of them have any."""


@dataclass(frozen=True)
class TokenMean:
    """Mean over all tokens: 1 / n (arXiv:2503.14476). Long responses weigh more."""

    def __call__(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
        return _inverse(np.full(len(tokens_N), tokens_N.sum()))


@dataclass(frozen=True)
class TokenSum:
    """Sum over all tokens."""

    def __call__(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.ones(len(tokens_N))


@dataclass(frozen=True)
class SeqMeanTokenMean:
    """Mean over responses of the mean over their tokens: 1 / (B l_i) (arXiv:2402.03300)."""

    def __call__(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
        return _inverse(np.count_nonzero(tokens_N) * tokens_N)


@dataclass(frozen=True)
class SeqMeanTokenSum:
    """Mean over responses of the sum over their tokens: 1 / B."""

    def __call__(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
        return _inverse(np.full(len(tokens_N), np.count_nonzero(tokens_N)))


@dataclass(frozen=True)
class SeqMeanTokenSumNorm:
    """Mean over responses of the sum over their tokens / length: 1 / (B length).

    Dr. GRPO (arXiv:2503.20783). Divides by B, as newer verl does; older verl did not.
    """

    length: float
    """A constant, such as the largest response length: not the length of any response."""

    def __post_init__(self) -> None:
        if not 0 < self.length < np.inf:
            raise ValueError(f"length: expected a finite number > 0, got {self.length}")

    def __call__(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
        return _inverse(np.full(len(tokens_N), np.count_nonzero(tokens_N) * self.length))


def _inverse(divisor_N: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """0 where there is nothing to divide by."""
    return np.divide(1.0, divisor_N, out=np.zeros(len(divisor_N)), where=divisor_N != 0)
