"""Other implementations of a token's log-prob and entropy; each needs its own package installed.

The functions raise ImportError where theirs is missing. What to install beside pyrl:

    pip install trl msgpack protobuf requests jsonschema
    pip install --no-deps liger-kernel triton
    pip install --no-deps verl ray tensordict codetiming omegaconf hydra-core \
        pyvers orjson cloudpickle importlib_metadata zipp
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Stats = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [T, V], label [T]) -> log-prob and entropy [T]."""

LinearStats = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden [T, H], weight [V, H], label [T]) -> log-prob and entropy [T]."""


def eager(logits_TV: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer writes in plain torch, in float32."""
    logprob_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    logprob_T = logprob_TV.gather(1, label_T[:, None])[:, 0]
    return logprob_T, -(logprob_TV.exp() * logprob_TV).sum(dim=-1)


def eager_linear(hidden_TH: Tensor, weight_VH: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
    return eager(hidden_TH @ weight_VH.T, label_T)


def trl() -> Stats:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda logits_TV, label_T: (
        selective_log_softmax(logits_TV, label_T),
        entropy_from_logits(logits_TV),
    )


def verl() -> Stats:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    return lambda logits_TV, label_T: (
        logprobs_from_logits(logits_TV, label_T),
        entropy_from_logits(logits_TV),
    )


def verl_linear() -> LinearStats:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()


def liger_linear() -> LinearStats:
    """On a CPU this is Liger's torch-only path."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def stats(hidden_TH: Tensor, weight_VH: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
        nll_T, entropy_T = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden_TH, weight_VH, label_T, 1.0, -100, 1, True
        )
        return -nll_T, entropy_T

    return stats


def liger_grpo(sequences: int = 4) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(hidden, weight, label, advantage, old log-prob) -> GRPO's loss; it has no entropy.

    It works sequence by sequence: the tokens are taken as this many, each with one advantage.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)

    def run(
        hidden_TH: Tensor, weight_VH: Tensor, label_T: Tensor, advantage_T: Tensor, old_T: Tensor
    ) -> Tensor:
        label_BL = label_T.view(sequences, -1)
        value, _ = loss(
            hidden_TH.view(*label_BL.shape, -1),
            weight_VH,
            label_BL,
            torch.ones_like(label_BL),
            advantage_T[:sequences],
            old_per_token_logps=old_T.view_as(label_BL),
        )
        return value

    return run
