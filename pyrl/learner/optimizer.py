"""Optimizers by name: what `--optimizer` chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrl.learner.adamw import RoundingAdamW
from pyrl.learner.momentum import Corrected, LookAhead, Normalized

if TYPE_CHECKING:
    from pyrl.run.config import Run

NORMALIZED: dict[str, type[Normalized]] = {"n_pg_igt": LookAhead, "n_harpg": Corrected}


def make_optimizer(parameters: Sequence[Tensor], run: Run) -> torch.optim.Optimizer:
    """The optimizer that the run names. ValueError: it does not work on weights of this type."""
    rounds = parameters[0].dtype == torch.bfloat16
    if run.optimizer != "adamw":
        if rounds:
            raise ValueError(
                f"weights: expected float32 with --optimizer {run.optimizer}, got bfloat16: only "
                f"adamw rounds updates so that none of them is lost"
            )
        return NORMALIZED[run.optimizer](parameters, lr=run.learning_rate, decay=run.betas[0])
    lr, betas, decay = run.learning_rate, run.betas, run.weight_decay
    if rounds:
        return RoundingAdamW(parameters, lr=lr, betas=betas, weight_decay=decay, seed=run.seed)
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=decay)
