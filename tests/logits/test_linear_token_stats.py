"""Statistics from hidden states: those of the logits, without ever holding all logits."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from token_stats_reference import EVERYTHING, given, weighted_sum
from torch import Tensor

from pyrl.logits.linear_token_stats import linear_token_stats
from pyrl.logits.lm_head import chunk_rows
from pyrl.logits.token_stats import Request, token_stats


def linear_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden_TH = torch.randn(11, 6, generator=generator).to(dtype).requires_grad_()
    weight_VH = torch.randn(17, 6, generator=generator).to(dtype).requires_grad_()
    bias_V = torch.randn(17, generator=generator).to(dtype).requires_grad_()
    label_T = torch.randint(17, (11,), generator=generator)
    label_T[3] = -100
    return hidden_TH, weight_VH, bias_V, label_T


@pytest.mark.parametrize("options", [{}, EVERYTHING | {"softcap": 4.0}], ids=["plain", "all"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_statistics_from_hidden_states_are_those_of_their_logits(
    dtype: torch.dtype, chunk: int | None, with_bias: bool, options: dict[str, Any]
) -> None:
    hidden_TH, weight_VH, bias_V, label_T = linear_problem(dtype)
    bias = bias_V if with_bias else None
    inputs = [hidden_TH, weight_VH, *([bias_V] if with_bias else [])]
    ours = given(
        linear_token_stats(hidden_TH, weight_VH, label_T, 0.7, bias=bias, chunk=chunk, **options)
    )
    logits_TV = torch.nn.functional.linear(hidden_TH, weight_VH, bias)
    dense = given(token_stats(logits_TV, label_T, 0.7, **options))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    assert list(ours) == list(dense)
    if dtype != torch.bfloat16:  # whose last bit may move a token out of the nucleus
        for name, value in ours.items():
            torch.testing.assert_close(value, dense[name], rtol=tolerance, atol=tolerance)
    for our_gradient, expected in zip(
        torch.autograd.grad(weighted_sum(ours), inputs),
        torch.autograd.grad(weighted_sum(dense), inputs),
        strict=True,
    ):
        assert our_gradient.dtype == dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(our_gradient, expected, rtol=tolerance, atol=tolerance * scale)


def test_gradcheck_passes_from_hidden_states() -> None:
    hidden_TH, weight_VH, bias_V, label_T = linear_problem(torch.float64)

    def stats(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> tuple[Tensor, ...]:
        result = linear_token_stats(hidden_TH, weight_VH, label_T, 1.4, bias=bias_V, chunk=4)
        return result.logprob, result.entropy, result.logsumexp

    assert torch.autograd.gradcheck(stats, (hidden_TH, weight_VH, bias_V))


class Profile:
    """GEMMs inside the block and the largest tensor that an operation there was given."""

    def __enter__(self) -> Profile:
        self.profile = torch.autograd.profiler.profile(use_kineto=False, record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.profile.__exit__(*exception)
        names = [event.name for event in self.profile.function_events]
        self.gemms = sum(name in ("aten::mm", "aten::addmm", "aten::addmm_") for name in names)
        self.largest = max(
            math.prod(shape)
            for event in self.profile.function_events
            for shape in event.input_shapes
            if all(isinstance(n, int) for n in shape)
        )


def test_hidden_states_never_become_a_whole_matrix_of_logits_and_take_four_gemms() -> None:
    hidden_TH = torch.randn(64, 4, requires_grad=True)
    weight_VH = torch.randn(50, 4, requires_grad=True)
    with Profile() as profile:
        stats = linear_token_stats(hidden_TH, weight_VH, torch.arange(64) % 50, chunk=8)
        (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert profile.gemms == 4 * 64 / 8
    assert profile.largest == 8 * 52  # rows of 50 begin at multiples of 16 bytes


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: str) -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float64)
    inputs = {"hidden": hidden_TH, "weight": weight_VH}
    dense = token_stats(hidden_TH @ weight_VH.T, label_T).entropy.sum()
    expected = dict(zip(inputs, torch.autograd.grad(dense, [hidden_TH, weight_VH]), strict=True))
    inputs[frozen] = inputs[frozen].detach()
    with Profile() as profile:
        linear_token_stats(*inputs.values(), label_T, chunk=11).entropy.sum().backward()
    assert profile.gemms == 3
    for name, tensor in inputs.items():
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[name])


def test_a_weight_tied_to_the_embedding_gets_both_gradients() -> None:
    _, weight_VH, _, label_T = linear_problem(torch.float64)
    token_T = torch.arange(11)

    def total(function: Any) -> Tensor:
        hidden_TH = torch.nn.functional.embedding(token_T, weight_VH).tanh()
        return weighted_sum(given(function(hidden_TH)))

    ours = total(lambda hidden_TH: linear_token_stats(hidden_TH, weight_VH, label_T, chunk=4))
    dense = total(lambda hidden_TH: token_stats(hidden_TH @ weight_VH.T, label_T))
    torch.testing.assert_close(
        torch.autograd.grad(ours, weight_VH), torch.autograd.grad(dense, weight_VH)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_half_precision_weight_is_rounded_once(dtype: torch.dtype) -> None:
    """Sums in the weight's own precision would lose what each of many chunks adds."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(512, 8, generator=generator).to(dtype)
    weight_VH = torch.randn(16, 8, generator=generator).to(dtype).requires_grad_()
    label_T = torch.randint(16, (512,), generator=generator)
    linear_token_stats(hidden_TH, weight_VH, label_T, chunk=2).logprob.sum().backward()
    logits_TV = (hidden_TH @ weight_VH.detach().T).requires_grad_()
    token_stats(logits_TV, label_T).logprob.sum().backward()
    assert logits_TV.grad is not None
    assert weight_VH.grad is not None
    expected_VH = logits_TV.grad.double().T @ hidden_TH.double()
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(
        weight_VH.grad.double(), expected_VH, rtol=half_ulp * 1.01, atol=1e-4
    )


