"""Autograd, torch.compile and what an in-place backward pass refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from token_stats_reference import EVERYTHING, given, weighted_sum
from torch import Tensor
from torch.autograd import forward_ad

from pyrl.logits.linear_token_stats import linear_token_stats
from pyrl.logits.token_stats import IGNORED_LABEL, Request, token_stats
from pyrl.loss.fused import fused_policy_loss, linear_policy_loss
from pyrl.loss.presets import ppo

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def problem(dtype: torch.dtype = torch.float32, tokens: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_TV = (torch.randn(tokens, 33, generator=generator) * 2).to(dtype)
    label_T = torch.randint(33, (tokens,), generator=generator)
    label_T[tokens // 2] = IGNORED_LABEL
    return logits_TV, label_T


def slope(logits_TV: Tensor, label_T: Tensor, *, inplace: bool, **options: Any) -> Tensor:
    leaf_TV = logits_TV.clone().requires_grad_()
    weighted_sum(given(token_stats(leaf_TV * 1.5, label_T, inplace=inplace, **options))).backward()
    assert leaf_TV.grad is not None
    return leaf_TV.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_in_place_gradient_has_the_bits_of_one_in_a_buffer(dtype: torch.dtype) -> None:
    logits_TV, label_T = problem(dtype)
    for options in ({}, EVERYTHING | {"softcap": 4.0, "temperature": 0.7}):
        buffered = slope(logits_TV, label_T, inplace=False, **options)
        assert slope(logits_TV, label_T, inplace=True, **options).equal(buffered)


def test_an_in_place_gradient_is_written_over_the_logits_and_handed_on_without_a_copy() -> None:
    leaf_TV, label_T = problem()
    weighted_sum(given(token_stats(leaf_TV.requires_grad_(), label_T, inplace=True))).backward()
    assert leaf_TV.grad is not None
    assert leaf_TV.grad.data_ptr() == leaf_TV.data_ptr()


def test_an_in_place_gradient_of_strided_rows_leaves_the_gaps_alone() -> None:
    storage_TV = torch.full((5, 40), 7.0)
    logits_TV, label_T = problem()
    view_TV = storage_TV[:, 3:36]
    view_TV.copy_(logits_TV)
    weighted_sum(given(token_stats(view_TV.requires_grad_(), label_T, inplace=True))).backward()
    assert storage_TV[:, :3].eq(7).all()
    assert storage_TV[:, 36:].eq(7).all()
    weighted_sum(given(token_stats(logits_TV.requires_grad_(), label_T))).backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad.equal(view_TV)


def test_a_second_backward_pass_after_an_in_place_one_is_refused() -> None:
    leaf_TV, label_T = problem()
    total = token_stats(leaf_TV.requires_grad_() * 1, label_T, inplace=True).entropy.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="token_stats: expected one backward pass with inplace="):
        total.backward()


@pytest.mark.parametrize(
    "other",
    [
        lambda logits_TV, label_T: token_stats(logits_TV, label_T).entropy.sum(),
        lambda logits_TV, label_T: token_stats(logits_TV, label_T, inplace=True).entropy.sum(),
        lambda logits_TV, label_T: (logits_TV**2).sum(),
    ],
)
def test_another_graph_that_saved_the_logits_is_refused_after_an_in_place_backward(
    other: Callable[[Tensor, Tensor], Tensor],
) -> None:
    leaf_TV, label_T = problem()
    logits_TV = leaf_TV.requires_grad_() * 1
    second = other(logits_TV, label_T)
    token_stats(logits_TV, label_T, inplace=True).entropy.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_logits_that_their_own_graph_needs_are_refused_after_an_in_place_backward() -> None:
    leaf_TV, label_T = problem()
    logits_TV = leaf_TV.requires_grad_().tanh()  # its backward reads its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_stats(logits_TV, label_T, inplace=True).entropy.sum().backward()


def test_logits_that_cannot_be_overwritten_are_refused() -> None:
    logits_TV, label_T = problem()
    apart_TV = logits_TV.repeat(1, 2)[:, ::2]
    for view_TV in (logits_TV.T.contiguous().T, logits_TV[:1].expand(5, 33), apart_TV):
        with pytest.raises(ValueError, match="with inplace=True expected adjacent columns and row"):
            token_stats(view_TV, label_T, inplace=True)
        token_stats(view_TV, label_T)


@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivatives_are_refused(inplace: bool) -> None:
    leaf_TV, label_T = problem(torch.float64)
    entropy = token_stats(leaf_TV.requires_grad_() * 1, label_T, inplace=inplace).entropy.sum()
    with pytest.raises(
        NotImplementedError, match="token_stats: expected to be differentiated once"
    ):
        torch.autograd.grad(entropy, leaf_TV, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_obeys_torchs_rules(dtype: torch.dtype) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float32:  # traces with symbolic shapes: many seconds, whatever the type
        checks.append("test_aot_dispatch_dynamic")
    logits_TV, label_T = problem(dtype)
    for options in ({}, EVERYTHING):
        torch.library.opcheck(
            torch.ops.pyrl.token_stats.default,
            (logits_TV.clone().requires_grad_(), label_T, Request(0.8, **options).packed(), False),
            test_utils=checks,
        )


# torch's own modules say that of one another when the compiler is loaded.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_has_no_breaks_and_the_same_results(backend: str, inplace: bool) -> None:
    logits_TV, label_T = problem()

    def loss(logits_TV: Tensor) -> Tensor:
        stats = token_stats(logits_TV * 2, label_T, 0.9, inplace=inplace, **EVERYTHING)
        return weighted_sum(given(stats))

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaf_TV = logits_TV.clone().requires_grad_()
        value = function(leaf_TV)
        results.append((value, *torch.autograd.grad(value, leaf_TV)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("strided", ["expanded", "transposed", "every other", "flipped"])
def test_upstream_gradients_of_any_stride_are_read_as_what_they_are(
    strided: str, inplace: bool
) -> None:
    leaf_TV, label_T = problem()
    leaf_TV.requires_grad_()
    generator = torch.Generator().manual_seed(5)
    upstream_KT = {
        "expanded": torch.randn(3, 1, generator=generator, dtype=torch.float64).expand(3, 5),
        "transposed": torch.randn(5, 3, generator=generator, dtype=torch.float64).T,
        "every other": torch.randn(3, 10, generator=generator, dtype=torch.float64)[:, ::2],
        "flipped": torch.randn(6, 5, generator=generator, dtype=torch.float64)[1::2],
    }[strided]
    assert not upstream_KT.is_contiguous()
    slopes = []
    for upstream in (upstream_KT, upstream_KT.clone(memory_format=torch.contiguous_format)):
        stats_KT = torch.ops.pyrl.token_stats(leaf_TV * 1, label_T, Request(1.0).packed(), inplace)
        slopes.append(torch.autograd.grad(stats_KT, leaf_TV, upstream)[0])
    assert slopes[0].equal(slopes[1])


@pytest.mark.parametrize("inplace", [False, True])
def test_labels_may_be_strided(inplace: bool) -> None:
    logits_TV, label_T = problem()
    apart_T = torch.stack([label_T, label_T.flip(0)], dim=1)[:, 0]
    assert not apart_T.is_contiguous()
    assert slope(logits_TV, apart_T, inplace=inplace).equal(
        slope(logits_TV, label_T, inplace=inplace)
    )


def test_a_statistic_without_an_upstream_gradient_counts_as_zero() -> None:
    leaf_TV, label_T = problem()
    entropy = token_stats(leaf_TV.requires_grad_(), label_T, **EVERYTHING).entropy
    (alone_TV,) = torch.autograd.grad(entropy.sum(), leaf_TV)
    plain = token_stats(leaf_TV, label_T).entropy
    assert torch.autograd.grad(plain.sum(), leaf_TV)[0].equal(alone_TV)


def test_logits_without_a_gradient_keep_their_values_in_place() -> None:
    logits_TV, label_T = problem()
    before_TV = logits_TV.clone()
    assert not token_stats(logits_TV, label_T, inplace=True).logprob.requires_grad
    assert logits_TV.equal(before_TV)


def test_a_statistic_may_be_overwritten() -> None:
    """Of masked tokens trainers like to set log-probs to 0."""
    leaf_TV, label_T = problem()
    leaf_TV.requires_grad_()
    mask_T = torch.arange(len(label_T)) % 2 == 0
    kept = token_stats(leaf_TV, label_T, max_probability=True)
    expected = torch.autograd.grad((kept.logprob * mask_T + kept.entropy).sum(), leaf_TV)
    stats = token_stats(leaf_TV, label_T, max_probability=True)
    assert stats.max_probability is not None
    stats.max_probability.zero_()
    stats.logprob[~mask_T] = 0.0
    assert stats.entropy.equal(kept.entropy)
    assert torch.autograd.grad((stats.logprob + stats.entropy).sum(), leaf_TV)[0].equal(expected[0])
    stats = token_stats(leaf_TV, label_T)
    stats.entropy[0] = 0.0  # the gradient is computed from it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.entropy.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    logits_TV, label_T = problem()
    weight_VH = torch.ones(4, logits_TV.shape[1])
    columns = {"advantage_T": torch.ones(len(label_T)), "old_logprob_T": torch.ones(len(label_T))}
    with forward_ad.dual_level():
        dual_TV = forward_ad.make_dual(logits_TV, torch.ones_like(logits_TV))
        for call in (
            lambda: token_stats(dual_TV, label_T),
            lambda: linear_token_stats(dual_TV, weight_VH, label_T),
            lambda: fused_policy_loss(dual_TV, label_T, loss=ppo(), **columns),
            lambda: linear_policy_loss(dual_TV, weight_VH, label_T, loss=ppo(), **columns),
        ):
            with pytest.raises(NotImplementedError):
                call()
