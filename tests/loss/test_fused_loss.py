"""One-go is two-phase, bit for bit: the same losses, statistics and gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrl.logits.linear_token_stats import linear_token_stats
from pyrl.logits.token_stats import Request, TokenStats, token_stats
from pyrl.loss import KL, ConfidenceClip, Loss, LossState, PositionClip, fused, fused_ops
from pyrl.loss.fused import fused_policy_loss, linear_policy_loss
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import PRESETS
from pyrl.loss.result import PolicyLoss
from pyrl.loss.terms import Terms, loss_terms

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOKENS, VOCABULARY, LENGTHS = 23, 2077, (9, 1, 13)
NOT_LOCAL = ("gspo", "gmpo", "ctpo", "minpro", "minpro_cispo", "siren", "light_if")
LOCAL = {name: preset() for name, preset in PRESETS.items() if name not in NOT_LOCAL}
BUSY = replace(PRESETS["dapo"](), kl=KL(0.1), entropy=0.01)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
    """Logits, labels, columns of three responses, and what only terms read; a label is ignored."""
    generator = torch.Generator().manual_seed(1)

    def noise(scale: float) -> Tensor:
        return torch.randn(TOKENS, generator=generator, dtype=torch.float64) * scale

    logits_TV = (torch.randn(TOKENS, VOCABULARY, generator=generator) * 3).to(dtype)
    label_T = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    stats = token_stats(logits_TV, label_T, 0.9, squares=True, second_temperature=1.1)
    label_T[4] = -100
    columns = {
        "advantage_T": noise(1.0),
        "old_logprob_T": stats.logprob + noise(0.3),
        "rollout_logprob_T": stats.logprob + noise(0.3),
        "ref_logprob_T": (stats.logprob + noise(0.5)).float(),
        "proxy_logprob_T": stats.logprob + noise(0.5),
        "expert_logprob_T": stats.logprob + noise(0.5),
    }
    before = {
        "logprob_T": stats.logprob + noise(0.1),
        "entropy_T": stats.entropy,
        "sum_p2_T": stats.sum_p2,
        "sum_p2_logp_T": stats.sum_p2_logp,
        "second_logprob_T": stats.second_logprob,
        "reward_T": torch.tensor([1.0, -1.0, 1.0])
        .double()
        .repeat_interleave(torch.tensor(LENGTHS)),
    }
    return logits_TV, label_T, columns, before


MASK_T = torch.rand(TOKENS, generator=torch.Generator().manual_seed(7)) > 0.2
MASK_T[4] = False  # its label is ignored
OFFSET_N1 = torch.tensor([0, *LENGTHS]).cumsum(0)
RESPONSES = {"mask_T": MASK_T, "offset_N1": OFFSET_N1}


def terms_of(loss: Loss, columns: dict[str, Tensor], before: dict[str, Tensor]) -> Terms:
    """Of the policy before the update."""
    return loss_terms(
        loss,
        columns | before,
        mask_T=MASK_T,
        offset_N1=OFFSET_N1,
        group_N=torch.tensor([0, 0, 1]),
        state=LossState(entropy=2.0, mean_entropy=2.0, nucleus_entropy=1.0, seed=3),
    )


def two_phase(
    logits_TV: Tensor, label_T: Tensor, loss: Loss, columns: dict[str, Any]
) -> tuple[PolicyLoss, TokenStats]:
    stats = token_stats(logits_TV, label_T, 0.9)
    return policy_loss(stats.logprob, stats.entropy, loss=loss, **columns), stats


def slope(value: Tensor, leaf: Tensor) -> Tensor:
    value.backward()
    assert leaf.grad is not None
    return leaf.grad


def assert_same(ours: tuple[PolicyLoss, TokenStats], theirs: tuple[PolicyLoss, TokenStats]) -> None:
    for record, expected in zip(ours, theirs, strict=True):
        for name, value in vars(expected).items():
            our_value = vars(record)[name]
            if isinstance(value, Tensor):
                assert our_value.equal(value), name
            else:
                assert our_value == value, name


@pytest.mark.parametrize("loss", LOCAL.values(), ids=LOCAL)
def test_every_loss_that_is_local_to_a_token_is_two_phase_to_the_bit(loss: Loss) -> None:
    logits_TV, label_T, columns, before = problem(torch.float32)
    given = columns | {"terms": terms_of(loss, columns, before), "per_token": True}
    theirs_TV, ours_TV = logits_TV.clone().requires_grad_(), logits_TV.clone().requires_grad_()
    theirs = two_phase(theirs_TV, label_T, loss, given)
    ours = fused_policy_loss(ours_TV, label_T, 0.9, loss=loss, **given)
    assert_same(ours, theirs)
    assert slope(ours[0].loss, ours_TV).equal(slope(theirs[0].loss, theirs_TV))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_go_is_two_phase_to_the_bit(dtype: torch.dtype, inplace: bool) -> None:
    logits_TV, label_T, columns, _ = problem(dtype)
    for loss in (BUSY, LOCAL["cispo"]):
        theirs_TV, ours_TV = logits_TV.clone().requires_grad_(), logits_TV.clone().requires_grad_()
        theirs = two_phase(theirs_TV * 1, label_T, loss, columns | RESPONSES)
        ours = fused_policy_loss(
            ours_TV * 1, label_T, 0.9, loss=loss, inplace=inplace, **columns, **RESPONSES
        )
        assert_same(ours, theirs)
        assert slope(ours[0].loss, ours_TV).equal(slope(theirs[0].loss, theirs_TV))
        assert not ours[1].logprob.requires_grad


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_go_from_hidden_states_is_two_phase_to_the_bit(dtype: torch.dtype, chunk: int) -> None:
    _, label_T, columns, _ = problem(dtype)
    inputs = head_problem(dtype)
    hidden_TH, weight_VH, bias = inputs
    stats = linear_token_stats(hidden_TH, weight_VH, label_T, 0.9, bias=bias, chunk=chunk)
    theirs = policy_loss(stats.logprob, stats.entropy, loss=BUSY, **columns, **RESPONSES)
    ours = linear_policy_loss(
        hidden_TH, weight_VH, label_T, 0.9, bias=bias, chunk=chunk, loss=BUSY, **columns,
        **RESPONSES,
    )  # fmt: skip
    assert_same(ours, (theirs, stats))
    for our_gradient, expected in zip(
        torch.autograd.grad(ours[0].loss, inputs),
        torch.autograd.grad(theirs.loss, inputs),
        strict=True,
    ):
        assert our_gradient.equal(expected)


def head_problem(dtype: torch.dtype) -> list[Tensor]:
    """Hidden states, weight and bias."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((TOKENS, 6), (VOCABULARY, 6), (VOCABULARY,))
    ]


