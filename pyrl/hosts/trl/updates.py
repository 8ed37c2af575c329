"""Updates: the method's loss in the place of the host's, from passes that fit in memory.

The host asks for the loss of a micro-batch. An update's gradient is made at its first one, from all
of its samples, since what a method's loss takes from a mini-batch it takes from the whole of it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pyrl.algorithm import Algorithm
from pyrl.hosts.trees import Credit
from pyrl.learner import Learner
from pyrl.loss import LossState
from pyrl.pack import TokenBatch
from pyrl.run.config import Run


def make_learner(
    model: PreTrainedModel, algorithm: Algorithm, args: Any, *, trains: bool, tokens: int
) -> Learner:
    """The learner of pyrl's on the host's model; `tokens` of a pass. It never steps its optimizer.

    `trains`: its passes make gradients, and compute layers again if a GRPOConfig says so. Where the
    method reads the first model, it gets a frozen copy.
    """
    reference = None
    if algorithm.has_reference:
        reference = copy.deepcopy(model)
        # The forward that the host has put on a model is bound to that one.
        reference.__dict__.pop("forward", None)
    settings = Run(
        model="",
        data="",
        method="",
        algorithm=algorithm,
        output=Path(args.output_dir),
        dtype="bfloat16" if args.bf16 else "float32",
        gradient_checkpointing=args.gradient_checkpointing and trains,
        tokens_per_pass=tokens,
    )
    return Learner(model, reference, settings)


class Updates:
    """The mini-batches of the last generation, and the gradients of their losses."""

    def __init__(self, learner: Learner, args: Any) -> None:
        self._learner, self._accumulation = learner, args.gradient_accumulation_steps
        self._micro = args.steps_per_generation
        self._parts: list[TokenBatch] = []
        self._state = LossState()

    def begin(self, credit: Credit | None, seed: int, progress: float) -> dict[str, float]:
        """New samples; None: nothing is known of any, so that they give no gradient. Metrics."""
        if credit is None:
            self._parts = []
            return {}
        self._parts, self._state, cost = self._learner.mini_batches(
            credit.batch, credit.scored.group_N, seed, progress, self._micro // self._accumulation
        )
        return cost

    def gradient(self, micro_batch: int) -> dict[str, float]:
        """Leave the gradient of an update in the parameters, if this is its first micro-batch.

        The metrics of that, "loss" among them. `micro_batch` counts those of the whole training.
        NonFiniteError, SamplerMismatchError: see `Learner.check`.
        """
        update, place = divmod(micro_batch % self._micro, self._accumulation)
        if place or update >= len(self._parts):
            return {"loss": 0.0}
        learner, first = self._learner, update == 0
        tally = learner.gradient(self._parts[update], self._state, exact=first and learner.looks)
        learner.check(tally, 0.0, on_policy=first)
        return tally.metrics() | learner.reader.metrics()
