"""Served: the vLLM engine whose requests run at samplers, servers on this or other machines."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pyrl.engine import EngineFailure, Work
from pyrl.engine.vllm.engine import Requests, VLLMEngine
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.engine.vllm.samplers import Samplers

logger = logging.getLogger(__name__)


class ServedEngine(VLLMEngine):
    """`Engine` over the samplers of `options.sampler`; vLLM need not be installed here.

    `shape`: that of the learner's model (`wire.model_shape`). Samplers draw on while the caller
    decides: forks and prunes reach them a step or more later, as with a separate process.

    A sampler that dies, hangs or cannot be reached is asked again at once, and brought the weights;
    if that fails its unfinished branches go on at the others, from their last tokens with their own
    seeds, and it is asked again at each sync. EngineFailure if none is left.
    """

    def __init__(
        self, shape: Mapping[str, Any], eos: Collection[int], options: VLLMOptions
    ) -> None:
        self._shape = shape
        super().__init__("", eos, options=options)
        self.dtype = self._samplers.dtype
        # No ticket of an earlier run at the same samplers comes again: their caches know these.
        self._tickets = time.time_ns() >> 10

    def work(self) -> Work:
        """What the samplers have computed so far; prompts count when their requests have ended."""
        computed, cached, again, prompts = self._samplers.work
        drawn = self._work.decode_tokens
        return Work(computed, drawn - prompts, cached, again)

    def _launch(self) -> Requests:
        options = self._options
        self._samplers = Samplers(options.sampler, self._shape, options.step_seconds)
        return self._samplers

    def _close(self, ticket: int) -> None:
        super()._close(ticket)
        self._samplers.ended(ticket)

    def _count(self, drew: Sequence[object]) -> None:
        self._work = Work(0, self._work.decode_tokens + len(drew), 0)

    def _restart(self, failure: EngineFailure) -> None:
        """The branches of the samplers that failed go on where they are."""
        self._failures += 1
        self._failure = None
        if not self._samplers.failed:
            raise failure
        again = self._failures <= self._options.restarts
        lost = self._samplers.rescue(self._weights, self._version, again=again)
        logger.warning("%d branches go on by their seeds", len(lost))
        self._go_on([self._by_ticket[ticket] for ticket in lost])
