"""Draws without some tokens are draws from the rest; statistics are those with them."""

from __future__ import annotations

import math
from typing import Any

import kernel_reference as reference
import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from test_sample_tokens import SAMPLINGS, assert_same, keys, logits
from torch import Tensor

from pyrl.logits.sample_tokens import SampledTokens, sample_tokens, sample_tokens_composed
from pyrl.logits.sampling import Exclude, Sampling

SEVERAL = [sampling for sampling in SAMPLINGS if sampling.top_k != 1]
"""Samplings that keep more than one token."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def some(logits_BV: Tensor, seed: int = 0) -> Exclude:
    """Of each row up to three of its most probable tokens, and others anywhere; of a few none."""
    rng = np.random.default_rng(seed)
    rows, vocabulary = logits_BV.shape
    likely_BV = logits_BV.argsort(dim=1, descending=True).numpy()
    taken = []
    for b in range(rows):
        top = likely_BV[b, rng.permutation(min(4, vocabulary - 1))][: rng.integers(4)]
        last = likely_BV[b, rng.integers(vocabulary // 2, vocabulary, b % 3)]
        taken.append(np.concatenate([top, last])[: vocabulary - 1].astype(np.int32))
    exclude = Exclude.of_rows(taken)
    assert exclude is not None
    return exclude


def of_row(exclude: Exclude, b: int) -> NDArray[np.int32]:
    return exclude.token_E[exclude.offset_B1[b] : exclude.offset_B1[b + 1]]


def rest(logits_V: Tensor, sampling: Sampling, taken: NDArray[np.int32]) -> NDArray[np.float64]:
    """Probabilities in the truncated distribution of the tokens that are not taken."""
    probability_V = reference.probabilities(logits_V.double().numpy(), sampling)
    probability_V[taken] = 0
    return probability_V


@pytest.mark.parametrize("sampling", SEVERAL, ids=str)
@pytest.mark.parametrize("vocabulary", [9, 31, 5000])
def test_a_draw_inverts_the_distribution_function_of_the_rest(
    vocabulary: int, sampling: Sampling
) -> None:
    logits_BV, (seed_B, position_B) = logits(12, vocabulary), keys(12)
    exclude = some(logits_BV)
    # Of a few kept tokens none may be left, which has a test of its own.
    drawable = [
        b
        for b in range(12)
        if sampling.temperature == 0 or rest(logits_BV[b], sampling, of_row(exclude, b)).any()
    ]
    taken = [of_row(exclude, b) for b in drawable]
    sampled = sample_tokens(
        logits_BV[drawable],
        seed_B[drawable],
        position_B[drawable],
        sampling,
        Exclude.of_rows(taken),
    )
    for i, b in enumerate(drawable):
        if sampling.temperature == 0:
            left_V = logits_BV[b].clone()
            left_V[taken[i].tolist()] = -math.inf
            assert sampled.token_B[i] == left_V.argmax()
            continue
        rest_V = rest(logits_BV[b], sampling, taken[i])
        number = reference.uniform(int(seed_B[b]), int(position_B[b]))
        token = reference.draw(rest_V / math.fsum(rest_V), number)
        assert sampled.token_B[i] == token
        rest_V[token] = 0
        expected = math.log(math.fsum(rest_V)) if rest_V.any() else -math.inf
        assert sampled.rest_logprob_B[i] == pytest.approx(expected, rel=1e-6, abs=2e-6)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=7), Sampling(0.7, top_p=0.9), Sampling(min_p=0.05)]
)
def test_frequencies_follow_what_the_excluded_tokens_leave(sampling: Sampling) -> None:
    draws = 20_000
    logits_V = logits(1, 31, scale=1.5, seed=5)[0]
    taken = logits_V.argsort(descending=True)[[0, 2, 20]].numpy().astype(np.int32)
    seed_B, position_B = np.full(draws, 7, np.uint64), np.arange(draws, dtype=np.int64)
    exclude = Exclude(np.tile(taken, draws), np.arange(0, 3 * draws + 1, 3))
    sampled = sample_tokens(logits_V.expand(draws, 31), seed_B, position_B, sampling, exclude)
    rest_V = rest(logits_V, sampling, taken)
    count_V = np.bincount(sampled.token_B, minlength=31)
    assert count_V[rest_V == 0].sum() == 0
    expected_V = draws * rest_V / rest_V.sum()
    possible_V = expected_V > 0
    assert scipy.stats.chisquare(count_V[possible_V], expected_V[possible_V]).pvalue > 1e-3


@pytest.mark.parametrize("sampling", SEVERAL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_composition_excludes_the_same_tokens(dtype: torch.dtype, sampling: Sampling) -> None:
    logits_BV = logits(12, 3001, scale=2.0).to(dtype)
    logits_BV[:, ::3] = -math.inf
    seed_B, position_B = keys(12)
    exclude = some(logits_BV)
    kernel = sample_tokens(logits_BV, seed_B, position_B, sampling, exclude)
    composed = sample_tokens_composed(logits_BV, seed_B, position_B, sampling, exclude)
    assert_same(kernel, composed, 2e-6)


@pytest.mark.parametrize("sampling", SEVERAL, ids=str)
def test_statistics_are_those_of_the_distribution_with_the_excluded_tokens(
    sampling: Sampling,
) -> None:
    logits_BV, (seed_B, position_B) = logits(12, 5000, scale=1.0), keys(12)
    sampled = sample_tokens(logits_BV, seed_B, position_B, sampling, some(logits_BV))
    token_B = torch.from_numpy(sampled.token_B).long()
    expected = reference.token_stats(logits_BV, token_B, sampling.temperature or 1.0)
    np.testing.assert_allclose(sampled.logprob_B, expected[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(sampled.entropy_B, expected[1], rtol=0, atol=2e-6)
    np.testing.assert_allclose(sampled.confidence_B, expected[3], rtol=0, atol=2e-6)
    if sampling.temperature == 0:
        assert set(sampled.truncated_logprob_B) == {0.0}
        assert set(sampled.rest_logprob_B) == {-math.inf}
        return
    for b, token in enumerate(sampled.token_B):
        probability_V = reference.probabilities(logits_BV[b].double().numpy(), sampling)
        assert abs(sampled.truncated_logprob_B[b] - math.log(probability_V[token])) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("below", [5.0, 20.723, 60.0])  # 20.723: p = 1 - 1e-9
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(min_p=1e-30), Sampling(top_k=40), Sampling(top_k=4)], ids=str
)
def test_the_rest_of_a_token_with_nearly_all_mass_is_summed(
    sampling: Sampling, below: float, dtype: torch.dtype
) -> None:
    """Also where that token is excluded, and another one with nearly all of the rest is drawn."""
    logits_V = (logits(1, 2100, scale=0.5)[0] - below - 8).clamp(max=-below)
    logits_V[2060], logits_V[[7, 2061]] = 0.0, -below
    logits_V[400] = -2 * below - 8
    logits_V = logits_V.to(dtype)
    for taken in ([], [2060], [2060, 7, 2061]):
        tokens = np.array(taken, np.int32)
        seed_B, position_B = keys(3)
        exclude = Exclude.of_rows([tokens] * 3)
        sampled = sample_tokens(logits_V.expand(3, -1), seed_B, position_B, sampling, exclude)
        for token, rest_logprob in zip(sampled.token_B, sampled.rest_logprob_B, strict=True):
            rest_V = rest(logits_V, sampling, np.append(tokens, token))
            mass = math.fsum(rest_V)
            expected = math.log(mass) if mass else -math.inf
            assert rest_logprob == pytest.approx(expected, rel=1e-6, abs=2e-6)
            assert taken or token == 2060


def test_rows_without_excluded_tokens_do_not_see_those_of_others() -> None:
    logits_BV, (seed_B, position_B) = logits(9, 4100), keys(9)
    exclude = some(logits_BV)
    alone = np.flatnonzero(np.diff(exclude.offset_B1) == 0)
    assert 0 < alone.size < 9
    for sampling in (Sampling(), Sampling(top_p=0.9)):
        mixed = sample_tokens(logits_BV, seed_B, position_B, sampling, exclude)
        plain = sample_tokens(logits_BV, seed_B, position_B, sampling)
        columns = [(vars(mixed)[name], column) for name, column in vars(plain).items()]
        assert_same(*(SampledTokens(*(pair[i][alone] for pair in columns)) for i in (0, 1)))
        for part in ([4], [8, 0, 3]):
            taken = Exclude.of_rows([of_row(exclude, b) for b in part])
            few = sample_tokens(logits_BV[part], seed_B[part], position_B[part], sampling, taken)
            assert_same(few, SampledTokens(*(column[part] for column in vars(mixed).values())))


def test_the_order_of_excluded_tokens_and_their_number_are_nothing_to_a_draw() -> None:
    logits_BV, (seed_B, position_B) = logits(3, 4100), keys(3)
    draws = [
        sample_tokens(logits_BV, seed_B, position_B, Sampling(top_p=0.95), Exclude.of_rows(lists))
        for lists in (
            [np.array(tokens, np.int32)] * 3
            for tokens in ([9, 4000, 2], [2, 9, 4000], [4000, 2, 9, 2, 2, 9])
        )
    ]
    assert_same(draws[1], draws[0])
    assert_same(draws[2], draws[0])


def test_greedy_takes_the_next_token_and_of_equal_ones_the_lowest_id() -> None:
    logits_BV, (seed_B, position_B) = torch.zeros(1, 5000), keys(1)
    logits_BV[0, [3, 2048, 4999]] = 1.0
    order = []
    for _ in range(5):
        exclude = Exclude.of_rows([np.array(order, np.int32)])
        sampled = sample_tokens(logits_BV, seed_B, position_B, Sampling(0), exclude)
        order.append(sampled.token_B[0])
    assert order == [3, 2048, 4999, 0, 1]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0), Sampling(top_k=2), Sampling(top_p=0.1), Sampling(0.6)]
)
def test_rows_of_which_all_is_excluded_are_named(sampling: Sampling) -> None:
    logits_BV, (seed_B, position_B) = torch.full((3, 3000), -math.inf), keys(3)
    logits_BV[:, 2998], logits_BV[:, 5] = 1.0, 1.0
    taken = [np.array(tokens, np.int32) for tokens in ([17], [5, 2998], [])]
    with pytest.raises(
        FloatingPointError, match=r"a finite entry that is not excluded, got 1 of 3 .*: \[1\]"
    ):
        sample_tokens(logits_BV, seed_B, position_B, sampling, Exclude.of_rows(taken))
    composed = sample_tokens_composed(
        logits_BV, seed_B, position_B, sampling, Exclude.of_rows(taken)
    )
    assert (composed.token_B < 0).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_excluded_token_that_is_no_number_breaks_its_row(value: float) -> None:
    logits_BV, (seed_B, position_B) = logits(2, 3000), keys(2)
    logits_BV[1, 2999] = value
    exclude = Exclude.of_rows([np.array([2999], np.int32)] * 2)
    with pytest.raises(FloatingPointError, match=r"got 1 of 2 rows that are not: \[1\]"):
        sample_tokens(logits_BV, seed_B, position_B, Sampling(), exclude)


def test_nobody_excludes_anything() -> None:
    assert Exclude.of_rows([]) is None
    assert Exclude.of_rows([np.empty(0, np.int32)] * 3) is None


def test_bad_lists_say_what_was_expected_and_what_came() -> None:
    logits_BV, (seed_B, position_B) = logits(2, 10), keys(2)
    tokens, ends = np.array([4, 2], np.int32), np.array([0, 1, 2])
    for token_E, offset_B1, message in (
        (
            tokens.astype(np.int64),
            ends,
            r"exclude.token_E: expected int32 .*, got int64",
        ),
        (tokens[None], ends, r"exclude.token_E: expected int32 with one axis, got int32\[1, 2\]"),
        (tokens, ends.astype(np.int32), r"exclude.offset_B1: expected int64 .* got int32\[3\]"),
        (tokens, ends[:2], r"exclude.offset_B1: expected 3 numbers that rise from 0 to 2"),
        (tokens, np.array([0, 1, 1]), r"rise from 0 to 2, got \[0 1 1\]"),
        (tokens, np.array([0, 3, 2]), r"rise from 0 to 2, got \[0 3 2\]"),
        (tokens + 8, ends, r"exclude.token_E: expected ids in 0..9, got \[12 10\]"),
        (tokens - 3, ends, r"exclude.token_E: expected ids in 0..9, got \[ 1 -1\]"),
    ):
        exclude: Any = Exclude(token_E, offset_B1)
        with pytest.raises(ValueError, match=message):
            sample_tokens(logits_BV, seed_B, position_B, Sampling(), exclude)
    listed: Any = [[4], [2]]
    with pytest.raises(TypeError, match="exclude: expected an Exclude or None, got list"):
        sample_tokens(logits_BV, seed_B, position_B, Sampling(), listed)
    with pytest.raises(TypeError, match=r"exclude.token_E: expected a numpy array, got list"):
        sample_tokens(logits_BV, seed_B, position_B, Sampling(), Exclude(listed, ends))