def test_autocast_changes_nothing() -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden_TH, weight_VH)]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            stats = linear_token_stats(*leaves, label_T, chunk=4)
            total = (stats.logprob + stats.entropy).sum()
            found.append([stats.logprob, *torch.autograd.grad(total, leaves)])
    for plain, under_autocast in zip(*found, strict=True):
        assert under_autocast.equal(plain)


def test_strided_hidden_states_give_the_dense_result() -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float64)
    wide_TH = torch.randn(11, 20, dtype=torch.float64)
    wide_TH[:, 1:13:2] = hidden_TH.detach()
    strided_TH = wide_TH[:, 1:13:2].requires_grad_()
    totals = [
        weighted_sum(given(linear_token_stats(h_TH, weight_VH, label_T, chunk=4)))
        for h_TH in (hidden_TH, strided_TH)
    ]
    dense, strided = (
        torch.autograd.grad(total, leaf)[0]
        for total, leaf in zip(totals, (hidden_TH, strided_TH), strict=True)
    )
    torch.testing.assert_close(strided, dense, rtol=0, atol=1e-14)


def test_no_tokens_from_hidden_states_give_zero_gradients() -> None:
    hidden_TH = torch.zeros(0, 4, requires_grad=True)
    weight_VH = torch.ones(3, 4, requires_grad=True)
    linear_token_stats(
        hidden_TH, weight_VH, torch.zeros(0, dtype=torch.int64)
    ).logprob.sum().backward()
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    assert weight_VH.grad.eq(0).all()