def test_one_go_from_hidden_states_takes_three_gemms_and_skips_what_is_frozen() -> None:
    _, label_T, columns, _ = problem(torch.float32)
    hidden_TH, weight_VH, _ = head_problem(torch.float32)

    def gemms(hidden_TH: Tensor, weight_VH: Tensor) -> int:
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            out, _ = linear_policy_loss(hidden_TH, weight_VH, label_T, loss=BUSY, **columns)
            if out.loss.requires_grad:
                out.loss.backward()
        names = [event.name for event in profile.function_events]
        return sum(name in ("aten::mm", "aten::addmm", "aten::addmm_") for name in names)

    assert gemms(hidden_TH, weight_VH) == 3
    assert gemms(hidden_TH, weight_VH.detach()) == 2
    assert gemms(hidden_TH.detach(), weight_VH) == 2
    assert gemms(hidden_TH.detach(), weight_VH.detach()) == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_another_upstream_gradient_multiplies(inplace: bool) -> None:
    logits_TV, label_T, columns, _ = problem(torch.float64)
    theirs_TV, ours_TV = logits_TV.clone().requires_grad_(), logits_TV.clone().requires_grad_()
    theirs, _ = two_phase(theirs_TV, label_T, BUSY, columns | {"mask_T": label_T != -100})
    ours, _ = fused_policy_loss(ours_TV * 1, label_T, 0.9, loss=BUSY, inplace=inplace, **columns)
    torch.testing.assert_close(
        slope(-0.37 * ours.loss, ours_TV),
        slope(-0.37 * theirs.loss, theirs_TV),
        rtol=1e-9,
        atol=1e-20,
    )


def test_rows_shared_by_threads_give_the_same_bits() -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    wide_TV = logits_TV.repeat(1, 60)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaf_TV = wide_TV.clone().requires_grad_()
            out, stats = fused_policy_loss(leaf_TV, label_T, loss=BUSY, per_token=True, **columns)
            results.append((slope(out.loss, leaf_TV), stats.logprob, out.loss_T))
    finally:
        torch.set_num_threads(threads)
    for alone, together in zip(*results, strict=True):
        assert together.equal(alone)


