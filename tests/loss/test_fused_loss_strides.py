"""One-go over logits whose columns or rows do not lie one after the other."""

from __future__ import annotations

import pytest
import torch
from test_fused_loss import BUSY, problem, slope

from pyrl.loss.fused import fused_policy_loss


def test_logits_of_any_stride_give_the_dense_gradient() -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    slopes = []
    for view_TV in (logits_TV, logits_TV.T.contiguous().T, logits_TV.repeat(1, 2)[:, :2077]):
        leaf_TV = view_TV.detach().requires_grad_()
        out, _ = fused_policy_loss(leaf_TV, label_T, 0.9, loss=BUSY, **columns)
        slopes.append(slope(out.loss, leaf_TV))
    assert slopes[1].equal(slopes[0])
    assert slopes[2].equal(slopes[0])


def test_logits_that_cannot_be_overwritten_are_refused() -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    for view_TV in (logits_TV.T.contiguous().T, logits_TV[:1].expand(logits_TV.shape)):
        with pytest.raises(ValueError, match="with inplace=True expected adjacent columns and row"):
            fused_policy_loss(view_TV, label_T, loss=BUSY, inplace=True, **columns)
