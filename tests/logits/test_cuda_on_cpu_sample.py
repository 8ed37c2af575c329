"""Draws of the CUDA kernel on the CPU, from the same uniform numbers as the CPU's; see
test_cuda_on_cpu."""

from __future__ import annotations

import math

import cuda_on_cpu
import numpy as np
import pytest
import torch
from test_sample_tokens import (
    SAMPLINGS,
    assert_same,
    keys,
    logits,
    test_a_single_unmasked_token_is_certain,  # noqa: F401
    test_an_empty_batch_has_no_tokens,  # noqa: F401
    test_rows_may_be_strided_and_columns_apart,  # noqa: F401
    test_rows_that_cannot_be_drawn_are_named,  # noqa: F401
)
from test_sample_tokens_exclude import (
    some,
    test_an_excluded_token_that_is_no_number_breaks_its_row,  # noqa: F401
    test_greedy_takes_the_next_token_and_of_equal_ones_the_lowest_id,  # noqa: F401
    test_rows_of_which_all_is_excluded_are_named,  # noqa: F401
)

from pyrl.logits.sample_tokens import sample_tokens, sample_tokens_composed
from pyrl.logits.sampling import Sampling

kernels = pytest.fixture(scope="module", autouse=True)(cuda_on_cpu.in_place_of_the_core)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_draws_are_those_of_the_composition(dtype: torch.dtype, sampling: Sampling) -> None:
    logits_BV = logits(4, 3001, scale=2.0).to(dtype)
    logits_BV[:, ::3] = -math.inf
    seed_B, position_B = keys(4)
    kernel = sample_tokens(logits_BV, seed_B, position_B, sampling)
    composed = sample_tokens_composed(logits_BV, seed_B, position_B, sampling)
    assert_same(kernel, composed, 2e-6)


@pytest.mark.parametrize("sampling", SAMPLINGS[:3] + SAMPLINGS[6:8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_are_excluded(dtype: torch.dtype, sampling: Sampling) -> None:
    """In the first row the rest of a token that has nearly all mass is drawn from and summed."""
    logits_BV, (seed_B, position_B) = logits(4, 3001, scale=2.0).to(dtype), keys(4)
    logits_BV[0] = (logits_BV[0] - 30).clamp(max=-20)
    logits_BV[0, [1500, 1501]] = torch.tensor([0.0, -18.0]).to(dtype)
    for exclude in (None, some(logits_BV, seed=3)):
        kernel = sample_tokens(logits_BV, seed_B, position_B, sampling, exclude)
        composed = sample_tokens_composed(logits_BV, seed_B, position_B, sampling, exclude)
        assert_same(kernel, composed, 3e-6)


def test_a_row_of_several_parts_is_drawn_in_vocabulary_order() -> None:
    logits_BV, (seed_B, position_B) = logits(3, (1 << 15) + 77, scale=0.1), keys(3)
    for sampling in (Sampling(), Sampling(top_p=0.7)):
        kernel = sample_tokens(logits_BV, seed_B, position_B, sampling)
        composed = sample_tokens_composed(logits_BV, seed_B, position_B, sampling)
        assert_same(kernel, composed, 2e-6)


def test_a_nucleus_of_equal_tokens_is_cut_at_an_id() -> None:
    seed_B, position_B = keys(40)
    sampled = sample_tokens(torch.zeros(40, 30), seed_B, position_B, Sampling(top_p=0.5))
    assert sampled.token_B.max() < 15
    assert len(set(sampled.token_B.tolist())) > 5
    np.testing.assert_allclose(sampled.truncated_logprob_B, -math.log(15), rtol=1e-6)


def test_the_lowest_ids_among_equals_are_kept() -> None:
    logits_BV, (seed_B, position_B) = torch.zeros(40, 6), keys(40)
    logits_BV[:, 2:5] = 1.0
    for sampling, kept in (
        (Sampling(temperature=0), {2}),
        (Sampling(top_k=2), {2, 3}),
        (Sampling(top_k=4), {0, 2, 3, 4}),
    ):
        assert set(sample_tokens(logits_BV, seed_B, position_B, sampling).token_B) == kept


@pytest.mark.parametrize("seed", [1, 2])
def test_no_draw_depends_on_the_order_of_threads(seed: int) -> None:
    logits_BV, (seed_B, position_B) = logits(3, 700).bfloat16(), keys(3)
    sampling = Sampling(top_k=50, top_p=0.9)
    in_order = sample_tokens(logits_BV, seed_B, position_B, sampling)
    cuda_on_cpu.load().order_threads(seed)
    try:
        assert_same(sample_tokens(logits_BV, seed_B, position_B, sampling), in_order)
    finally:
        cuda_on_cpu.load().order_threads(0)
