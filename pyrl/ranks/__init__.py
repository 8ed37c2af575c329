"""Ranks: the processes of one run, of which each has the weights and a share of the work.

Process 0 leads: it alone holds the trees, the votes, the clock, the log and the checkpoints. The
others hear from it what to do (`pyrl.run.following`): to sample some questions' branches, and to
read some of a mini-batch's passes. What the leader computes from all of a step, it computes from
what one process would have; only the sum of a gradient has another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class RanksError(ValueError):
    """Processes that cannot work together; the message names the one that differs, and in what."""


class RankLost(RuntimeError):
    """Another process of the run has ended, so that this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """A process's place among `size` of them; the methods are called in all alike."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """The place on this machine, by which a GPU is chosen."""
    group: Any = None
    """The process group of torch.distributed; None for one process."""

    @property
    def leads(self) -> bool:
        """This process tells others what to do."""
        return self.size > 1 and self.rank == 0

    def device(self, found: torch.device) -> torch.device:
        """Of several GPUs the one of this process. RanksError: there are too few."""
        if self.size == 1 or found.type == "cpu" or found.index is not None:
            return found
        if self.local >= torch.cuda.device_count():
            raise RanksError(
                f"device: expected a GPU for each process, got {torch.cuda.device_count()} for "
                f"process {self.rank}, which is number {self.local} of this machine"
            )
        return torch.device(found.type, self.local)

    def tell(self, call: str, *arguments: Any) -> None:
        """Have the other processes make a call; nothing where this one does not lead."""
        if self.leads:
            with noticing():
                dist.broadcast_object_list([(call, arguments)], src=0, group=self.group)

    def hear(self) -> tuple[str, tuple[Any, ...]]:
        """The next call that the leader tells of, and its arguments."""
        heard: list[Any] = [None]
        with noticing():
            dist.broadcast_object_list(heard, src=0, group=self.group)
        call, arguments = heard[0]
        return call, arguments

    def collect(self, own: Value) -> list[Value]:
        """At the leader the values of all processes in their order; elsewhere nothing."""
        if self.size == 1:
            return [own]
        values: list[Any] = [None] * self.size
        with noticing():
            dist.gather_object(own, values if self.leads else None, dst=0, group=self.group)
        return values if self.leads else []

    def gather(self, own: Value) -> list[Value]:
        """The values of all processes in their order."""
        if self.size == 1:
            return [own]
        values: list[Any] = [None] * self.size
        with noticing():
            dist.all_gather_object(values, own, group=self.group)
        return values

    def deal(self, items: Iterable[Value]) -> Iterator[Value | None]:
        """This process's share of them: every `size`-th. None where only others have one more."""
        for share in zip_longest(*[iter(items)] * self.size):
            yield share[self.rank]

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum each parameter's gradient over the processes, the same bits in all of them.

        DDP's hooks are of no use here: processes make different numbers of passes, also none, and
        the sum is wanted once, after the last.
        """
        if self.size == 1:
            return
        trained = self.gather([parameter.grad is not None for parameter in parameters])
        for parameter, *has in zip(parameters, *trained, strict=True):
            if any(has):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                with noticing():
                    dist.all_reduce(parameter.grad, group=self.group)

    def check_same(self, what: str, own: Mapping[str, object]) -> None:
        """RanksError at the leader names a process whose values differ from its own."""
        for rank, other in enumerate(self.collect(own)):
            different = [
                f"{name} (there {other.get(name)!r}, in process 0 {own.get(name)!r})"
                for name in {**own, **other}
                if own.get(name) != other.get(name)
            ]
            if different:
                raise RanksError(
                    f"process {rank}: expected the same {what} as in process 0, these differ: "
                    f"{', '.join(different)}"
                )


ALONE = Ranks()


@contextmanager
def noticing(of: Callable[[RuntimeError], bool] = lambda error: True) -> Iterator[None]:
    """RankLost for what torch.distributed says when a connection ends; `of` knows such errors."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankLost) or not of(error):
            raise
        raise RankLost(
            "expected all processes of the run to go on, at least one has ended; the same command "
            "with --resume goes on after the last checkpoint"
        ) from error