def test_without_a_gradient_nothing_is_overwritten() -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    before_TV = logits_TV.clone()
    out, _ = fused_policy_loss(logits_TV, label_T, loss=BUSY, inplace=True, **columns)
    with torch.no_grad():
        fused_policy_loss(logits_TV.requires_grad_(), label_T, loss=BUSY, inplace=True, **columns)
    assert not out.loss.requires_grad
    assert logits_TV.equal(before_TV)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_pass_and_second_derivatives_are_refused(inplace: bool) -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    leaf_TV = logits_TV.requires_grad_()
    first, second = (
        fused_policy_loss(leaf_TV * 1, label_T, loss=BUSY, inplace=inplace, **columns)[0].loss
        for _ in range(2)
    )
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="fused_policy_loss: expected one backward pass"):
        first.backward()
    with pytest.raises(NotImplementedError, match="expected to be differentiated once"):
        torch.autograd.grad(second, leaf_TV, create_graph=True)


def test_a_graph_that_needs_the_logits_is_refused_after_one_go_overwrote_them() -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    tanh_TV = logits_TV.requires_grad_().tanh()  # its backward reads its output
    out, _ = fused_policy_loss(tanh_TV, label_T, loss=BUSY, inplace=True, **columns)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_a_loss_that_is_not_local_to_a_token_is_refused_by_name(name: str) -> None:
    logits_TV, label_T, columns, before = problem(torch.float32)
    loss, given = PRESETS[name](), columns | RESPONSES
    if loss.nucleus is not None:
        before["nucleus_entropy_T"] = before["entropy_T"] / 2
        given = columns | {"terms": terms_of(loss, columns, before)}
    with pytest.raises(
        ValueError, match=r"loss: expected one that is local to a token, got (Ratio|Nuc|Cov)"
    ):
        fused_policy_loss(logits_TV, label_T, loss=loss, **given)
    hidden_TH, weight_VH, _ = head_problem(torch.float32)
    with pytest.raises(ValueError, match="loss: expected one that is local to a token"):
        linear_policy_loss(hidden_TH, weight_VH, label_T, loss=loss, **given)


def test_bounds_by_position_are_refused_by_name() -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    with pytest.raises(ValueError, match="local to a token, got PositionClip"):
        fused_policy_loss(
            logits_TV, label_T, loss=replace(BUSY, bounds=PositionClip()), **columns, **RESPONSES
        )


def test_bad_columns_say_what_was_expected_and_what_came() -> None:
    logits_TV, label_T, columns, before = problem(torch.float32)
    with pytest.raises(ValueError, match=r"advantage_T: expected \[23\] .* got \[22\]"):
        fused_policy_loss(
            logits_TV, label_T, loss=BUSY, **columns | {"advantage_T": columns["advantage_T"][1:]}
        )
    with pytest.raises(ValueError, match=r"loss\.ratio: needs the column old_logprob_T"):
        fused_policy_loss(
            logits_TV, label_T, loss=BUSY, advantage_T=columns["advantage_T"],
            ref_logprob_T=columns["ref_logprob_T"],
        )  # fmt: skip
    with pytest.raises(ValueError, match="needs the column entropy_T"):
        fused_policy_loss(logits_TV, label_T, loss=PRESETS["top_entropy"](), **columns)
    terms = terms_of(BUSY, columns, before)
    with pytest.raises(ValueError, match="terms: expected those of 22 tokens, got 23"):
        fused_policy_loss(
            logits_TV[1:], label_T[1:], loss=BUSY, terms=terms,
            **{name: column[1:] for name, column in columns.items()},
        )  # fmt: skip
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        fused_policy_loss(logits_TV, label_T, 0.0, loss=BUSY, **columns)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_one_go_ops_have_no_breaks_and_the_same_results(inplace: bool) -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    plan = fused._plan_of_rows(BUSY, None, columns, None, None, logits_TV, label_T, False)
    arguments = (label_T, Request(0.9).packed(), plan.columns, plan.spec)

    def step(leaf_TV: Tensor) -> Tensor:
        logits_TV = leaf_TV * 2
        if inplace:
            stats_KT, grad_TV = fused_ops.fused_loss_(logits_TV.detach(), *arguments), logits_TV
        else:
            stats_KT, grad_TV = fused_ops.fused_loss(logits_TV.detach(), *arguments)
        return fused_ops.with_gradient(stats_KT[0].sum(), [logits_TV], [grad_TV.detach()])

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf_TV = logits_TV.clone().requires_grad_()
        value = function(leaf_TV)
        results.append((value, *torch.autograd.grad(value, leaf_TV)))
    for eager, graph in zip(*results, strict=True):
        assert graph.equal(eager)


