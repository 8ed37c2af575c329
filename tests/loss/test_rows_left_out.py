"""A row that takes no part in the loss has a gradient of zero, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrl.logits.linear_token_stats import linear_token_stats
from pyrl.logits.token_stats import TokenStats, token_stats
from pyrl.loss.fused import fused_policy_loss, linear_policy_loss
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import ppo

TOKENS, WIDTH, LOSS = 5, 6, ppo()
OUT = 3
"""Outside the mask: its label is that of padding, or its logits are not numbers."""


def two_phase(stats: TokenStats, columns: dict[str, Any]) -> Tensor:
    return policy_loss(stats.logprob, stats.entropy, loss=LOSS, **columns).loss


def of_logits(inplace: bool) -> Callable[..., Tensor]:
    return lambda logits_TV, label_T, columns: two_phase(
        token_stats(logits_TV, label_T, inplace=inplace, softcap=30.0), columns
    )


def one_go(inplace: bool) -> Callable[..., Tensor]:
    return lambda logits_TV, label_T, columns: (
        fused_policy_loss(logits_TV, label_T, loss=LOSS, inplace=inplace, softcap=30.0, **columns)[
            0
        ].loss
    )


def problem(vocabulary: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    logits_TV = torch.randn(TOKENS, vocabulary, generator=generator)
    label_T = torch.randint(vocabulary, (TOKENS,), generator=generator)
    mask_T = torch.ones(TOKENS, dtype=torch.bool)
    mask_T[OUT] = False
    columns = {
        "mask_T": mask_T,
        "advantage_T": torch.randn(TOKENS, generator=generator),
        "old_logprob_T": logits_TV.log_softmax(-1).gather(1, label_T[:, None])[:, 0],
    }
    return logits_TV, label_T, columns


@pytest.mark.parametrize("way", [of_logits(False), of_logits(True), one_go(False), one_go(True)])
@pytest.mark.parametrize("vocabulary", [11, 40000])  # few long rows: their parts are shared
@pytest.mark.parametrize("held", ["padding", "nan", "inf"])
def test_what_a_masked_token_holds_does_not_matter(
    way: Callable[..., Tensor], vocabulary: int, held: str
) -> None:
    logits_TV, label_T, columns = problem(vocabulary)
    gradients = []
    for spoilt in (False, True):
        leaf_TV, label_of = logits_TV.clone(), label_T.clone()
        if spoilt and held == "padding":
            label_of[OUT] = -1
        elif spoilt:
            leaf_TV[OUT, 4] = float(held)
        leaf_TV.requires_grad_()
        loss = way(leaf_TV * 1, label_of, columns)
        gradients.append((loss.item(), torch.autograd.grad(loss, leaf_TV)[0]))
    (clean, clean_TV), (spoilt_value, spoilt_TV) = gradients
    assert spoilt_value == clean
    assert spoilt_TV.equal(clean_TV)
    assert spoilt_TV[OUT].count_nonzero() == 0
    assert spoilt_TV.count_nonzero() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_padding_labels_do_not_reach_the_head(fused: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden_TH = torch.randn(TOKENS, WIDTH, generator=generator)
    weight_VH = torch.randn(11, WIDTH, generator=generator)
    _, label_T, columns = problem(11)
    columns["old_logprob_T"] = token_stats(hidden_TH @ weight_VH.T, label_T).logprob
    label_T[OUT] = -1
    weight_VH.requires_grad_()
    if fused:
        loss = linear_policy_loss(hidden_TH, weight_VH, label_T, loss=LOSS, **columns)[0].loss
    else:
        loss = two_phase(linear_token_stats(hidden_TH, weight_VH, label_T), columns)
    (gradient_VH,) = torch.autograd.grad(loss, weight_VH)
    assert gradient_VH.isfinite().all()
    assert gradient_VH.count_nonzero() > 0
