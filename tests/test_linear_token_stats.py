"""Statistics from hidden states: those of the logits, without ever holding all logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_reference import FIELDS, assert_stats, weighted_sum
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyrl.token_stats import linear_token_stats, token_stats


def linear_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden_TH = torch.randn(11, 6, generator=generator).to(dtype).requires_grad_()
    weight_VH = torch.randn(17, 6, generator=generator).to(dtype).requires_grad_()
    bias_V = torch.randn(17, generator=generator).to(dtype).requires_grad_()
    label_T = torch.randint(17, (11,), generator=generator)
    label_T[3] = -100
    return hidden_TH, weight_VH, bias_V, label_T


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_statistics_from_hidden_states_are_those_of_their_logits(
    dtype: torch.dtype, chunk: int, with_bias: bool
) -> None:
    hidden_TH, weight_VH, bias_V, label_T = linear_problem(dtype)
    bias = bias_V if with_bias else None
    inputs = [hidden_TH, weight_VH, *([bias_V] if with_bias else [])]
    ours = linear_token_stats(hidden_TH, weight_VH, label_T, 0.7, bias=bias, chunk=chunk)
    logits_TV = torch.nn.functional.linear(hidden_TH, weight_VH, bias)
    dense = token_stats(logits_TV, label_T, 0.7)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert_stats(ours, tuple(getattr(dense, name).double() for name in FIELDS), tolerance)
    for our_gradient, expected in zip(
        torch.autograd.grad(weighted_sum(ours.logprob, ours.entropy, ours.logsumexp), inputs),
        torch.autograd.grad(weighted_sum(dense.logprob, dense.entropy, dense.logsumexp), inputs),
        strict=True,
    ):
        scale = expected.abs().max().item()
        torch.testing.assert_close(our_gradient, expected, rtol=tolerance, atol=tolerance * scale)


def test_gradcheck_passes_from_hidden_states() -> None:
    hidden_TH, weight_VH, bias_V, label_T = linear_problem(torch.float64)

    def stats(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> tuple[Tensor, ...]:
        result = linear_token_stats(hidden_TH, weight_VH, label_T, 1.4, bias=bias_V, chunk=4)
        return result.logprob, result.entropy, result.logsumexp

    assert torch.autograd.gradcheck(stats, (hidden_TH, weight_VH, bias_V))


class LargestTensor(TorchDispatchMode):
    """Sizes of everything that torch computes inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return result


def test_hidden_states_never_become_a_whole_matrix_of_logits() -> None:
    hidden_TH = torch.randn(64, 4, requires_grad=True)
    weight_VH = torch.randn(50, 4, requires_grad=True)
    with LargestTensor() as largest:
        stats = linear_token_stats(hidden_TH, weight_VH, torch.arange(64) % 50, chunk=8)
        (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert (8, 50) in largest.shapes
    assert max(math.prod(shape) for shape in largest.shapes) == 8 * 50


def test_a_frozen_weight_gets_no_gradient_and_costs_none() -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float64)
    frozen_VH = weight_VH.detach()
    expected = token_stats(hidden_TH @ frozen_VH.T, label_T).entropy.sum()
    (expected_TH,) = torch.autograd.grad(expected, hidden_TH)
    with LargestTensor() as largest:
        stats = linear_token_stats(hidden_TH, frozen_VH, label_T, chunk=4)
        stats.entropy.sum().backward()
    torch.testing.assert_close(hidden_TH.grad, expected_TH)
    assert frozen_VH.grad is None
    assert (17, 6) not in largest.shapes


def test_a_frozen_hidden_state_still_trains_the_weight() -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float64)
    linear_token_stats(hidden_TH.detach(), weight_VH, label_T, chunk=4).logprob.sum().backward()
    dense = token_stats(hidden_TH.detach() @ weight_VH.T, label_T).logprob.sum()
    torch.testing.assert_close(weight_VH.grad, torch.autograd.grad(dense, weight_VH)[0])


def test_no_tokens_from_hidden_states_give_zero_gradients() -> None:
    hidden_TH = torch.zeros(0, 4, requires_grad=True)
    weight_VH = torch.ones(3, 4, requires_grad=True)
    linear_token_stats(
        hidden_TH, weight_VH, torch.zeros(0, dtype=torch.int64)
    ).logprob.sum().backward()
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    assert weight_VH.grad.eq(0).all()


def test_second_derivatives_from_hidden_states_are_refused() -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float64)
    stats = linear_token_stats(hidden_TH, weight_VH, label_T)
    with pytest.raises(
        NotImplementedError, match="token_stats: expected to be differentiated once"
    ):
        torch.autograd.grad(stats.entropy.sum(), hidden_TH, create_graph=True)


def test_bad_hidden_states_say_what_was_expected_and_what_came() -> None:
    hidden_TH, weight_VH, bias_V, label_T = linear_problem(torch.float32)
    with pytest.raises(ValueError, match=r"expected \[T, H\] and \[V, H\], got \(11, 6\) and"):
        linear_token_stats(hidden_TH, weight_VH[:, :5], label_T)
    with pytest.raises(ValueError, match=r"weight_VH: expected torch.float32 .* got torch.float64"):
        linear_token_stats(hidden_TH, weight_VH.double(), label_T)
    with pytest.raises(ValueError, match=r"bias: expected \[17\], got \(16,\)"):
        linear_token_stats(hidden_TH, weight_VH, label_T, bias=bias_V[:16])
    with pytest.raises(ValueError, match=r"label_T: expected int64\[11\] like the rows of hidden"):
        linear_token_stats(hidden_TH, weight_VH, label_T[:4])
    with pytest.raises(ValueError, match=r"chunk: expected >= 1, got 0"):
        linear_token_stats(hidden_TH, weight_VH, label_T, chunk=0)
    with pytest.raises(ValueError, match=r"hidden_TH: expected one of .* got torch.int64"):
        linear_token_stats(hidden_TH.long(), weight_VH.long(), label_T)
    with pytest.raises(ValueError, match=r"0 <= label < 17, got 17 at 2"):
        linear_token_stats(hidden_TH, weight_VH, label_T.index_fill(0, torch.tensor([2]), 17))
