"""Tap: a logits processor that draws the tokens and reports their statistics.

vLLM hands each step's logits of the whole batch to its logits processors before it samples. This
one draws there with `sample_tokens`, the draw of every engine of pyrl: one visit to the logits
gives token, log-prob, entropy and confidence, and a draw depends on its seed and position alone.
It then lifts the drawn token above all others, and vLLM, told to be greedy, takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl.engine import NO_TOKENS
from pyrl.engine.vllm import release
from pyrl.engine.vllm.channel import RECORD, Channel
from pyrl.engine.vllm.table import TAP as KEY
from pyrl.logits.sample_tokens import draw_tokens
from pyrl.logits.sampling import Exclude, Sampling

NOBODY = (-1, 0, 0, 0, ())
"""The arguments of vLLM's own requests, by which it warms up; their tokens are not read."""


@dataclass(frozen=True)
class Place:
    """The branch of a row of the batch, and the numbers from which it draws."""

    ticket: int
    seed: int
    first: int
    """Response tokens that came with the prompt."""
    drawn: list[int]
    """vLLM's list of the tokens after those, which grows."""
    exclude: NDArray[np.int32]
    """Tokens that are not drawn first."""


class Drawing:
    """Draws for a tap and writes the tokens into a channel; the worker sets it up (`worker.py`)."""

    def __init__(self) -> None:
        self.sampling = Sampling()
        self.version = 0
        self.channel: Channel | None = None
        """None on ranks whose numbers are not read."""
        self.patience = 0.0
        """Seconds to wait for the reader of a full channel."""
        self.discarded: Callable[[int], NDArray[np.bool_]] = lambda rows: np.zeros(rows, bool)
        """For the V1 runner: from the number of rows, those whose prompt is not read to its end."""

    def __call__(
        self,
        logits_BV: Tensor,
        ticket_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        position_B: NDArray[np.int64],
        discarded_B: NDArray[np.bool_],
        exclude: Exclude | None,
    ) -> None:
        """Draw a token per row and lift it; a row that cannot be drawn has token -1 in the frame.

        vLLM does not keep the tokens of discarded rows, whose prompt is not read to its end.
        """
        drawn = draw_tokens(logits_BV, seed_B, position_B, self.sampling, exclude)
        token_B = torch.from_numpy(np.maximum(drawn.token_B, 0)).to(logits_BV.device, torch.int64)
        largest = torch.finfo(logits_BV.dtype).max
        # A NaN would win against the lifted token: such a row is emptied first.
        for row in np.flatnonzero(drawn.token_B < 0).tolist():
            logits_BV[row] = 0
        logits_BV.scatter_(1, token_B[:, None], largest)
        if self.channel is None or discarded_B.all():
            return
        records_B = np.empty(len(ticket_B), RECORD)
        records_B["ticket"], records_B["position"] = ticket_B, position_B
        records_B["token"], records_B["logprob"] = drawn.token_B, drawn.logprob_B
        records_B["truncated_logprob"] = drawn.truncated_logprob_B
        records_B["entropy"], records_B["confidence"] = drawn.entropy_B, drawn.confidence_B
        records_B["rest_logprob"] = drawn.rest_logprob_B
        self.channel.write(self.version, records_B[~discarded_B], seconds=self.patience)


UNCLAIMED: list[Drawing] = []
"""Drawings of the taps that vLLM has made in this process and no worker has asked for yet."""


def _drawing() -> Drawing:
    UNCLAIMED.append(Drawing())
    return UNCLAIMED[-1]


def _at_first(exclude: Sequence[NDArray[np.int32]], first_B: NDArray[np.bool_]) -> Exclude | None:
    """What rows exclude that are at their first draw, which all do that are preempted before it."""
    rows = zip(exclude, first_B.tolist(), strict=True)
    return Exclude.of_rows([tokens if first else NO_TOKENS for tokens, first in rows])


