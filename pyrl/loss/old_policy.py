"""Old policy: what the learner says of a step's tokens before it updates, and what it remembers.

The engine reports one log-prob and one entropy of a token, in its own precision. A loss that
compares engine and learner, or reads more of the distribution, needs a pass of the learner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl.logits.token_stats import TokenStats
from pyrl.loss.axis import LossState
from pyrl.loss.columns import LossColumns
from pyrl.loss.loss import Loss
from pyrl.pack import TokenBatch


@dataclass
class Memory:
    """What a loss knows of earlier steps; a checkpoint keeps it."""

    entropy: float | None = None
    """Mean token entropy of the last step (nats)."""
    total: float = 0.0
    """Sum of these over the steps."""
    steps: int = 0
    nucleus_entropy: float | None = None
    """What `NucleusAnchor` holds on to: its level in the first step (nats)."""

    def state(self, batch: TokenBatch, seed: int, progress: float) -> LossState:
        """What the axes of a loss take from the run at a step with these samples.

        In the first step the entropy is that of its own samples, since no step is before it.
        """
        return LossState(
            seed=seed,
            progress=progress,
            entropy=_entropy(batch) if self.entropy is None else self.entropy,
            mean_entropy=self.total / self.steps if self.steps else None,
            nucleus_entropy=self.nucleus_entropy,
        )

    def add(self, batch: TokenBatch) -> None:
        """The step with these samples has been made."""
        self.entropy = _entropy(batch)
        self.total += self.entropy
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _entropy(batch: TokenBatch) -> float:
    used = batch.entropy_T[batch.mask_T]
    return float(used.mean(dtype=np.float64)) if used.size else 0.0


def tensors(columns: Mapping[str, NDArray[Any]], device: torch.device | str) -> dict[str, Tensor]:
    """The columns on the model's device."""
    return {name: torch.from_numpy(value).to(device) for name, value in columns.items()}


def loss_columns(batch: TokenBatch) -> dict[str, NDArray[Any]]:
    """What a loss reads of a batch, by name.

    The engine that sampled is the rollout's policy. Where the learner has not looked at the batch
    itself, it stands for the old policy as well.
    """
    sampled: dict[str, NDArray[Any]] = {
        "old_logprob_T": batch.old_logprob_T,
        "rollout_logprob_T": batch.old_logprob_T,
        "logprob_T": batch.old_logprob_T,
        "entropy_T": batch.entropy_T,
        "advantage_T": batch.advantage_T,
    }
    if batch.reward_N is not None:
        sampled["reward_T"] = np.nan_to_num(batch.reward_N)[batch.leaf_T]
    return sampled | dict(batch.columns)


def loss_mask(loss: Loss, batch: TokenBatch) -> Tensor:
    """The tokens that take part: a response without a known reward does not where rewards count."""
    mask_T = batch.mask_T
    if batch.reward_N is not None and any(need.name == "reward_T" for need in loss.needs):
        mask_T = mask_T & ~np.isnan(batch.reward_N)[batch.leaf_T]
    return torch.from_numpy(mask_T)


def learned_columns(stats: TokenStats, kept_share: float | None) -> dict[str, Tensor]:
    """The columns [T] that a pass of the learner gives; all of the policy before the update."""
    columns = {
        "logprob_T": stats.logprob,
        "old_logprob_T": stats.logprob,
        "entropy_T": stats.entropy,
        "sum_p2_T": stats.sum_p2,
        "sum_p2_logp_T": stats.sum_p2_logp,
        "second_logprob_T": stats.second_logprob,
        "nucleus_entropy_T": stats.nucleus_entropy,
    }
    found = {name: column for name, column in columns.items() if column is not None}
    if kept_share is not None:
        assert stats.kept_mass is not None
        assert stats.max_probability is not None
        kept_T = stats.logprob.exp() >= kept_share * stats.max_probability
        proxy_T = stats.logprob - stats.kept_mass.log()
        found["proxy_logprob_T"] = torch.where(kept_T, proxy_T, -torch.inf)
    return found


def expert_column(
    batch: TokenBatch, experts: TokenBatch, theirs_T: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Log-prob [T] of the expert's token at the same position; NaN after the expert's end.

    `theirs_T` has those of all tokens of `experts`, a response for each question of the step.
    """
    assert batch.group_N is not None
    position_T = np.arange(len(batch.label_T)) - batch.token_offset_N1[:-1][batch.leaf_T]
    start_T = experts.token_offset_N1[:-1][batch.group_N][batch.leaf_T]
    end_T = experts.token_offset_N1[1:][batch.group_N][batch.leaf_T]
    at_T = start_T + position_T
    return np.where(at_T < end_T, theirs_T[np.minimum(at_T, len(theirs_T) - 1)], np.nan)


def nucleus_level(loss: Loss, batch: TokenBatch) -> float | None:
    """What a penalty on the nucleus entropy would hold on to, if this were its first step."""
    if loss.nucleus is None:
        return None
    offset_N1 = torch.from_numpy(batch.token_offset_N1)
    columns = tensors(batch.columns, "cpu")
    return loss.nucleus.level(LossColumns(columns, loss_mask(loss, batch), offset_N1))
