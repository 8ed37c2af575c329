"""The loss from the hidden states of tokens that rows share: two-phase from all rows' tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_fused_loss import BUSY, LOCAL, problem, terms_of
from torch import Tensor

from pyrl.logits.linear_token_stats import linear_token_stats
from pyrl.loss import Loss
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import PRESETS
from pyrl.loss.shared import shared_policy_loss

UNIQUE_T = torch.tensor([*range(9), 3, 0, 1, 2, *range(9, 15), 0, 7, 14, 14])
"""23 tokens of rows are 15; one in four rows, and in any order."""


def head_problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias that need gradients, and labels."""
    generator = torch.Generator().manual_seed(2)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return leaf(15, 12), leaf(301, 12), leaf(301), torch.randint(301, (15,), generator=generator)


def columns_of(loss: Loss) -> dict[str, Any]:
    *_, columns, before = problem(torch.float32)
    return columns | {"terms": terms_of(loss, columns, before)}


def slopes(value: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("loss", [*LOCAL.values(), BUSY], ids=[*LOCAL, "busy"])
@pytest.mark.parametrize(("chunk", "moved"), [(1, True), (4, False), (100, True)])
def test_the_gradient_is_that_of_the_rows(loss: Loss, chunk: int, moved: bool) -> None:
    hidden_UH, weight_VH, bias_V, label_U = head_problem()
    leaves, given = (hidden_UH, weight_VH, bias_V), columns_of(loss)
    stats = linear_token_stats(
        hidden_UH[UNIQUE_T], weight_VH, label_U[UNIQUE_T], 0.9, bias=bias_V, chunk=100
    )
    if not moved:
        given["old_logprob_T"] = stats.logprob.detach()
    theirs = policy_loss(stats.logprob, stats.entropy, loss=loss, **given)
    if not moved:
        del given["old_logprob_T"]
    ours, found = shared_policy_loss(
        hidden_UH, weight_VH, label_U, UNIQUE_T, 0.9, loss=loss, bias=bias_V, chunk=chunk, **given
    )
    assert found.logprob.tolist() == pytest.approx(stats.logprob.tolist(), abs=1e-12)
    assert found.entropy.tolist() == pytest.approx(stats.entropy.tolist(), abs=1e-12)
    assert not found.logprob.requires_grad
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-12)
    assert ours.totals.tolist() == pytest.approx(theirs.totals.tolist(), rel=1e-9)
    for our, their in zip(slopes(ours.loss, leaves), slopes(theirs.loss, leaves), strict=True):
        assert float((our - their).abs().max()) <= 1e-12 * float(their.abs().max())


def test_sixteen_bits_add_the_chunks_of_the_weight_in_more() -> None:
    """Chunks of one token differ from one chunk by no more than a rounding of the result."""
    hidden_UH, weight_VH, _, label_U = head_problem(torch.bfloat16)
    given, found = columns_of(BUSY), {}
    for chunk in (1, 100):
        out, _ = shared_policy_loss(
            hidden_UH, weight_VH, label_U, UNIQUE_T, 0.9, loss=BUSY, chunk=chunk, **given
        )
        found[chunk] = slopes(out.loss, (weight_VH,))[0].double()
    off = float((found[1] - found[100]).abs().max() / found[100].abs().max())
    assert off <= torch.finfo(torch.bfloat16).eps


def test_what_needs_no_gradient_gets_none() -> None:
    hidden_UH, weight_VH, _, label_U = head_problem()
    given = columns_of(BUSY)
    arguments = (weight_VH.detach(), label_U, UNIQUE_T, 0.9)
    out, _ = shared_policy_loss(hidden_UH, *arguments, loss=BUSY, **given)
    (slope,) = slopes(out.loss, (hidden_UH,))
    assert slope.any()
    with torch.no_grad():
        still, _ = shared_policy_loss(hidden_UH, *arguments, loss=BUSY, **given)
    assert not still.loss.requires_grad
    assert still.loss.equal(out.loss.detach())


def test_a_loss_that_is_not_local_is_refused() -> None:
    hidden_UH, weight_VH, _, label_U = head_problem()
    given = columns_of(BUSY)
    for name, axis in (("gspo", "Ratio.of = 'seq_geo'"), ("siren", "NucleusAnchor")):
        with pytest.raises(ValueError, match=f"expected one that is local to a token, got {axis}"):
            shared_policy_loss(
                hidden_UH, weight_VH, label_U, UNIQUE_T, loss=PRESETS[name](), **given
            )
    with pytest.raises(ValueError, match=r"advantage_T: expected \[22\]"):
        shared_policy_loss(hidden_UH, weight_VH, label_U, UNIQUE_T[1:], loss=BUSY, **given)
    still = replace(BUSY, entropy=0.0)
    with pytest.raises(ValueError, match="rollout_logprob_T"):
        shared_policy_loss(
            *(hidden_UH, weight_VH, label_U, UNIQUE_T),
            loss=replace(still, ratio=replace(still.ratio, to="rollout")),
            terms=given["terms"],
        )
