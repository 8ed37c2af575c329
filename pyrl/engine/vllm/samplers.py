"""Samplers: servers on this or other machines that run an engine's requests together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from pyrl.engine import Dtype, EngineError, EngineFailure
from pyrl.engine.vllm.channel import Frame
from pyrl.engine.vllm.link import Link, TakenError
from pyrl.engine.vllm.memory import shared_folder, write_weights
from pyrl.engine.vllm.table import FORK, TAP
from pyrl.logits.sampling import Sampling

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Output(NamedTuple):
    """A token that a request was given, by the names of vLLM's own."""

    request_id: int
    new_token_ids: list[int]
    finish_reason: None = None
    prefill_stats: None = None


class Samplers:
    """`Requests` at some samplers: a new one goes to that with the fewest, a sibling to its
    parent's. A step takes a frame from each of them; they draw on while the others are waited for.

    EngineError unless at the beginning each is reached, and all of them run alike. From one that
    fails later `outputs` raises EngineFailure, and `rescue` tells whose branches ran there. `load`
    asks those that are lost again, but not those that serve another run.
    """

    def __init__(self, urls: Sequence[str], shape: Mapping[str, Any], seconds: float) -> None:
        self.closed = False
        self._shape = shape
        self._links = [Link(url, seconds) for url in urls]
        self._lost: dict[Link, RuntimeError] = {}
        self.failed: list[Link] = []
        """Those that the last step has lost, until their branches are rescued."""
        self._pool = ThreadPoolExecutor(len(urls))
        self._link_of: dict[int, Link] = {}
        """Where the requests of each ticket went since the weights came."""
        self._merged: Frame | None = None
        self._sampling: Sampling | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            for got in self._each(self._links, lambda link: link.open(shape)).values():
                if got is not None:
                    raise EngineError(f"sampler: {got}") from got
            self._compare()
            undo.pop_all()

    def _compare(self) -> None:
        """Take over what the samplers tell of themselves; EngineError if they differ."""
        abouts = [link.about for link in self._links]
        for name in ("dtype", "vocabulary", "vllm"):
            if len({about[name] for about in abouts}) > 1:
                told = ", ".join(f"{link.url} {link.about[name]}" for link in self._links)
                raise EngineError(f"sampler: expected the same {name} at all of them, got {told}")
        self.dtype: Dtype = abouts[0]["dtype"]
        self.vocabulary: int = abouts[0]["vocabulary"]
        self.max_model_len: int = min(about["max_model_len"] for about in abouts)
        self.block_size: int = max(about["block_size"] for about in abouts)

    def start(self, sampling: Sampling) -> None:
        """Draw from this distribution from now on."""
        self._sampling = sampling
        for link in self._live:
            link.start(sampling)

    def add(
        self, name: str, tokens: list[int], max_tokens: int, stop: list[int], extra: dict[str, Any]
    ) -> None:
        """Queue a request."""
        link = self._link_of.get(int(extra[FORK][0]))
        tokens_before = extra[TAP][2]
        if link is None or link in self._lost or not tokens_before:
            link = min(self._live, key=lambda link: len(link.tickets))
        self._link_of[int(name)] = link
        link.add(int(name), (tokens, max_tokens, stop, extra))

    def abort(self, names: list[str]) -> None:
        """Drop requests, wherever they are."""
        for name in names:
            self._link_of[int(name)].abort(int(name))

    def ended(self, ticket: int) -> None:
        """A branch has ended."""
        self._link_of[ticket].tickets.discard(ticket)

    def outputs(self) -> list[Output]:
        """The tokens of the next frames of all samplers."""
        taken = self._each([link for link in self._live if link.due], Link.step)
        frames = {link: got for link, got in taken.items() if isinstance(got, Frame)}
        failed = {link: got for link, got in taken.items() if isinstance(got, RuntimeError)}
        if failed:
            for link, frame in frames.items():
                link.put_back(frame)
            self.failed = [*failed]
            self._lose(failed)
            raise EngineFailure("; ".join(map(str, failed.values())))
        if not frames:
            return []
        records_B = np.concatenate([frame.records_B for frame in frames.values()])
        self._merged = Frame(next(iter(frames.values())).version, records_B)
        tokens = np.maximum(records_B["token"], 0)[:, None].tolist()
        return [*map(Output, records_B["ticket"].tolist(), tokens)]

    def frame(self) -> Frame | None:
        """The frame of the last outputs, once."""
        frame, self._merged = self._merged, None
        return frame

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, int]:
        """Bring weights to all; digests of what arrived.

        EngineFailure if none has taken them, or one has taken others than another.
        """
        self._link_of.clear()
        received = self._bring(self._links, weights, version)
        self._check_left()
        first, *others = received
        for link in others:
            if received[link] != received[first]:
                raise EngineFailure(f"{link.url} has taken other weights than {first.url}")
        return received[first]

    def rescue(
        self, weights: Iterable[tuple[str, Tensor]] | None, version: int, *, again: bool
    ) -> list[int]:
        """Tickets of the branches that ran where the last step has failed; they run no more.

        `again`: reach these samplers again, with these weights. EngineFailure if none is left.
        """
        failed, self.failed = self.failed, []
        tickets = sorted(ticket for link in failed for ticket in link.tickets)
        for link in failed:
            link.forget()
        if again:
            self._bring(failed, weights, version)
        self._check_left()
        return tickets

    @property
    def work(self) -> list[int]:
        """As in `Answer`, of all samplers."""
        return [sum(part) for part in zip(*(link.work for link in self._links), strict=True)]

    def close(self) -> None:
        """Stop what runs, where somebody answers."""
        if self.closed:
            return
        self.closed = True
        self._each(self._live, Link.close)
        for link in self._links:
            link.forget()
        self._pool.shutdown()

    @property
    def _live(self) -> list[Link]:
        return [link for link in self._links if link not in self._lost]

    def _lose(self, links: Mapping[Link, RuntimeError]) -> None:
        for link, error in links.items():
            if link not in self._lost:
                logger.warning("a sampler is lost: %s", error)
        self._lost |= links

    def _check_left(self) -> None:
        if not self._live:
            told = "; ".join(map(str, self._lost.values()))
            raise EngineFailure(f"no sampler is left: {told}")

    def _bring(
        self, links: Sequence[Link], weights: Iterable[tuple[str, Tensor]] | None, version: int
    ) -> dict[Link, dict[str, int]]:
        """Bring weights to samplers, and begin with those again that are lost; the digests of those
        that have taken them."""
        links = [link for link in links if not isinstance(self._lost.get(link), TakenError)]
        with shared_folder() as folder:
            path = folder / "weights.safetensors"
            if weights is not None:
                write_weights(dict(weights), path)

            def bring(link: Link) -> dict[str, int]:
                if link in self._lost:
                    link.open(self._shape)
                    if self._sampling is not None:
                        link.start(self._sampling)
                return {} if weights is None else link.load(path, version)

            taken = self._each(links, bring)
        self._lose({link: got for link, got in taken.items() if isinstance(got, RuntimeError)})
        received = {link: got for link, got in taken.items() if isinstance(got, dict)}
        for link in received:
            if self._lost.pop(link, None) is not None:
                logger.warning("%s samples again", link.url)
        return received

    def _each(
        self, links: Iterable[Link], function: Callable[[Link], _T]
    ) -> dict[Link, _T | RuntimeError]:
        """What the function gives for each link, all at the same time; failures too."""

        def call(link: Link) -> _T | RuntimeError:
            try:
                return function(link)
            except (EngineError, EngineFailure) as error:
                return error

        links = list(links)
        return dict(zip(links, self._pool.map(call, links), strict=True))
