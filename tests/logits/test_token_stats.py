"""Statistics and gradients against float64 autograd, at every element type and awkward size."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator

import hypothesis
import hypothesis.strategies as st
import pytest
import token_stats_reference as reference
import torch
from token_stats_reference import EVERYTHING, assert_stats, given, weighted_sum
from torch import Tensor

from pyrl import _core
from pyrl.logits.token_stats import TokenStats, token_stats

VOCABULARIES = [1, 2, 3, 31, 2049, 49152]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# On a machine with a GPU the CUDA kernels meet the same references.
DEVICES = [
    "cpu",
    *["cuda"] * (torch.cuda.is_available() and _core.build_info()["cuda"] is not None),
]

# One distribution and the rows of derivatives that belong to it.
GOLDEN_LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -4.0]
GOLDEN_LOGPROB = [-0.575833, -1.575833, -2.075833, -2.575833, -3.575833, -6.575833]
GOLDEN_PROBABILITY = [0.562237, 0.206835, 0.125452, 0.076090, 0.027992, 0.001394]
GOLDEN_ENTROPY_SLOPE = [-0.359568, 0.074557, 0.107947, 0.103519, 0.066074, 0.007471]


def problem(
    tokens: int, vocabulary: int, dtype: torch.dtype, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits_TV = (torch.randn(tokens, vocabulary, generator=generator) * scale).to(dtype)
    return logits_TV, torch.randint(vocabulary, (tokens,), generator=generator)


def gradients(
    logits_TV: Tensor, label_T: Tensor, temperature: float, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Ours and the float64 reference's."""
    ours_TV = logits_TV.detach().to(device, copy=True).requires_grad_()
    stats = token_stats(ours_TV, label_T.to(device), temperature)
    weighted_sum(given(stats)).backward()
    wide_TV = logits_TV.detach().double().requires_grad_()
    expected = reference.token_stats(wide_TV, label_T, temperature)
    weighted_sum({name: expected[name] for name in given(stats)}).backward()
    assert ours_TV.grad is not None
    assert wide_TV.grad is not None
    return ours_TV.grad.cpu(), wide_TV.grad


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("device", DEVICES)
def test_statistics_are_the_references(
    device: str, vocabulary: int, dtype: torch.dtype, temperature: float
) -> None:
    logits_TV, label_T = problem(5, vocabulary, dtype)
    stats = token_stats(logits_TV.to(device), label_T.to(device), temperature)
    assert stats.logprob.dtype == torch.float64
    assert_stats(stats, reference.token_stats(logits_TV, label_T, temperature), 2e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_references(
    device: str, vocabulary: int, dtype: torch.dtype, temperature: float
) -> None:
    ours_TV, expected_TV = gradients(*problem(4, vocabulary, dtype), temperature, device)
    half = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-5)
    torch.testing.assert_close(ours_TV.double(), expected_TV, rtol=half, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_common_offset_costs_no_accuracy(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.rand(8, 49152, generator=generator) * 100 - 50 + offset
    ranks = torch.tensor([0, 1, 100, 20000, 49000, 49149, 49150, 49151])
    label_T = logits_TV.argsort(dim=1)[torch.arange(8), ranks]
    stats = token_stats(logits_TV, label_T)
    expected = reference.token_stats(logits_TV, label_T, 1.0)
    assert (stats.logprob - expected["logprob"]).abs().max() <= 2e-6
    assert (stats.entropy - expected["entropy"]).abs().max() <= 2e-6
    assert stats.logprob.min() < -64  # where float32 has steps of 8e-6
    ours_TV, expected_TV = gradients(logits_TV, label_T, 1.0)
    torch.testing.assert_close(ours_TV.double(), expected_TV, rtol=1e-5, atol=1e-6)


def test_golden_statistics_at_three_temperatures() -> None:
    logits_TV = torch.tensor([GOLDEN_LOGITS] * 6, dtype=torch.float64)
    label_T = torch.arange(6)
    stats = token_stats(logits_TV, label_T, top_k=5)
    assert stats.confidence is not None
    assert stats.logprob.tolist() == pytest.approx(GOLDEN_LOGPROB, abs=1e-6)
    assert stats.entropy.tolist() == pytest.approx([1.215365] * 6, abs=1e-6)
    assert stats.confidence.tolist() == pytest.approx([1 - 0.001394] * 6, abs=1e-6)
    warm = token_stats(logits_TV, label_T, 1.2)
    assert warm.entropy[0].item() == pytest.approx(1.329925, abs=1e-6)
    assert warm.logprob[5].item() == pytest.approx(-5.692548, abs=1e-6)
    cold = token_stats(logits_TV.float(), label_T, 0.8)
    assert cold.entropy[0].item() == pytest.approx(1.045781, abs=1e-6)
    assert cold.logprob[1].item() == pytest.approx(-1.685681, abs=1e-6)


def test_golden_gradient_rows() -> None:
    def row(function: Callable[[TokenStats], Tensor], label: int = 0) -> list[float]:
        logits_TV = torch.tensor([GOLDEN_LOGITS], requires_grad=True)
        function(token_stats(logits_TV, torch.tensor([label]))).backward()
        assert logits_TV.grad is not None
        return logits_TV.grad[0].tolist()

    assert row(lambda stats: stats.entropy) == pytest.approx(GOLDEN_ENTROPY_SLOPE, abs=1e-6)
    assert row(lambda stats: stats.logsumexp) == pytest.approx(GOLDEN_PROBABILITY, abs=1e-6)
    mixed = row(lambda stats: -1.105171 * stats.logprob - 0.01 * stats.entropy, label=1)
    expected = [0.624963, -0.877328, 0.137566, 0.083058, 0.030275, 0.001466]
    assert mixed == pytest.approx(expected, abs=1e-6)


def test_a_uniform_distribution_over_ten_has_the_entropy_log_ten() -> None:
    stats = token_stats(torch.full((1, 10), 3.0), torch.tensor([4]), top_k=5)
    assert stats.confidence is not None
    assert stats.entropy.item() == pytest.approx(2.302585, abs=1e-6)
    assert stats.logprob.item() == pytest.approx(-2.302585, abs=1e-6)
    assert stats.confidence.item() == pytest.approx(0.5, abs=1e-7)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_any_row_agrees_with_the_reference(data: st.DataObject) -> None:
    number = st.one_of(st.floats(-80, 80, width=32), st.just(-math.inf))
    row = data.draw(st.lists(number, min_size=1, max_size=40).filter(lambda r: max(r) > -math.inf))
    label = data.draw(st.integers(0, len(row) - 1))
    temperature = data.draw(st.floats(0.1, 5))
    logits_TV, label_T = torch.tensor([row]), torch.tensor([label])
    expected = reference.token_stats(logits_TV, label_T, temperature)
    assert_stats(token_stats(logits_TV, label_T, temperature), expected, 2e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradcheck_passes(temperature: float) -> None:
    logits_TV, label_T = problem(4, 9, torch.float64)
    label_T[2] = -100

    def stats(logits_TV: Tensor) -> tuple[Tensor, ...]:
        result = token_stats(logits_TV, label_T, temperature)
        return result.logprob, result.entropy, result.logsumexp

    assert torch.autograd.gradcheck(stats, (logits_TV.requires_grad_(),))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restored_threads")
def test_results_never_depend_on_the_number_of_threads() -> None:
    logits_TV, label_T = problem(37, 49152, torch.bfloat16)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        stats = token_stats(logits_TV, label_T, **EVERYTHING)
        slope_TV, _ = gradients(logits_TV, label_T, 0.8)
        results.append([*given(stats).values(), slope_TV])
    for alone, together in zip(*results, strict=True):
        assert together.equal(alone)


def test_any_upstream_gradient_and_any_stride_of_logits_gives_the_dense_result() -> None:
    wide_TV = torch.randn(6, 62, generator=torch.Generator().manual_seed(0))
    label_T = torch.tensor([0, 30, 2, 9, 9, 1])
    upstream_T = torch.randn(12, generator=torch.Generator().manual_seed(1))[::2]
    for view_TV in (wide_TV[:, 5:36], wide_TV[:, ::2], wide_TV.T.contiguous().T[:, :31]):
        results = []
        for logits_TV in (view_TV, view_TV.contiguous()):
            leaf_TV = logits_TV.detach().requires_grad_()
            stats = token_stats(leaf_TV, label_T)
            outputs = (stats.logprob, stats.entropy, stats.logsumexp)
            upstream = (upstream_T, torch.tensor(0.5).expand(6), upstream_T.flip(0))
            results.append((stats.entropy, *torch.autograd.grad(outputs, leaf_TV, upstream)))
        for strided, dense in zip(*results, strict=True):
            torch.testing.assert_close(strided, dense, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens_have_no_mass_and_no_gradient(dtype: torch.dtype) -> None:
    logits_TV, label_T = problem(5, 3000, dtype)
    logits_TV[:, 1::2] = -math.inf
    label_T = label_T // 2 * 2
    expected = reference.token_stats(logits_TV, label_T, 1.0)
    assert_stats(token_stats(logits_TV, label_T), expected, 2e-6)
    ours_TV, _ = gradients(logits_TV, label_T, 1.0)
    assert ours_TV[:, 1::2].eq(0).all()
    kept_TV, _ = gradients(logits_TV[:, ::2], label_T // 2, 1.0)
    torch.testing.assert_close(ours_TV[:, ::2], kept_TV, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("masked", [255, 256, 2047, 2048, 16384, 16500])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e30, -1e20, -1e10])
def test_tokens_that_are_masked_at_the_front_leave_the_others_as_they_are(
    masked: int, entropy: float, fill: float
) -> None:
    """The first logits of a part give the shift of its sums."""
    logits_TV, label_T = problem(3, 18000, torch.float32)
    logits_TV[:, :masked] = fill
    label_T[:] = 17000
    logits_TV.requires_grad_()
    stats = token_stats(logits_TV, label_T)
    assert_stats(stats, reference.token_stats(logits_TV.detach(), label_T, 1.0), 2e-6)
    (stats.logprob + entropy * stats.entropy).sum().backward()
    assert logits_TV.grad is not None
    assert not logits_TV.grad[:, :masked].any()
    assert logits_TV.grad.isfinite().all()


def test_a_row_of_huge_logits_is_nan_and_no_other_row_is() -> None:
    logits_TV, label_T = problem(3, 5000, torch.float32)
    logits_TV[1] = 1e30
    stats = token_stats(logits_TV, label_T)
    for row_T in (stats.logprob, stats.entropy, stats.logsumexp):
        assert row_T.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("above", [6.0, 12.0, 40.0, 300.0])
def test_a_logit_far_above_the_first_ones_costs_no_accuracy(above: float) -> None:
    logits_TV, label_T = problem(3, 5000, torch.float32)
    for token in (300, 2100, 4999):
        logits_TV[:, token] = above
        stats = token_stats(logits_TV, label_T)
        assert_stats(stats, reference.token_stats(logits_TV, label_T, 1.0), 2e-6)


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_a_masked_label_is_impossible_and_a_fully_masked_row_is_empty(fill: float) -> None:
    logits_TV = torch.tensor([[0.0, -math.inf, 1.0], [fill] * 3], requires_grad=True)
    stats = token_stats(logits_TV, torch.tensor([1, 1]), top_k=5)
    assert stats.confidence is not None
    assert stats.logprob.tolist() == [-math.inf, -math.inf]
    assert stats.entropy[1].item() == 0
    assert stats.logsumexp[1].item() == -math.inf
    assert stats.confidence.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad[1].tolist() == [0.0, 0.0, 0.0]
    assert logits_TV.grad.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_logit_spoils_its_row_alone(device: str, value: float) -> None:
    logits_TV, label_T = (tensor.to(device) for tensor in problem(4, 2500, torch.float32))
    clean = given(token_stats(logits_TV, label_T, **EVERYTHING))
    logits_TV[2, 2499] = value
    stats = given(token_stats(logits_TV.requires_grad_(), label_T, **EVERYTHING))
    weighted_sum(stats).backward()
    assert logits_TV.grad is not None
    others = [0, 1, 3]
    for name, row in stats.items():
        assert row[2].isnan(), name
        assert row[others].equal(clean[name][others]), name
    assert logits_TV.grad[2].isnan().all()
    assert logits_TV.grad[others].isfinite().all()


@pytest.mark.parametrize("label", [2500, -1, -99, 2**40, -(2**62)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_label_outside_the_vocabulary_spoils_its_row_alone(device: str, label: int) -> None:
    logits_TV, label_T = (tensor.to(device) for tensor in problem(4, 2500, torch.bfloat16))
    clean = given(token_stats(logits_TV, label_T, **EVERYTHING))
    label_T[1] = label
    stats = given(token_stats(logits_TV.requires_grad_(), label_T, **EVERYTHING))
    weighted_sum(stats).backward()
    assert logits_TV.grad is not None
    others = [0, 2, 3]
    for name, row in stats.items():
        assert row[1].isnan(), name
        assert row[others].equal(clean[name][others]), name
    assert logits_TV.grad[1].isnan().all()
    assert logits_TV.grad[others].isfinite().all()


def test_an_ignored_row_is_zero_even_where_its_logits_are_broken() -> None:
    logits_TV, label_T = problem(3, 20, torch.float32)
    logits_TV[1, 4] = math.nan
    label_T[1] = -100
    stats = given(token_stats(logits_TV.requires_grad_(), label_T, **EVERYTHING))
    assert [row[1].item() for row in stats.values()] == [0.0] * len(stats)
    weighted_sum(stats).backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad[1].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_give_empty_statistics_and_an_empty_gradient(dtype: torch.dtype) -> None:
    logits_TV = torch.zeros(0, 12, dtype=dtype, requires_grad=True)
    stats = token_stats(logits_TV, torch.zeros(0, dtype=torch.int64), **EVERYTHING)
    assert all(row.shape == (0,) for row in given(stats).values())
    stats.logprob.sum().backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad.shape == (0, 12)


def test_columns_past_the_vocabulary_are_never_counted() -> None:
    """Neighbours of a row of any length, as huge or as broken as they may be, change no bit."""
    for vocabulary in (1, 3, 15, 16, 17, 31, 33, 63, 65, 2047, 2049, 4097):
        logits_TV, label_T = problem(3, vocabulary, torch.float32)
        for value in (math.nan, 1e30, 0.0):
            storage_TV = torch.full((3, vocabulary + 40), value)
            view_TV = storage_TV[:, 8 : 8 + vocabulary]
            view_TV.copy_(logits_TV)
            clean = given(token_stats(logits_TV, label_T, **EVERYTHING))
            for name, row in given(token_stats(view_TV, label_T, **EVERYTHING)).items():
                assert row.equal(clean[name]), (vocabulary, name)


def test_rows_more_than_two_to_the_31_elements_apart_are_found() -> None:
    """Address space without memory behind it: only the pages of the two rows are touched."""
    stride, vocabulary = 2**31 + 64, 37
    space = mmap.mmap(-1, 2 * (stride + vocabulary), flags=mmap.MAP_PRIVATE)
    storage = torch.frombuffer(space, dtype=torch.bfloat16)
    far_TV = storage.as_strided((2, vocabulary), (stride, 1))
    logits_TV, label_T = problem(2, vocabulary, torch.bfloat16)
    far_TV.copy_(logits_TV)
    near, far = token_stats(logits_TV, label_T), token_stats(far_TV.requires_grad_(), label_T)
    assert far.entropy.equal(near.entropy)
    near_TV, _ = gradients(logits_TV, label_T, 1.0)
    weighted_sum(given(token_stats(far_TV, label_T, inplace=True))).backward()
    assert far_TV.equal(near_TV)
    del far_TV.grad, far_TV, storage, far


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_labels_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    """1 - p of a label near certainty: computed in the row's own precision it would be 0 or wrong
    by a large part."""
    logits_TV = torch.full((4, 64), -2.0).to(dtype)
    logits_TV[:, 5] = torch.tensor([8.0, 9.5, 11.0, 12.0])
    label_T = torch.full((4,), 5)
    ours_TV, expected_TV = gradients(logits_TV, label_T, 1.0)
    half_ulp = torch.finfo(dtype).eps / 2
    slack = 1e-6 if dtype == torch.bfloat16 else 3e-8  # float16 has denormals there
    torch.testing.assert_close(
        ours_TV[:, 5].double(), expected_TV[:, 5], rtol=half_ulp * 1.01, atol=slack
    )
    assert ours_TV[:, 5].ne(0).all()


def test_bad_arguments_say_what_was_expected_and_what_came() -> None:
    logits_TV, label_T = problem(3, 10, torch.float32)
    with pytest.raises(ValueError, match=r"logits_TV: expected shape \[T, V >= 1\], got \(3, 0\)"):
        token_stats(logits_TV[:, :0], label_T)
    with pytest.raises(ValueError, match=r"logits_TV: expected shape .* got \(10,\)"):
        token_stats(logits_TV[0], label_T)
    with pytest.raises(ValueError, match=r"logits_TV: expected one of .* got torch.int64"):
        token_stats(logits_TV.long(), label_T)
    with pytest.raises(ValueError, match=r"logits_TV: expected a CPU or CUDA tensor, got meta"):
        token_stats(logits_TV.to("meta"), label_T)
    with pytest.raises(ValueError, match=r"label_T: expected int64\[3\] .* got torch.int64\[2\]"):
        token_stats(logits_TV, label_T[:2])
    with pytest.raises(ValueError, match=r"label_T: expected int64\[3\] .* got torch.int32\[3\]"):
        token_stats(logits_TV, label_T.int())
    with pytest.raises(ValueError, match=r"label_T: expected a tensor on cpu, got meta"):
        token_stats(logits_TV, label_T.to("meta"))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got"):
            token_stats(logits_TV, label_T, temperature)
