"""Two responses of 4 and 3 tokens, with every column that a loss may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrl.loss import Loss, LossState
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import ppo
from pyrl.loss.result import PolicyLoss


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


COLUMNS: dict[str, Tensor] = {
    "logprob_T": tensor([-0.50, -1.20, -2.00, -0.10, -0.80, -3.00, -0.30]),
    "entropy_T": tensor([0.90, 1.50, 2.20, 0.30, 1.10, 2.80, 0.70]),
    "old_logprob_T": tensor([-0.60, -1.00, -2.50, -0.12, -0.70, -2.20, -0.65]),
    "rollout_logprob_T": tensor([-0.62, -0.95, -2.30, -0.12, -0.75, -2.00, -0.60]),
    "ref_logprob_T": tensor([-0.70, -1.10, -2.10, -0.20, -0.60, -2.60, -0.55]),
    "proxy_logprob_T": tensor([-0.58, -0.98, -2.45, -0.12, -0.69, -2.15, -0.64]),
    "expert_logprob_T": tensor([-0.55, -1.00, -1.50, -0.30, -0.90, -2.50, -0.60]),
    "second_logprob_T": tensor([-0.80, -1.15, -2.20, -0.25, -0.85, -2.00, -0.80]),
    "nucleus_entropy_T": tensor([0.90, 1.50, 2.20, 0.30, 1.10, 2.80, 0.70]),
    "advantage_T": tensor([1.0] * 4 + [-0.8] * 3),
    "reward_T": tensor([1.0] * 4 + [-1.0] * 3),
    "sum_p2_T": tensor([0.5, 0.3, 0.2, 0.8, 0.4, 0.1, 0.6]),
    "sum_p2_logp_T": tensor([-0.3, -0.3, -0.3, -0.1, -0.3, -0.2, -0.3]),
}
NOUGHT_OR_ONE_T = COLUMNS["reward_T"].clamp(min=0)
"""The same rewards without a sign, as some published values have them."""
RESPONSES = {"offset_N1": torch.tensor([0, 4, 7]), "group_N": torch.tensor([0, 0])}
STATE = LossState(entropy=0.3, mean_entropy=0.3, nucleus_entropy=2.0)
PPO = ppo()


def fixture_loss(loss: Loss = PPO, **changes: Any) -> PolicyLoss:
    """The loss of the two responses; of the reference's log-probs only where it reads them."""
    columns = {k: v for k, v in COLUMNS.items() if k != "ref_logprob_T" or loss.has_reference}
    given: dict[str, Any] = {"loss": loss, "state": STATE, "per_token": True}
    return policy_loss(**(columns | RESPONSES | given | changes))


def unit(loss: Loss) -> Loss:
    """The same with weight 1 for each token, so that gradients are a token's own."""
    from pyrl.loss.aggregate import TokenSum

    return replace(loss, aggregate=TokenSum())


def near(values: Tensor, expected: float | Sequence[float]) -> None:
    """To the digits that are published."""
    expected_T = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(values.detach().double(), expected_T, rtol=0, atol=1e-6)
