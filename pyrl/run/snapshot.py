"""Snapshot: the weights that sampled a step whose learner has gone on since, and their witness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.learner import Learner
from pyrl.learner.guard import SamplerMismatchError
from pyrl.leaves import Leaves
from pyrl.pack import pack
from pyrl.run.checkpoint import Checkpoint

CHECKED = 8
"""Responses of a step that are read again by the weights that sampled them."""


@dataclass(frozen=True)
class Snapshot:
    """The trained weights of a model after `version` steps, in the memory of the host."""

    version: int
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, version: int) -> Snapshot:
        """Those of the model as it is now."""
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        return cls(version, {name: p.to("cpu", copy=True) for name, p in trained.items()})

    @classmethod
    def saved(cls, start: Checkpoint) -> Snapshot | None:
        """That which a checkpoint has: it sampled the step after the checkpoint's."""
        weights = start.sampler()
        return cls(start.step - 1, weights) if weights else None

    @contextmanager
    def lent_to(self, model: PreTrainedModel) -> Iterator[None]:
        """Within, `model` has these weights, and afterwards bit for bit those that it had."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: PreTrainedModel) -> None:
        # One tensor after the other: two whole sets of weights on a device may not fit.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    own = parameter.to("cpu", copy=True)
                    parameter.copy_(self.weights[name])
                    self.weights[name].copy_(own)


def check_sampled(learner: Learner, snapshot: Snapshot, leaves: Leaves) -> None:
    """SamplerMismatchError unless the learner's pass with the weights of the snapshot finds the
    log-probs of some of the leaves, spread evenly, as the engine reported them."""
    count = len(leaves.leaf_N)
    chosen_N = np.unique(np.linspace(0, count - 1, min(CHECKED, count)).astype(np.int64))
    rows = leaves.take(chosen_N).rows
    batch = pack(rows, np.zeros(len(rows.label_T)))
    with snapshot.lent_to(learner.model):
        learned_T = learner.after(rows)[batch.mask_T]
    sampled_T = batch.old_logprob_T[batch.mask_T]
    gap_T = np.abs(learned_T - sampled_T)
    largest, mean = learner.tolerances(gap_T.size)
    worst = int(gap_T.argmax())
    if gap_T[worst] <= largest and gap_T.mean() <= mean:
        return
    raise SamplerMismatchError(
        f"expected the log-prob of a sampled token to differ by at most {largest:g} between the "
        f"sampler and the weights after step {snapshot.version}, which it sampled with, and by "
        f"{mean:.2g} in the mean of {gap_T.size} tokens, got {sampled_T[worst]:.6g} from the "
        f"sampler and {learned_T[worst]:.6g} with these weights, and {gap_T.mean():.2g} in the "
        f"mean; no update was made. Check that the sampler has the learner's weights, temperature "
        f"and precision"
    )