def test_chunks_are_large_enough_for_the_weights_gradient_and_bounded() -> None:
    assert chunk_rows(512, 49152, 1024, 4, "cpu") == 256
    assert chunk_rows(4096, 49152, 4096, 4, "cpu") == 1024  # H / 4
    assert chunk_rows(4096, 262144, 4096, 4, "cpu") == 256  # 256 MiB
    assert chunk_rows(4096, 262144, 4096, 8, "cpu") == 128  # never less
    assert chunk_rows(300, 49152, 1024, 4, "cpu") == 150  # spread evenly
    assert chunk_rows(7, 49152, 1024, 4, "cpu") == 7
    assert chunk_rows(16384, 151936, 1536, 2, "cuda") == 4096
    assert chunk_rows(0, 10, 4, 4, "cpu") == 1


def test_second_derivatives_from_hidden_states_are_refused() -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float64)
    entropy = linear_token_stats(hidden_TH, weight_VH, label_T).entropy.sum()
    (slope_TH,) = torch.autograd.grad(entropy, hidden_TH, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="linear_token_stats: expected to be differentiated once"
    ):
        slope_TH.sum().backward()


def test_the_linear_op_obeys_torchs_rules() -> None:
    request = Request(0.8).packed()
    for with_bias in (False, True):
        hidden_TH, weight_VH, bias_V, label_T = linear_problem(torch.float32)
        bias = bias_V if with_bias else None
        torch.library.opcheck(
            torch.ops.pyrl.linear_token_stats.default,
            (hidden_TH, weight_VH, bias, label_T, request, 4),
        )


def test_a_compiled_graph_from_hidden_states_has_no_breaks_and_the_same_results() -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float32)

    def loss(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        stats = linear_token_stats(hidden_TH * 2, weight_VH, label_T, 0.9, top_k=3)
        return weighted_sum(given(stats))

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(hidden_TH, weight_VH)
        results.append((value, *torch.autograd.grad(value, (hidden_TH, weight_VH))))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)


def test_bad_hidden_states_say_what_was_expected_and_what_came() -> None:
    hidden_TH, weight_VH, bias_V, label_T = linear_problem(torch.float32)
    with pytest.raises(ValueError, match=r"expected \[T, H\] and \[V, H\], got \(11, 6\) and"):
        linear_token_stats(hidden_TH, weight_VH[:, :5], label_T)
    with pytest.raises(ValueError, match=r"weight_VH: expected torch.float32 .* got torch.float64"):
        linear_token_stats(hidden_TH, weight_VH.double(), label_T)
    with pytest.raises(ValueError, match=r"weight_VH: expected at least one row, got 0"):
        linear_token_stats(hidden_TH, weight_VH[:0], label_T)
    with pytest.raises(ValueError, match=r"bias: expected \[17\], got \(16,\)"):
        linear_token_stats(hidden_TH, weight_VH, label_T, bias=bias_V[:16])
    with pytest.raises(ValueError, match=r"label_T: expected int64\[11\] like the rows of hidden"):
        linear_token_stats(hidden_TH, weight_VH, label_T[:4])
    with pytest.raises(ValueError, match=r"chunk: expected >= 1, got 0"):
        linear_token_stats(hidden_TH, weight_VH, label_T, chunk=0)
    with pytest.raises(ValueError, match=r"hidden_TH: expected one of .* got torch.int64"):
        linear_token_stats(hidden_TH.long(), weight_VH.long(), label_T)
    with pytest.raises(ValueError, match=r"hidden_TH: expected a CPU or CUDA tensor, got meta"):
        linear_token_stats(hidden_TH.to("meta"), weight_VH.to("meta"), label_T.to("meta"))
    with pytest.raises(ValueError, match=r"top_k: expected a whole number, 0 to 8, got 9"):
        linear_token_stats(hidden_TH, weight_VH, label_T, top_k=9)


def test_the_options_are_those_of_token_stats_by_name() -> None:
    hidden_TH, weight_VH, _, label_T = linear_problem(torch.float32)
    options = list(inspect.signature(token_stats).parameters)[3:-1]
    assert list(inspect.signature(linear_token_stats).parameters)[6:] == options
    with pytest.raises(TypeError, match=r"linear_token_stats\(\) got an unexpected keyword"):
        linear_token_stats(hidden_TH, weight_VH, label_T, top_p=0.9)
