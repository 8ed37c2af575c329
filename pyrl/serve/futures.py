"""Futures: requests that wait for their turn, and results that wait to be fetched.

One thread computes, one request after the other, so that no two of them touch a model at a time.
Everything else happens in the event loop. Both queues are bounded: clients may vanish.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pyrl.serve.body import RequestError

WAITING = 4096
"""Requests in the queue at most."""
WAITING_BYTES = 512 << 20
"""The same for the bytes of their bodies."""
KEPT = 4096
"""Results that are kept at most; each can be fetched again, for an answer may be lost."""
KEPT_BYTES = 512 << 20
PATIENCE = 20.0
"""Seconds that a client's look waits for a result before it is told to look again."""

LOG = logging.getLogger("pyrl.serve")

Outcome = bytes | dict[str, Any]
"""A protobuf message, or what becomes JSON."""


@dataclass(eq=False)
class Job:
    """One request: `run` computes the outcomes of all jobs that it is given, which share a `mate`
    other than None."""

    request_id: str
    work: Any
    run: Callable[[Sequence[Any]], Sequence[Outcome]]
    size: int
    """Bytes of its body."""
    mate: Hashable = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Outcome = field(default_factory=dict)


class Futures:
    """The queue, and the results by the identifier of their request."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._waiting_bytes = self._kept_bytes = 0
        self._open: dict[str, Job] = {}
        self._kept: OrderedDict[str, Job] = OrderedDict()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "pyrl-serve")

    def knows(self, request_id: str) -> bool:
        """Whether the request is here already: a client that lost the answer has sent it again."""
        return request_id in self._open or request_id in self._kept

    def submit(self, job: Job) -> None:
        """Queue a request. RequestError: there are too many; the client tries again later."""
        if len(self._waiting) >= WAITING or self._waiting_bytes + job.size > WAITING_BYTES:
            raise RequestError(
                f"queue: expected fewer than {WAITING} requests and {WAITING_BYTES >> 20} MiB of "
                f"them, got {len(self._waiting)} with {self._waiting_bytes >> 20} MiB; try again",
                429,
            )
        self._waiting.append(job)
        self._waiting_bytes += job.size
        self._open[job.request_id] = job
        self._wake.set()

    async def result(self, request_id: str) -> Outcome | None:
        """The outcome of a request; None: it is not done yet. RequestError: it is not known."""
        job = self._open.get(request_id) or self._kept.get(request_id)
        if job is None:
            raise RequestError(
                f"request_id: expected one of a request of this server whose result is still kept, "
                f"got {request_id!r}",
                410,
            )
        try:
            await asyncio.wait_for(job.done.wait(), PATIENCE)
        except TimeoutError:
            return None
        return job.outcome

    async def serve(self) -> None:
        """Compute for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                jobs = self._taken()
                work = [job.work for job in jobs]
                # What a request may raise is anything: it is given back in the place of a result.
                [found] = await asyncio.gather(
                    loop.run_in_executor(self._thread, jobs[0].run, work), return_exceptions=True
                )
                if isinstance(found, BaseException):
                    found = [_failed(found)] * len(jobs)
                for job, outcome in zip(jobs, found, strict=True):
                    self._finish(job, outcome)

    def close(self) -> None:
        """What computes comes to its end; what waits is dropped."""
        self._waiting.clear()
        self._thread.shutdown(wait=True)

    def _taken(self) -> list[Job]:
        """The oldest request, and all others that can be computed together with it."""
        first = self._waiting.popleft()
        mates = [] if first.mate is None else [j for j in self._waiting if j.mate == first.mate]
        if mates:
            self._waiting = deque(j for j in self._waiting if j.mate != first.mate)
        return [first, *mates]

    def _finish(self, job: Job, outcome: Outcome) -> None:
        self._waiting_bytes -= job.size
        job.outcome, job.work = outcome, None
        job.size = len(outcome) if isinstance(outcome, bytes) else 256
        del self._open[job.request_id]
        self._kept[job.request_id] = job
        self._kept_bytes += job.size
        while len(self._kept) > KEPT or (self._kept_bytes > KEPT_BYTES and len(self._kept) > 1):
            self._kept_bytes -= self._kept.popitem(last=False)[1].size
        job.done.set()


def _failed(error: BaseException) -> Outcome:
    """What the client is told of a request that could not be computed."""
    if isinstance(error, ValueError | FloatingPointError):
        return {"error": str(error), "category": "user"}
    LOG.error("a request failed", exc_info=error)
    return {"error": f"{type(error).__name__}: {error}", "category": "server"}
