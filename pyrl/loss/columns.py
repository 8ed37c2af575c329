"""Columns: a mini-batch as the axes of a loss read it, and the reductions that they share.

Everything is torch in float64 on the device of the columns. A sum runs in the order of its tokens,
whatever the number of threads. Nothing waits for a GPU but the checks, which need a number to name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrl.logits.graph import traced


class Columns(TypedDict, total=False):
    """Columns [T] of a policy loss, float32 or float64; which are read is up to its axes."""

    advantage_T: Tensor | None
    old_logprob_T: Tensor | None
    """Log-probs by the policy before the update."""
    rollout_logprob_T: Tensor | None
    """Log-probs as the rollout engine reported them."""
    ref_logprob_T: Tensor | None
    """Log-probs by the frozen initial model."""
    proxy_logprob_T: Tensor | None
    """Log-probs by the old policy without its least probable tokens; -inf for such a token."""
    expert_logprob_T: Tensor | None
    """Log-probs of an expert's response at the same position."""
    second_logprob_T: Tensor | None
    """Log-probs by the old policy at a second temperature."""
    nucleus_entropy_T: Tensor | None
    """Differentiable, as the entropy is."""
    reward_T: Tensor | None
    """The reward of the token's response."""
    sum_p2_T: Tensor | None
    sum_p2_logp_T: Tensor | None
    clip_low_T: Tensor | None
    """Radii that bounds in Python returned."""
    clip_high_T: Tensor | None


def kind(tensor: Tensor) -> str:
    """Type and shape, as messages name them."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def segments(value_T: Tensor, reduce: str, offset_P1: Tensor) -> Tensor:
    """Sum, min or max of each part, one value after the other; 0 or infinite without any."""
    return torch.segment_reduce(value_T, reduce, offsets=offset_P1, unsafe=True)


@dataclass(frozen=True)
class Parts:
    """Consecutive parts of T tokens: the responses of a mini-batch, or all of it as one part."""

    tokens: int
    offset_P1: Tensor
    """Where each part begins, and the end of the last."""
    used_T: Tensor | None
    """The tokens that take part, which alone are reduced; None: all."""

    @property
    def count_P(self) -> Tensor:
        """Tokens that take part, as float64."""
        if self.used_T is None:
            return self.offset_P1.diff().double()
        return segments(self.used_T.double(), "sum", self.offset_P1)

    @property
    def any_P(self) -> Tensor:
        """The parts of which a token takes part."""
        return self.count_P > 0

    def sum(self, value_T: Tensor) -> Tensor:
        return segments(self._filled(value_T, 0.0), "sum", self.offset_P1)

    def mean(self, value_T: Tensor) -> Tensor:
        """0 where no token takes part."""
        return self.sum(value_T) / self.count_P.clamp(min=1)

    def deviation(self, value_T: Tensor, *, unbiased: bool = False) -> Tensor:
        """Standard deviation, of the population unless `unbiased`; 0 where that has no tokens."""
        squares_P = self.sum((value_T - self.spread(self.mean(value_T))).square())
        return (squares_P / (self.count_P - int(unbiased)).clamp(min=1)).sqrt()

    def largest(self, value_T: Tensor) -> Tensor:
        """-inf where no token takes part."""
        return segments(self._filled(value_T, -inf), "max", self.offset_P1)

    def smallest(self, value_T: Tensor) -> Tensor:
        """inf where no token takes part."""
        return segments(self._filled(value_T, inf), "min", self.offset_P1)

    def quantile(self, name: str, value_T: Tensor, q: float) -> Tensor:
        """Linear interpolation between order statistics; any number where no token takes part.

        ValueError names the column of a token that takes part and is no number.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"quantile: expected a number in [0, 1], got {q}")
        last_P = (self.count_P - 1).clamp(min=0)
        position_P = q * last_P
        low_P = position_P.floor()
        ordered_T = self._ordered(name, value_T)
        below_P, above_P = (
            ordered_T[self.offset_P1[:-1] + rank_P.long()]
            for rank_P in (low_P, torch.minimum(low_P + 1, last_P))
        )
        return below_P + (position_P - low_P) * (above_P - below_P)

    def nearest_quantile(self, name: str, value_T: Tensor, q: float) -> Tensor:
        """The order statistic that lies nearest to the quantile, of two equally near the even one.

        It is torch.quantile's with interpolation="nearest".
        """
        rank_P = (q * (self.count_P - 1)).round().clamp(min=0).long()
        return self._ordered(name, value_T)[self.offset_P1[:-1] + rank_P]

    def spread(self, value_P: Tensor) -> Tensor:
        """Each part's number for each of its tokens [T]."""
        if len(value_P) == 1:
            return value_P.expand(self.tokens)
        return value_P.repeat_interleave(self.offset_P1.diff(), output_size=self.tokens)

    def _ordered(self, name: str, value_T: Tensor) -> Tensor:
        """The values of each part in their order, then inf for those left out, and inf at the end.

        The last one is there to be read where the last part is empty.
        """
        ordered_T, order_T = numbers(name, self._filled(value_T, inf)).sort()
        if len(self.offset_P1) > 2:
            part_T = self.spread(torch.arange(len(self.offset_P1) - 1, device=order_T.device))
            ordered_T = ordered_T[part_T[order_T].argsort(stable=True)]
        return pad(ordered_T, (0, 1), value=inf)

    def _filled(self, value_T: Tensor, rest: float) -> Tensor:
        return value_T if self.used_T is None else torch.where(self.used_T, value_T, rest)