def test_the_one_go_ops_obey_torchs_rules() -> None:
    logits_TV, label_T, columns, _ = problem(torch.float32)
    plan = fused._plan_of_rows(BUSY, None, columns, None, None, logits_TV, label_T, False)
    arguments = (label_T, Request(0.9).packed(), plan.columns, plan.spec)
    ops = torch.ops.pyrl
    torch.library.opcheck(ops.fused_loss.default, (logits_TV, *arguments))
    torch.library.opcheck(ops.fused_loss_.default, (logits_TV.clone(), *arguments))
    hidden_TH, weight_VH, bias = (tensor.detach() for tensor in head_problem(torch.float32))
    torch.library.opcheck(
        ops.linear_fused_loss.default,
        (hidden_TH, weight_VH, bias, *arguments, 7, [True, True, False]),
    )


@pytest.mark.parametrize("vocabulary", [1, 10, 64, 67, 2077])
def test_masked_broken_and_ignored_rows_are_those_of_two_phase(vocabulary: int) -> None:
    """The last columns of a row lie beyond the last whole vector: a mask there is no NaN."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits_TV = torch.randn(7, vocabulary, generator=generator)
    label_T = torch.zeros(7, dtype=torch.int64)
    if vocabulary > 1:
        logits_TV[0, -1] = -math.inf
        logits_TV[1, vocabulary // 2 :] = -math.inf
    logits_TV[2] = -math.inf
    logits_TV[3, -1] = math.nan
    logits_TV[4, 0] = math.inf
    label_T[5], label_T[6] = vocabulary, -100
    columns = {
        "old_logprob_T": torch.full((7,), -1.0, dtype=torch.float64),
        "advantage_T": torch.linspace(-1, 1, 7, dtype=torch.float64),
    }
    loss = replace(PRESETS["dapo"](), entropy=0.1)
    theirs_TV, ours_TV = logits_TV.clone().requires_grad_(), logits_TV.clone().requires_grad_()
    theirs = two_phase(theirs_TV, label_T, loss, columns | {"mask_T": label_T != -100})
    ours = fused_policy_loss(ours_TV, label_T, 0.9, loss=loss, **columns)
    ours_grad, theirs_grad = slope(ours[0].loss, ours_TV), slope(theirs[0].loss, theirs_TV)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=0, atol=0, equal_nan=True)
    spoiled = ours_grad.isnan().any(dim=1).tolist()
    assert spoiled == [False, False, False, True, True, True, False]
    assert not ours_grad[6].any()
    assert ours[0].weight == 1.0


def test_a_masked_bias_in_the_last_column_spoils_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(4, 8, generator=generator).requires_grad_()
    weight_VH, bias = torch.randn(257, 8, generator=generator), torch.zeros(257)
    bias[-1] = -math.inf
    out, _ = linear_policy_loss(
        hidden_TH,
        weight_VH,
        torch.arange(4),
        loss=replace(PRESETS["dapo"](), entropy=0.1),
        bias=bias,
        old_logprob_T=torch.full((4,), -5.0),
        advantage_T=torch.ones(4),
    )
    assert slope(out.loss, hidden_TH).isfinite().all()


def test_no_tokens_have_no_loss() -> None:
    empty_T = torch.empty(0, dtype=torch.float64)
    out, stats = fused_policy_loss(
        torch.empty(0, 5, requires_grad=True),
        torch.empty(0, dtype=torch.int64),
        loss=PRESETS["ppo"](),
        old_logprob_T=empty_T,
        advantage_T=empty_T,
    )
    assert (out.loss.item(), len(stats.logprob)) == (0, 0)


@pytest.mark.parametrize(("advantage", "high"), [(math.nan, 0.2), (1.0, -0.1)])
def test_logits_survive_what_is_refused(advantage: float, high: float) -> None:
    logits_TV = torch.randn(2, 9, requires_grad=True) * 1
    before_TV = logits_TV.detach().clone()
    with pytest.raises(ValueError, match=r"expected .* got .* at 1$"):
        fused_policy_loss(
            logits_TV,
            torch.tensor([0, 1]),
            loss=replace(PRESETS["ppo"](), bounds=ConfidenceClip()),
            inplace=True,
            old_logprob_T=torch.zeros(2),
            advantage_T=torch.tensor([1.0, advantage]),
            clip_low_T=torch.tensor([0.2, 0.2]),
            clip_high_T=torch.tensor([0.2, high]),
        )
    assert logits_TV.equal(before_TV)