class Tap(release.LogitsProcessor):
    """For the V1 model runner, which tells which requests enter, leave and move in the batch."""

    def __init__(
        self, vllm_config: release.VllmConfig, device: torch.device, is_pin_memory: bool
    ) -> None:
        self._drawing = _drawing()
        self._places: dict[int, Place] = {}
        self._ticket_B = self._first_B = np.empty(0, np.int64)
        self._seed_B = np.empty(0, np.uint64)
        self._drawn: list[list[int]] = []
        self._exclude: list[NDArray[np.int32]] = []

    def is_argmax_invariant(self) -> bool:
        """False: it is then called before temperature and truncation, and for greedy requests."""
        return False

    def update_state(self, batch_update: release.BatchUpdate | None) -> None:
        """Follow the batch: requests that were removed, added and moved since the last step."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._places.pop(index, None)
        for index, params, _, drawn in batch_update.added:
            ticket, seed, first, _, exclude = (params.extra_args or {}).get(KEY, NOBODY)
            tokens = np.array(exclude, np.int32)
            self._places[index] = Place(ticket, seed, first, drawn, tokens)
        for source, target, direction in batch_update.moved:
            place, other = self._places.pop(source), self._places.pop(target, None)
            self._places[target] = place
            if direction is release.SWAP and other is not None:
                self._places[source] = other
        rows = [self._places[index] for index in range(len(self._places))]
        self._ticket_B = np.array([row.ticket for row in rows], np.int64)
        self._seed_B = np.array([row.seed for row in rows], np.uint64)
        self._first_B = np.array([row.first for row in rows], np.int64)
        self._drawn = [row.drawn for row in rows]
        self._exclude = [row.exclude for row in rows]

    def apply(self, logits: Tensor) -> Tensor:
        """Draw for every row; logits: float32 [B, V], changed in place."""
        drawn_B = np.fromiter(map(len, self._drawn), np.int64, len(self._drawn))
        discarded_B = self._drawing.discarded(len(drawn_B))
        position_B = self._first_B + drawn_B
        exclude = _at_first(self._exclude, drawn_B == 0)
        self._drawing(logits, self._ticket_B, self._seed_B, position_B, discarded_B, exclude)
        return logits


class TapV2(release.LogitsProcessorV2):
    """For Model Runner V2, which keeps requests in slots and tells each row's slot and position."""

    def __init__(
        self, vllm_config: release.VllmConfig, req_states: release.LogitsProcRequestState
    ) -> None:
        self._drawing = _drawing()
        slots = req_states.max_num_reqs
        self._ticket_S = np.full(slots, -1, np.int64)
        self._seed_S = np.zeros(slots, np.uint64)
        self._first_S, self._prompt_S = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._exclude_S = [NO_TOKENS] * slots
        self._prefill = req_states.prefill_len
        """Tokens of each slot to read before the next draw; after a preemption also drawn ones."""

    def add_request(self, req_idx: int, sampling_params: release.SamplingParams) -> bool:
        """Take over a slot; True: its logits are changed."""
        ticket, seed, first, prompt, exclude = (sampling_params.extra_args or {}).get(KEY, NOBODY)
        self._ticket_S[req_idx], self._seed_S[req_idx] = ticket, seed
        self._first_S[req_idx], self._prompt_S[req_idx] = first, prompt
        self._exclude_S[req_idx] = np.array(exclude, np.int32)
        return True

    def apply(self, logits: Tensor, ctx: release.LogitsContext) -> Tensor:
        """Draw for every row; logits: float32 [B, V], changed in place."""
        slot_B = ctx.expanded_idx_mapping.cpu().numpy()
        # Positions count from the start of the sequence; a response's from the end of the prompt.
        read_B = ctx.pos.cpu().numpy().astype(np.int64) + 1
        discarded_B = read_B < self._prefill.np[slot_B]
        place_B = np.maximum(read_B - self._prompt_S[slot_B], 0)  # a prompt that is read in parts
        tokens = [self._exclude_S[slot] for slot in slot_B.tolist()]
        exclude = _at_first(tokens, place_B == self._first_S[slot_B])
        ticket_B, seed_B = self._ticket_S[slot_B], self._seed_S[slot_B]
        self._drawing(logits, ticket_B, seed_B, place_B, discarded_B, exclude)
        return logits