def one_part(value_T: Tensor, used_T: Tensor | None) -> Parts:
    """All values as one part."""
    ends_2 = torch.arange(2, device=value_T.device) * len(value_T)
    return Parts(len(value_T), ends_2, used_T)


@dataclass(frozen=True)
class LossColumns:
    """T tokens in N responses, and what an axis reads of them."""

    given: Mapping[str, Tensor]
    """By name, float32 or float64 [T]; never empty."""
    used_T: Tensor | None = None
    """The tokens that take part; None: all."""
    offset_N1: Tensor | None = None
    """Where each response begins, and the end of the last."""
    group_N: Tensor | None = None
    """The question of each response, from 0 below N."""

    def __getitem__(self, name: str) -> Tensor:
        """The column in float64."""
        if name not in self.given:
            raise ValueError(f"loss: needs the column {name}")
        return self.given[name].detach().double()

    @property
    def tokens(self) -> int:
        return len(next(iter(self.given.values())))

    @property
    def whole(self) -> Parts:
        """All tokens as one part."""
        return one_part(next(iter(self.given.values())), self.used_T)

    @property
    def responses(self) -> Parts:
        if self.offset_N1 is None:
            raise ValueError("loss: needs the column offset_N1")
        return Parts(self.tokens, self.offset_N1, self.used_T)

    def used(self, chosen_T: Tensor) -> Tensor:
        """The chosen tokens that take part."""
        return chosen_T if self.used_T is None else chosen_T & self.used_T

    def used_or_zero(self, value_T: Tensor) -> Tensor:
        """The values of the tokens that take part, 0 for the others."""
        return value_T if self.used_T is None else torch.where(self.used_T, value_T, 0.0)

    def least(self, value_T: Tensor, among_T: Tensor, share: float, count_1: Tensor) -> Tensor:
        """The max(1, int(share count)) least of some tokens; of equal ones those of lower index."""
        order_T = value_T.argsort(stable=True)
        among_T = among_T[order_T]
        chosen_T = among_T & (among_T.cumsum(0) <= share_of(share, count_1))
        return torch.zeros_like(chosen_T).scatter(0, order_T, chosen_T)


def share_of(share: float, count_1: Tensor) -> Tensor:
    """max(1, int(share count)) tokens."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share}")
    return (share * count_1.double()).clamp(min=1).long()


# -- checks that a graph of torch.compile contains --


def numbers(name: str, value_T: Tensor) -> Tensor:
    """The values; ValueError where one is no number."""
    return checked(value_T, value_T.isnan(), f"{name}: expected numbers, got {{}} at {{}}")


def checked(value_T: Tensor, wrong_T: Tensor, message: str) -> Tensor:
    """The values; ValueError with the first wrong one and its index in the message."""
    if traced(value_T):
        checked_T: Tensor = _checked_op(value_T, wrong_T, message)
        return checked_T
    _refuse(value_T, wrong_T, message)
    return value_T


def _refuse(value_T: Tensor, wrong_T: Tensor, message: str) -> None:
    if wrong_T.any():
        t = int(wrong_T.nonzero()[0])
        raise ValueError(message.format(f"{value_T[t].item():g}", t))


@torch.library.custom_op("pyrl::checked", mutates_args=())
def _checked_op(values: Tensor, wrong: Tensor, message: str) -> Tensor:
    _refuse(values, wrong, message)
    return values.clone()


@_checked_op.register_fake
def _(values: Tensor, *_: object) -> Tensor:
    return torch.empty_like(values)


def checked_offsets(offset_N1: Tensor, tokens: int) -> Tensor:
    """The offsets on the CPU; ValueError unless they divide the tokens."""
    offset_N1 = offset_N1.cpu()
    if traced(offset_N1):
        in_graph_N1: Tensor = _checked_offsets_op(offset_N1, tokens)
        return in_graph_N1
    _refuse_offsets(offset_N1, tokens)
    return offset_N1


def _refuse_offsets(offset_N1: Tensor, tokens: int) -> None:
    expected = f"offset_N1: expected offsets from 0 to {tokens}, got"
    if not len(offset_N1):
        raise ValueError(f"{expected} none")
    on_host_N1 = offset_N1.numpy()
    if on_host_N1[0] != 0 or on_host_N1[-1] != tokens:
        raise ValueError(f"{expected} {on_host_N1[0]} to {on_host_N1[-1]}")
    falls_N = on_host_N1[1:] < on_host_N1[:-1]
    if falls_N.any():
        before, after = on_host_N1[falls_N.argmax() :][:2]
        raise ValueError(
            f"offset_N1: expected offsets that do not fall, got {before} before {after}"
        )


@torch.library.custom_op("pyrl::checked_offsets", mutates_args=())
def _checked_offsets_op(offset: Tensor, tokens: int) -> Tensor:
    _refuse_offsets(offset, tokens)
    return offset.clone()


@_checked_offsets_op.register_fake
def _(offset: Tensor, *_: object) -> Tensor:
    return torch.empty_like(offset)
