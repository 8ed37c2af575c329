"""Truncation by bisection keeps exactly the tokens that a sort would."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import kernel_reference as reference
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyrl.logits.sample_tokens import SampledTokens, sample_tokens
from pyrl.logits.sampling import Sampling

PART = 2048  # tokens that the kernel takes at a time
TRUNCATIONS = [
    Sampling(top_p=0.95),
    Sampling(top_p=0.3, temperature=0.7),
    Sampling(top_k=50),
    Sampling(top_k=3000, temperature=2.0),
    Sampling(min_p=0.02),
    Sampling(min_p=0.001, top_k=400, top_p=0.9),
    Sampling(top_h=0.4),
    Sampling(top_h=0.95, top_k=2000, temperature=2.0),
]


def normal(vocabulary: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def masked(vocabulary: int) -> Tensor:
    logits_V = normal(vocabulary, 3.0)
    logits_V[PART : 2 * PART] = -math.inf  # a whole part
    logits_V[::3] = -math.inf
    return logits_V


def scales(vocabulary: int) -> Tensor:
    """Differences from 1e-38 to 1: where halving the bracket takes many steps."""
    signs_V = torch.where(torch.arange(vocabulary) % 2 == 0, 1.0, -1.0)
    return signs_V * torch.logspace(-38, 0, vocabulary)


ROWS = {
    "flat": normal(3 * PART + 5, 1.0),
    "peaked": normal(3 * PART + 5, 6.0),
    "equal": torch.zeros(3 * PART + 5),
    "two values": torch.where(normal(5000, 1.0) > 0, 1.0, 0.0),
    "bfloat16": normal(5000, 1.5).bfloat16(),
    "float16": normal(5000, 1.5).half(),
    "float64": normal(5000, 1.5).double(),
    "masked": masked(3 * PART),
    "scales": scales(5000),
    "offset": normal(5000, 2.0) + 1e4,
    "descending": normal(5000, 2.0).sort(descending=True).values,
    "ascending": normal(5000, 2.0).sort().values,
    "one": torch.tensor([2.5]),
}


def draw(logits_V: Tensor, sampling: Sampling, draws: int) -> SampledTokens:
    seed_B, position_B = np.full(draws, 3, np.uint64), np.arange(draws, dtype=np.int64)
    return sample_tokens(logits_V.expand(draws, -1), seed_B, position_B, sampling)


@pytest.mark.parametrize("sampling", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_log_probs_are_those_of_the_sorted_and_truncated_distribution(
    name: str, sampling: Sampling
) -> None:
    sampled = draw(ROWS[name], sampling, 50)
    probability_V = reference.probabilities(ROWS[name].double().numpy(), sampling)
    np.testing.assert_allclose(
        sampled.truncated_logprob_B, np.log(probability_V[sampled.token_B]), rtol=0, atol=2e-6
    )
    whole = Sampling(temperature=sampling.temperature)
    probability_V = reference.probabilities(ROWS[name].double().numpy(), whole)
    np.testing.assert_allclose(
        sampled.logprob_B, np.log(probability_V[sampled.token_B]), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("sampling", [Sampling(), *TRUNCATIONS], ids=str)
@pytest.mark.parametrize("name", ["flat", "peaked", "masked", "bfloat16"])
def test_draws_of_many_tokens_follow_their_distribution(name: str, sampling: Sampling) -> None:
    draws, bins = 4000, 40
    sampled = draw(ROWS[name], sampling, draws)
    probability_V = reference.probabilities(ROWS[name].double().numpy(), sampling)
    # Neighbours in the vocabulary, of roughly equal probability together.
    cumulative_V = np.cumsum(probability_V)
    bin_V = np.minimum((cumulative_V - probability_V / 2) * bins, bins - 1).astype(int)
    expected = draws * np.bincount(bin_V, probability_V, bins)
    count = np.bincount(bin_V[sampled.token_B], minlength=bins)
    assert probability_V[sampled.token_B].min() > 0
    held = expected > 0
    if held.sum() > 1:
        assert scipy.stats.chisquare(count[held], expected[held]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=PART + 7), PART + 7),
        (Sampling(top_k=1), 1),
        (Sampling(top_p=0.25), PART),
        (Sampling(min_p=0.5), 4 * PART),
        (Sampling(top_k=PART, top_p=0.5), PART // 2),
        (Sampling(top_h=0.9), 3326),  # 8192 ** 0.9
        (Sampling(top_k=PART, top_h=0.9), PART),
    ],
    ids=str,
)
def test_of_equal_tokens_the_lowest_ids_stay_across_parts(sampling: Sampling, kept: int) -> None:
    sampled = draw(torch.zeros(4 * PART), sampling, 20_000 if kept < 10 else 2000)
    assert sampled.token_B.max() < kept
    np.testing.assert_allclose(sampled.truncated_logprob_B, -math.log(kept), rtol=0, atol=2e-6)
    if kept > 1:
        assert sampled.token_B.max() > 0.99 * kept


def test_top_k_and_top_p_count_what_the_truncations_before_them_left() -> None:
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # min-p 0.3 leaves .4, .3, .2, of which .4 and .3 first exceed 0.7 of the mass.
    assert set(draw(logits_V, Sampling(min_p=0.3, top_p=0.7), 500).token_B) == {0, 1}
    assert set(draw(logits_V, Sampling(min_p=0.3, top_p=0.78), 500).token_B) == {0, 1, 2}
    assert set(draw(logits_V, Sampling(top_k=2, top_p=0.56), 500).token_B) == {0}
    assert set(draw(logits_V, Sampling(top_k=2, top_p=0.58), 500).token_B) == {0, 1}


@pytest.mark.parametrize(("top_h", "kept"), [(0.01, 1), (0.4, 2), (0.6, 2), (0.8, 4)])
def test_top_h_keeps_what_has_at_most_its_share_of_the_entropy(top_h: float, kept: int) -> None:
    probability_V = torch.tensor([0.04, 0.15, 0.40, 0.08, 0.20, 0.10, 0.03])  # 2.364924 bits
    sampled = draw(probability_V.log(), Sampling(top_h=top_h), 1000)
    largest_K = probability_V.sort(descending=True).indices[:kept]
    assert set(sampled.token_B) == set(largest_K.tolist())
    mass = probability_V[largest_K].sum().item()
    expected_B = np.log(probability_V.numpy()[sampled.token_B] / mass)
    np.testing.assert_allclose(sampled.truncated_logprob_B, expected_B, rtol=0, atol=2e-6)
    np.testing.assert_allclose(sampled.entropy_B, 2.364924 * math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=math.nextafter(1, 0)), Sampling(top_k=10**9)], ids=str
)
@pytest.mark.parametrize("name", ["flat", "masked", "equal", "float64"])
def test_a_truncation_that_drops_nothing_changes_nothing(name: str, sampling: Sampling) -> None:
    truncated, whole = draw(ROWS[name], sampling, 100), draw(ROWS[name], Sampling(), 100)
    np.testing.assert_array_equal(truncated.token_B, whole.token_B)
    np.testing.assert_allclose(truncated.truncated_logprob_B, whole.logprob_B, rtol=0, atol=2e-6)


def test_top_k_above_the_number_of_unmasked_tokens_keeps_them_all() -> None:
    logits_V = torch.full((3 * PART,), -math.inf)
    logits_V[[5, PART + 1, 3 * PART - 1]] = 1.0
    sampled = draw(logits_V, Sampling(top_k=PART), 200)
    assert set(sampled.token_B) == {5, PART + 1, 3 * PART - 1}
    np.testing.assert_allclose(sampled.truncated_logprob_B, -math.log(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-25, 1e-6, 1e6, 1e25, 1e38])
@pytest.mark.parametrize("sampling", TRUNCATIONS, ids=str)
def test_extreme_temperatures_are_truncated_like_any_other(
    sampling: Sampling, temperature: float
) -> None:
    sampling = replace(sampling, temperature=temperature)
    sampled = draw(ROWS["flat"], sampling, 50)
    probability_V = reference.probabilities(ROWS["flat"].double().numpy(), sampling)
    expected_B = np.log(probability_V[sampled.token_B])
    np.testing.assert_allclose(sampled.truncated_logprob_B, expected_B, rtol=0, atol=2e-6)


def test_the_largest_logits_that_a_row_can_hold() -> None:
    largest = torch.finfo(torch.float32).max
    sampled = draw(torch.tensor([-largest, largest, 0.0, -math.inf]), Sampling(top_p=0.9), 10)
    assert set(sampled.token_B) == {1}
    assert set(sampled.truncated_logprob_B) == {0.0}
    assert set(sampled.entropy_B) == {0.0}


@pytest.mark.parametrize("sampling", [Sampling(), *TRUNCATIONS], ids=str)
def test_a_nan_among_masked_tokens_is_not_overlooked(sampling: Sampling) -> None:
    logits_BV = torch.full((2, 3 * PART), -math.inf)
    logits_BV[:, 7] = 1.0
    logits_BV[1, PART + 3] = math.nan
    with pytest.raises(FloatingPointError, match=r"1 of 2 rows that are not: \[1\]"):
        sample_tokens(logits_BV, np.zeros(2, np.uint64), np.arange(2), sampling)


@pytest.mark.parametrize("seed", range(5))
def test_a_share_of_the_largest_probability_is_compared_in_double(seed: int) -> None:
    for share in np.random.default_rng(seed).uniform(0.01, 0.9, 40):
        rounded = torch.tensor([0.0, math.log(share)])  # to float32, up or down
        kept = 1 + (math.exp(rounded[1].item()) >= share)
        mass = rounded.double().exp()[:kept].sum().log().item()
        sampled = draw(rounded, Sampling(min_p=share), 1)
        expected = rounded[sampled.token_B[0]].item() - mass
        assert abs(sampled.truncated_logprob_B[0] - expected) < 2e-6


def test_a_top_p_that_rounds_to_everything_keeps_what_top_k_left() -> None:
    for seed in range(40):
        logits_V = normal(32 * PART, 1.0, seed).clamp(min=0.0)  # half of them at 0
        top_k, both = (
            draw(logits_V, Sampling(top_k=20 * PART, top_p=top_p), 1)
            for top_p in (1.0, math.nextafter(1, 0))
        )
        assert both.truncated_logprob_B == pytest.approx(top_k.truncated_logprob_B, abs=1e-6)


BITS = """
import sys, numpy as np, torch
from pyrl.logits.sampling import Exclude, Sampling
from pyrl.logits.sample_tokens import sample_tokens
logits_BV = torch.randn(24, 5000, generator=torch.Generator().manual_seed(1)) * 2
logits_BV[:, ::7] = -torch.inf
likely_BE = logits_BV.argsort(dim=1, descending=True)[:, [0, 2, 2000]].int().numpy()
exclude = Exclude(likely_BE.ravel(), np.arange(0, 73, 3))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for sampling in (
        Sampling(), Sampling(0), Sampling(0.7, top_p=0.9), Sampling(top_k=40), Sampling(min_p=0.03),
        Sampling(top_h=0.6)
    ):
        keys = np.arange(24, dtype=np.uint64), np.arange(24)
        for taken in (None, exclude):
            drawn = sample_tokens(logits_BV.to(dtype), *keys, sampling, taken)
            for column in vars(drawn).values():
                sys.stdout.buffer.write(column.tobytes())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    drawn = {}
    for isa in ("scalar", "avx2", "avx512"):
        command = [sys.executable, "-P", "-c", BITS]
        environment = {**os.environ, "PYRL_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        if done.returncode == 0:
            drawn[isa] = done.stdout
        else:  # a machine without it
            assert b"PYRL_ISA" in done.stderr
    assert len(drawn["scalar"]) == 2 * 24 * 18 * 6 * 4
    assert set(drawn.values()) == {drawn["scalar"]}
