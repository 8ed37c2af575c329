"""Every statistic on request, with soft cap, nucleus and temperatures, against float64."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import token_stats_reference as reference
import torch
from token_stats_reference import EVERYTHING, given, weighted_sum
from torch import Tensor

from pyrl.logits.token_stats import STATS, TokenStats, token_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VOCABULARIES = [1, 2, 7, 33, 2049, 5003]
# One distribution and what belongs to it.
GOLDEN_LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -4.0]


def problem(
    tokens: int, vocabulary: int, dtype: torch.dtype, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits_TV = (torch.randn(tokens, vocabulary, generator=generator) * scale).to(dtype)
    return logits_TV, torch.randint(vocabulary, (tokens,), generator=generator)


def golden(**options: object) -> tuple[TokenStats, Tensor]:
    logits_TV = torch.tensor([GOLDEN_LOGITS], requires_grad=True)
    return token_stats(logits_TV, torch.tensor([1]), **options), logits_TV


@pytest.mark.parametrize("crossing", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_everything_on_request_is_the_references(
    vocabulary: int, dtype: torch.dtype, softcap: float | None, crossing: bool
) -> None:
    logits_TV, label_T = problem(6, vocabulary, dtype)
    label_T[2] = -100
    options = {"softcap": softcap, "nucleus_keeps_crossing": crossing}
    stats = token_stats(logits_TV, label_T, 0.8, **EVERYTHING, **options)
    assert list(given(stats)) == list(STATS)
    expected = reference.token_stats(logits_TV, label_T, 0.8, **options)
    reference.assert_stats(stats, expected, 2e-6)


@pytest.mark.parametrize("crossing", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_gradients_of_everything_are_the_references(
    vocabulary: int, dtype: torch.dtype, softcap: float | None, crossing: bool
) -> None:
    logits_TV, label_T = problem(6, vocabulary, dtype)
    label_T[2] = -100
    options = {"softcap": softcap, "nucleus_keeps_crossing": crossing}
    ours_TV = logits_TV.clone().requires_grad_()
    weighted_sum(given(token_stats(ours_TV, label_T, 0.8, **EVERYTHING, **options))).backward()
    wide_TV = logits_TV.double().requires_grad_()
    weighted_sum(reference.token_stats(wide_TV, label_T, 0.8, **options)).backward()
    assert ours_TV.grad is not None
    assert wide_TV.grad is not None
    half = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 2e-5)
    torch.testing.assert_close(ours_TV.grad.double(), wide_TV.grad, rtol=half, atol=2e-6)


@pytest.mark.parametrize("name", STATS)
def test_what_is_not_asked_for_is_absent_and_what_is_has_the_same_bits(name: str) -> None:
    logits_TV, label_T = problem(5, 3001, torch.float32)
    alone = {
        "self_certainty": {"self_certainty": True},
        "confidence": {"top_k": 5},
        "max_probability": {"max_probability": True},
        "kept_mass": {"kept_share": 0.02},
        "second_logprob": {"second_temperature": 1.3},
    }
    options = alone.get(name, {"nucleus": 0.8} if name.startswith("nucleus") else {})
    if name.startswith("sum_p2"):
        options = {"squares": True}
    some = given(token_stats(logits_TV, label_T, **options))
    everything = given(token_stats(logits_TV, label_T, **EVERYTHING))
    assert name in some
    assert len(some) < 7
    assert all(value.equal(everything[key]) for key, value in some.items())


def test_golden_nucleus_with_and_without_the_crossing_token() -> None:
    for crossing, entropy, mass, threshold, slope in (
        (True, 0.905959, 0.894524, 0.5, [-0.277554, 0.129118, 0.148436, 0, 0, 0]),
        (False, 0.582203, 0.769072, 1.0, [-0.196612, 0.196612, 0, 0, 0, 0]),
    ):
        stats, logits_TV = golden(nucleus=0.8, nucleus_keeps_crossing=crossing)
        assert stats.nucleus_entropy is not None
        assert stats.nucleus_log_mass is not None
        assert stats.nucleus_threshold is not None
        assert stats.nucleus_entropy.item() == pytest.approx(entropy, abs=1e-6)
        assert stats.nucleus_log_mass.exp().item() == pytest.approx(mass, abs=1e-6)
        assert stats.nucleus_threshold.item() == threshold
        stats.nucleus_entropy.sum().backward()
        assert logits_TV.grad is not None
        assert logits_TV.grad[0].tolist() == pytest.approx(slope, abs=1e-6)


def test_golden_gradient_of_log_prob_entropy_and_nucleus_together() -> None:
    stats, logits_TV = golden(nucleus=0.8, nucleus_keeps_crossing=False)
    assert stats.nucleus_entropy is not None
    terms = -1.105171 * stats.logprob - 0.01 * stats.entropy + 0.0025 * stats.nucleus_entropy
    terms.sum().backward()
    assert logits_TV.grad is not None
    expected = [0.624472, -0.876837, 0.137566, 0.083058, 0.030275, 0.001466]
    assert logits_TV.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_golden_kept_mass() -> None:
    stats, _ = golden(kept_share=0.02)
    assert stats.kept_mass is not None
    assert stats.kept_mass.item() == pytest.approx(0.998606, abs=1e-6)


def test_tokens_as_probable_as_the_crossing_one_go_with_it() -> None:
    logits_TV = torch.tensor([[1.0, 0.0, 0.0, 0.0, -9.0]])
    inside, outside = (
        token_stats(logits_TV, torch.tensor([0]), nucleus=0.6, nucleus_keeps_crossing=keeps)
        for keeps in (True, False)
    )
    assert inside.nucleus_log_mass is not None
    assert outside.nucleus_log_mass is not None
    assert inside.nucleus_log_mass.exp().item() == pytest.approx(1, abs=1e-4)
    assert outside.nucleus_log_mass.exp().item() == pytest.approx(0.475, abs=1e-3)


def test_a_nucleus_without_its_only_token_is_empty() -> None:
    logits_TV = torch.tensor([[5.0, 0.0, 0.0]], requires_grad=True)
    stats = token_stats(logits_TV, torch.tensor([0]), nucleus=0.8, nucleus_keeps_crossing=False)
    assert stats.nucleus_entropy is not None
    assert stats.nucleus_log_mass is not None
    assert stats.nucleus_threshold is not None
    assert stats.nucleus_entropy.item() == 0
    assert stats.nucleus_log_mass.item() == -math.inf
    assert stats.nucleus_threshold.item() == math.inf
    stats.nucleus_entropy.sum().backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("top_k", range(1, 9))
def test_confidence_is_the_mass_of_the_top_k(top_k: int) -> None:
    logits_TV, label_T = problem(5, 4099, torch.float32)
    stats = token_stats(logits_TV, label_T, top_k=top_k)
    expected = reference.token_stats(logits_TV, label_T, top_k=top_k)
    reference.assert_stats(stats, expected, 1e-7)


def test_confidence_of_fewer_tokens_than_k_is_one() -> None:
    stats = token_stats(torch.zeros(2, 3), torch.tensor([0, 1]), top_k=8)
    assert stats.confidence is not None
    assert stats.confidence.tolist() == pytest.approx([1, 1], abs=1e-12)


def test_equal_logits_count_each_in_the_confidence() -> None:
    logits_TV = torch.zeros(1, 5000)
    logits_TV[0, 4990:] = 2.0
    stats = token_stats(logits_TV, torch.tensor([0]), top_k=5)
    assert stats.confidence is not None
    weight = math.exp(2)
    assert stats.confidence.item() == pytest.approx(5 * weight / (10 * weight + 4990), abs=1e-8)


def test_a_masked_token_makes_self_certainty_infinite_and_nothing_else() -> None:
    logits_TV, label_T = problem(3, 40, torch.float32)
    logits_TV[1, 7] = -math.inf
    label_T[1] = 3
    stats = given(token_stats(logits_TV, label_T, **EVERYTHING))
    assert stats["self_certainty"].isinf().tolist() == [False, True, False]
    assert all(v.isfinite().all() for k, v in stats.items() if k != "self_certainty")


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(st.data())
def test_any_row_agrees_with_the_reference_in_everything(data: st.DataObject) -> None:
    number = st.floats(-40, 40, width=32)
    row = data.draw(st.lists(number, min_size=1, max_size=40))
    label = data.draw(st.integers(0, len(row) - 1))
    temperature = data.draw(st.floats(0.2, 4))
    softcap = data.draw(st.one_of(st.none(), st.floats(1, 60)))
    logits_TV, label_T = torch.tensor([row], dtype=torch.float64), torch.tensor([label])
    stats = token_stats(logits_TV, label_T, temperature, softcap=softcap, **EVERYTHING)
    expected = reference.token_stats(logits_TV, label_T, temperature, softcap=softcap)
    hypothesis.assume(not near_a_threshold(logits_TV, temperature, softcap))
    reference.assert_stats(stats, expected, 1e-7)


def near_a_threshold(logits_TV: Tensor, temperature: float, softcap: float | None) -> bool:
    """Whether rounding decides who is inside the nucleus or the kept mass."""
    z_V = reference.capped(logits_TV, softcap)[0]
    mass_V = (z_V / temperature).softmax(dim=0).sort(descending=True).values.cumsum(0)
    kept_from = reference.kept_from(z_V[None], 0.02, temperature)
    gaps_V = z_V.sort().values.diff()
    close_gaps = bool(((gaps_V > 0) & (gaps_V < 1e-6)).any())
    return close_gaps or bool(
        (mass_V - 0.8).abs().min() < 1e-6 or (z_V - kept_from).abs().min() < 1e-6
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_passes_through_everything(softcap: float | None) -> None:
    logits_TV, label_T = problem(4, 9, torch.float64)
    label_T[2] = -100

    def stats(logits_TV: Tensor) -> tuple[Tensor, ...]:
        result = given(token_stats(logits_TV, label_T, 0.7, softcap=softcap, **EVERYTHING))
        return tuple(result[name] for name in reference.DIFFERENTIABLE)

    assert torch.autograd.gradcheck(stats, (logits_TV.requires_grad_(),))


def test_only_five_statistics_have_a_gradient() -> None:
    logits_TV, label_T = problem(2, 9, torch.float32)
    stats = given(token_stats(logits_TV.requires_grad_(), label_T, **EVERYTHING))
    assert [name for name, value in stats.items() if value.requires_grad] == list(
        reference.DIFFERENTIABLE
    )


def test_bad_options_say_what_was_expected_and_what_came() -> None:
    logits_TV, label_T = problem(3, 10, torch.float32)
    for name in ("softcap", "second_temperature"):
        for value in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name}: expected a finite number > 0, got"):
                token_stats(logits_TV, label_T, **{name: value})
    for name in ("kept_share", "nucleus"):
        for value in (0.0, 1.5, math.nan):
            with pytest.raises(ValueError, match=rf"{name}: expected a number in \(0, 1\], got"):
                token_stats(logits_TV, label_T, **{name: value})
    for top_k in (-1, 9, 2.5, math.nan):
        with pytest.raises(
            ValueError, match=f"top_k: expected a whole number, 0 to 8, got {top_k}"
        ):
            token_stats(logits_TV, label_T, top_k=top_k)


def test_a_second_temperature_far_below_the_first_does_not_overflow() -> None:
    logits_TV = torch.zeros(1, 4096)
    logits_TV[0, 3000] = 8.3  # beyond the first block
    stats = token_stats(logits_TV, torch.tensor([3000]), second_temperature=0.01)
    assert stats.second_logprob is not None
    assert stats.second_logprob.item() == pytest.approx(0, abs=2e-6)


def test_a_soft_cap_leaves_masked_tokens_masked_and_without_a_gradient() -> None:
    logits_TV = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    logits_TV[:, 5:20] = -math.inf
    label_T = torch.tensor([7, 30])  # masked, not masked
    stats = token_stats(logits_TV.requires_grad_(), label_T, softcap=4.0)
    kept_TV = torch.cat([logits_TV[:, :5], logits_TV[:, 20:]], dim=1).detach()
    expected = token_stats(kept_TV, torch.tensor([0, 15]), softcap=4.0)
    assert stats.logprob[0].item() == -math.inf
    torch.testing.assert_close(stats.entropy, expected.entropy, rtol=0, atol=2e-6)
    torch.testing.assert_close(stats.logprob[1], expected.logprob[1], rtol=0, atol=2e-6)
    (stats.logprob + stats.entropy).sum().backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad.isfinite().all()
    assert not logits_TV.grad[:, 5:20].any()
