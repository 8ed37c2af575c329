"""Draws are exact samples, replayable from (seed, position), and independent of the batch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import kernel_reference as reference
import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl import _core
from pyrl.logits.sample_tokens import SampledTokens, sample_tokens, sample_tokens_composed
from pyrl.logits.sampling import Sampling

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=0),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=1000),
    Sampling(temperature=0.7, top_p=0.8),
    Sampling(temperature=3.0, top_p=0.999),
    Sampling(min_p=0.05),
    Sampling(temperature=1.3, min_p=0.02, top_k=9, top_p=0.7),
    Sampling(temperature=1.3, top_h=0.7),
]


def logits(rows: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * scale


def keys(rows: int, seed: int = 11) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    seed_B = generator.integers(0, 2**64, rows, dtype=np.uint64)
    return seed_B, generator.integers(0, 2**40, rows, dtype=np.int64)


def assert_same(a: SampledTokens, b: SampledTokens, tolerance: float = 0.0) -> None:
    np.testing.assert_array_equal(a.token_B, b.token_B)
    for name in ("logprob_B", "truncated_logprob_B", "entropy_B", "confidence_B", "rest_logprob_B"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_reference_generator_gives_the_published_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert reference.philox(counter, key) == expected


def test_uniform_numbers_are_the_reference_generators() -> None:
    seed_B, position_B = keys(200)
    seed_B[:2], position_B[:3] = [0, 2**64 - 1], [0, 2**63 - 1, 1]
    expected = [reference.uniform(int(s), int(p)) for s, p in zip(seed_B, position_B, strict=True)]
    np.testing.assert_array_equal(_core.logits.uniforms(seed_B, position_B), expected)


def test_uniform_numbers_of_successive_positions_and_seeds_are_uniform_and_uncorrelated() -> None:
    position_B = np.tile(np.arange(200, dtype=np.int64), 200)
    seed_B = np.repeat(np.arange(200, dtype=np.uint64), 200)
    uniform_BB = _core.logits.uniforms(seed_B, position_B).reshape(200, 200)
    assert uniform_BB.min() >= 0
    assert uniform_BB.max() < 1
    assert scipy.stats.kstest(uniform_BB.ravel(), "uniform").pvalue > 1e-3
    for shifted in (uniform_BB[1:], uniform_BB[:, 1:]):
        base = uniform_BB[: shifted.shape[0], : shifted.shape[1]]
        correlation = np.corrcoef(base.ravel(), shifted.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(base.size)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 31, 5000])
def test_a_draw_inverts_the_distribution_function(vocabulary: int, sampling: Sampling) -> None:
    logits_BV = logits(40, vocabulary)
    seed_B, position_B = keys(40)
    sampled = sample_tokens(logits_BV, seed_B, position_B, sampling)
    for b in range(40):
        probability_V = reference.probabilities(logits_BV[b].double().numpy(), sampling)
        number = reference.uniform(int(seed_B[b]), int(position_B[b]))
        assert sampled.token_B[b] == reference.draw(probability_V, number)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draw_frequencies_follow_the_truncated_distribution(sampling: Sampling) -> None:
    draws = 20_000
    logits_V = logits(1, 31, scale=1.5, seed=5)[0]
    logits_V[[0, 3, 30]] = -math.inf
    seed_B, position_B = np.full(draws, 7, np.uint64), np.arange(draws, dtype=np.int64)
    sampled = sample_tokens(logits_V.expand(draws, 31), seed_B, position_B, sampling)
    count_V = np.bincount(sampled.token_B, minlength=31)
    expected_V = draws * reference.probabilities(logits_V.double().numpy(), sampling)
    possible_V = expected_V > 0
    assert count_V[~possible_V].sum() == 0
    if possible_V.sum() > 1:
        assert scipy.stats.chisquare(count_V[possible_V], expected_V[possible_V]).pvalue > 1e-3


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_torch_composition_draws_the_same_tokens(
    dtype: torch.dtype, sampling: Sampling
) -> None:
    logits_BV = logits(50, 3001, scale=2.0).to(dtype)
    logits_BV[:, ::3] = -math.inf
    seed_B, position_B = keys(50)
    kernel = sample_tokens(logits_BV, seed_B, position_B, sampling)
    composed = sample_tokens_composed(logits_BV, seed_B, position_B, sampling)
    assert_same(kernel, composed, 2e-6)


def test_the_torch_composition_does_not_depend_on_its_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits_BV, (seed_B, position_B) = logits(7, 100), keys(7)
    whole = sample_tokens_composed(logits_BV, seed_B, position_B, Sampling())
    # `pyrl.sample_tokens` is the function that the package exports, not its module.
    monkeypatch.setattr(sys.modules["pyrl.logits.sample_tokens"], "_CHUNK_ELEMENTS", 200)
    assert_same(sample_tokens_composed(logits_BV, seed_B, position_B, Sampling()), whole)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_draw_never_depends_on_the_other_rows(sampling: Sampling) -> None:
    logits_BV, (seed_B, position_B) = logits(24, 4100), keys(24)
    whole = sample_tokens(logits_BV, seed_B, position_B, sampling)
    for rows in ([5], [23, 0, 5, 11], list(range(23, -1, -1))):
        part = sample_tokens(logits_BV[rows], seed_B[rows], position_B[rows], sampling)
        expected = SampledTokens(
            whole.token_B[rows],
            whole.logprob_B[rows],
            whole.truncated_logprob_B[rows],
            whole.entropy_B[rows],
            whole.confidence_B[rows],
            whole.rest_logprob_B[rows],
        )
        assert_same(part, expected)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restored_threads")
def test_a_draw_never_depends_on_the_number_of_threads() -> None:
    logits_BV, (seed_B, position_B) = logits(37, 49152), keys(37)
    torch.set_num_threads(1)
    alone = sample_tokens(logits_BV, seed_B, position_B, Sampling(top_p=0.9))
    torch.set_num_threads(3)
    assert_same(sample_tokens(logits_BV, seed_B, position_B, Sampling(top_p=0.9)), alone)


def test_rows_may_be_strided_and_columns_apart() -> None:
    wide_BV, (seed_B, position_B) = logits(6, 200), keys(6)
    for view_BV in (wide_BV[:, 3:103], wide_BV[:, ::2], wide_BV.T.contiguous().T):
        strided = sample_tokens(view_BV, seed_B, position_B, Sampling(top_p=0.9))
        dense = sample_tokens(view_BV.contiguous(), seed_B, position_B, Sampling(top_p=0.9))
        assert_same(strided, dense)
    every_second = sample_tokens(wide_BV[::2], seed_B[::2], position_B[::2], Sampling())
    assert_same(
        every_second, sample_tokens(wide_BV[::2].clone(), seed_B[::2], position_B[::2], Sampling())
    )


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_are_of_the_untruncated_distribution_at_the_temperature(
    offset: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.rand(8, 49152, generator=generator) * 100 - 50 + offset
    seed_B, position_B = keys(8)
    sampling = Sampling(temperature=temperature, top_k=3)
    sampled = sample_tokens(logits_BV, seed_B, position_B, sampling)
    token_B = torch.from_numpy(sampled.token_B).long()
    expected = reference.token_stats(logits_BV, token_B, temperature or 1.0)
    np.testing.assert_allclose(sampled.logprob_B, expected[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(sampled.entropy_B, expected[1], rtol=0, atol=2e-6)
    np.testing.assert_allclose(sampled.confidence_B, expected[3], rtol=0, atol=2e-6)


def test_greedy_and_top_k_prefer_the_lowest_id_among_equals() -> None:
    logits_BV = torch.zeros(300, 6)
    logits_BV[:, 2:5] = 1.0
    seed_B, position_B = keys(300)
    greedy = sample_tokens(logits_BV, seed_B, position_B, Sampling(temperature=0))
    assert set(greedy.token_B) == {2}
    top_two = sample_tokens(logits_BV, seed_B, position_B, Sampling(top_k=2))
    assert set(top_two.token_B) == {2, 3}
    top_four = sample_tokens(logits_BV, seed_B, position_B, Sampling(top_k=4))
    assert set(top_four.token_B) == {0, 2, 3, 4}


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 500), (0.25, 250), (0.2501, 251), (0.001, 1)])
def test_a_nucleus_is_the_smallest_set_with_the_mass(top_p: float, kept: int) -> None:
    draws = 20_000
    seed_B, position_B = np.zeros(draws, np.uint64), np.arange(draws, dtype=np.int64)
    logits_BV = torch.zeros(1000).expand(draws, 1000)
    sampled = sample_tokens(logits_BV, seed_B, position_B, Sampling(top_p=top_p))
    assert set(sampled.token_B) == set(range(kept))


def test_a_single_unmasked_token_is_certain() -> None:
    logits_BV = torch.full((3, 50), -math.inf)
    logits_BV[:, 17] = 2.5
    sampled = sample_tokens(logits_BV, *keys(3), Sampling(top_p=0.5))
    assert sampled.token_B.tolist() == [17] * 3
    assert sampled.logprob_B.tolist() == [0.0] * 3
    assert sampled.entropy_B.tolist() == [0.0] * 3
    assert sampled.confidence_B.tolist() == [1.0] * 3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_p=0.9)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_cannot_be_drawn_are_named(value: float, sampling: Sampling) -> None:
    logits_BV = logits(5, 3000)
    logits_BV[1, 2999] = value
    logits_BV[3] = -math.inf
    seed_B, position_B = keys(5)
    with pytest.raises(FloatingPointError, match=r"2 of 5 rows that are not: \[1, 3\]"):
        sample_tokens(logits_BV, seed_B, position_B, sampling)
    composed = sample_tokens_composed(logits_BV, seed_B, position_B, sampling)
    assert (composed.token_B < 0).tolist() == [False, True, False, True, False]


def test_an_empty_batch_has_no_tokens() -> None:
    sampled = sample_tokens(torch.zeros(0, 9), *keys(0), Sampling(top_k=2))
    assert sampled.token_B.shape == (0,)
    assert sampled.token_B.dtype == np.int32
    assert sampled.logprob_B.dtype == np.float32


def test_logits_that_require_a_gradient_are_sampled() -> None:
    logits_BV, (seed_B, position_B) = logits(4, 10), keys(4)
    plain = sample_tokens(logits_BV, seed_B, position_B, Sampling())
    assert_same(sample_tokens(logits_BV.requires_grad_(), seed_B, position_B, Sampling()), plain)


def test_bad_arguments_say_what_was_expected_and_what_came() -> None:
    logits_BV, (seed_B, position_B) = logits(3, 10), keys(3)
    with pytest.raises(ValueError, match=r"logits_BV: expected shape \[B, V >= 1\], got \(10,\)"):
        sample_tokens(logits_BV[0], seed_B, position_B, Sampling())
    with pytest.raises(ValueError, match=r"got \(3, 0\)"):
        sample_tokens(logits_BV[:, :0], seed_B, position_B, Sampling())
    with pytest.raises(ValueError, match=r"logits_BV: expected one of .*got torch.int64"):
        sample_tokens(logits_BV.long(), seed_B, position_B, Sampling())
    with pytest.raises(ValueError, match=r"logits_BV: expected a CPU or CUDA tensor, got meta"):
        sample_tokens(logits_BV.to("meta"), seed_B, position_B, Sampling())
    signed_B: Any = seed_B.astype(np.int64)
    with pytest.raises(ValueError, match=r"seed_B: expected uint64\[3\], got int64\[3\]"):
        sample_tokens(logits_BV, signed_B, position_B, Sampling())
    with pytest.raises(ValueError, match=r"position_B: expected int64\[3\], got int64\[2\]"):
        sample_tokens(logits_BV, seed_B, position_B[:2], Sampling())
    with pytest.raises(ValueError, match=r"position_B: expected >= 0, got -4 in row 2"):
        sample_tokens(logits_BV, seed_B, np.array([0, 1, -4]), Sampling())
    for top_k in (-1, 2.5):
        with pytest.raises(ValueError, match=f"top_k: expected a whole number >= 0 .* got {top_k}"):
            Sampling(top_k=top_k)  # type: ignore[arg-type]
