"""The loss in a graph of autograd or torch.compile: one graph, the same results, no shared memory
that is spoiled unnoticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_fixture import COLUMNS, PPO, RESPONSES, STATE, fixture_loss
from test_fused_loss import BUSY, head_problem, problem, terms_of
from torch import Tensor
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx

from pyrl.loss.fused import fused_policy_loss, linear_policy_loss
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.presets import PRESETS
from pyrl.loss.terms import Terms, loss_terms


@pytest.mark.parametrize("name", ["ppo", "gspo", "kl_cov", "epo"])
def test_compiled_with_terms_it_is_one_graph_with_the_same_results(name: str) -> None:
    loss = replace(PRESETS[name](), entropy=0.01)
    old_T, fixed_T = COLUMNS["old_logprob_T"], COLUMNS["entropy_T"]

    def terms_of(advantage_T: Tensor) -> Terms:
        columns = COLUMNS | {"advantage_T": advantage_T}
        return loss_terms(
            loss,
            columns,
            **RESPONSES,
            state=STATE,
        )

    def step(logprob_T: Tensor, entropy_T: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        out = policy_loss(logprob_T, entropy_T, loss=loss, old_logprob_T=old_T, terms=terms)
        return 2 * out.loss, out.totals

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for advantage_T in (COLUMNS["advantage_T"], -COLUMNS["advantage_T"]):
        results = []
        for run in (step, compiled):
            leaves = [COLUMNS["logprob_T"].clone().requires_grad_(), fixed_T.clone()]
            leaves[1].requires_grad_()
            value, totals = run(*leaves, terms_of(advantage_T))
            results.append([value, totals, *torch.autograd.grad(value, leaves)])
        for ours, compiled_ours in zip(*results, strict=True):
            assert compiled_ours.equal(ours)


def test_one_graph_serves_all_mini_batches_of_siren() -> None:
    loss = PRESETS["siren"]()

    def step(logprob_T: Tensor, entropy_T: Tensor, nucleus_T: Tensor, terms: Terms) -> Tensor:
        old_T = COLUMNS["old_logprob_T"]
        return policy_loss(
            logprob_T,
            entropy_T,
            loss=loss,
            old_logprob_T=old_T,
            nucleus_entropy_T=nucleus_T,
            terms=terms,
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in range(torch._dynamo.config.recompile_limit + 2):
        terms = loss_terms(
            loss,
            COLUMNS,
            **RESPONSES,
            state=replace(STATE, nucleus_entropy=0.1 * batch),
        )
        leaf_T = COLUMNS["nucleus_entropy_T"].clone().requires_grad_()
        found = []
        for run in (step, compiled):
            value = run(COLUMNS["logprob_T"], COLUMNS["entropy_T"], leaf_T, terms)
            found.append([value, *grad(value, [leaf_T])])
        for ours, compiled_ours in zip(*found, strict=True):
            assert compiled_ours.equal(ours)


@pytest.mark.parametrize("how", ["rows", "in place", "linear"])
def test_compiled_one_go_with_terms_is_one_graph_with_the_same_results(how: str) -> None:
    logits_TV, label_T, columns, before = problem(torch.float32)
    hidden_TH, weight_VH, bias = head_problem(torch.float32)
    terms = terms_of(BUSY, columns, before)

    def step(*leaves: Tensor) -> tuple[Tensor, ...]:
        axes = {"loss": BUSY, "terms": terms, **columns}
        if how == "linear":
            out, stats = linear_policy_loss(leaves[0], leaves[1], label_T, bias=leaves[2], **axes)
        else:
            out, stats = fused_policy_loss(leaves[0] * 2, label_T, inplace=how != "rows", **axes)
        return 3 * out.loss, out.totals, out.logprob_grad_T, stats.entropy

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        given = (hidden_TH, weight_VH, bias) if how == "linear" else (logits_TV,)
        leaves = [leaf.detach().clone().requires_grad_() for leaf in given]
        found = run(*leaves)
        results.append([*found, *grad(found[0], leaves)])
    for ours, compiled_ours in zip(*results, strict=True):
        assert compiled_ours.equal(ours)


@pytest.mark.parametrize("name", PRESETS)
def test_compiled_without_terms_it_is_one_graph_with_the_same_results(name: str) -> None:
    def step(logprob_T: Tensor) -> Tensor:
        return fixture_loss(loss, logprob_T=logprob_T, mask_T=mask_T).loss

    loss, mask_T = PRESETS[name](), torch.tensor([True] * 6 + [False])
    logprob_T = COLUMNS["logprob_T"].clone().requires_grad_()
    torch._dynamo.reset()  # each preset is another graph of one function
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, value = step(logprob_T), compiled(logprob_T)
    assert value.equal(expected)
    assert grad(value, logprob_T)[0].equal(grad(expected, logprob_T)[0])


def test_what_is_refused_is_refused_in_a_graph() -> None:
    def step(**changes: Tensor) -> Tensor:
        return fixture_loss(loss, **changes).loss

    loss, entropy_T = PRESETS["hapo"](), COLUMNS["entropy_T"].clone()
    entropy_T[3] = torch.nan
    for changes, message in (
        ({"entropy_T": entropy_T}, "entropy_T: expected numbers, got nan at 3"),
        ({"offset_N1": torch.tensor([0, 8, 7])}, "offsets that do not fall, got 8 before 7"),
        ({"group_N": torch.tensor([0, 2])}, r"expected numbers from 0 below 2 .*, got 2"),
    ):
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            with pytest.raises(ValueError, match=message):
                run(**changes)


def test_the_handed_out_gradient_is_not_spoiled_unnoticed() -> None:
    logprob_T = COLUMNS["logprob_T"].clone().requires_grad_()
    value = fixture_loss(logprob_T=logprob_T).loss
    (first_T,) = grad(value, logprob_T, retain_graph=True)
    again_T = grad(value, logprob_T, retain_graph=True)[0].clone()
    assert again_T.equal(first_T)
    first_T.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(value, logprob_T)


def test_whoever_traces_sees_the_op_and_others_get_the_same_numbers() -> None:
    """Outside a trace the op is not dispatched: that takes longer than a short batch's loss."""
    columns = {k: COLUMNS[k] for k in ("entropy_T", "old_logprob_T")}
    terms = loss_terms(PPO, {"advantage_T": COLUMNS["advantage_T"]})

    def value(logprob_T: Tensor) -> Tensor:
        return policy_loss(logprob_T, loss=PPO, terms=terms, **columns).loss

    logprob_T = COLUMNS["logprob_T"]
    traced = make_fx(value)(logprob_T)
    assert "pyrl.policy_loss" in traced.code
    assert traced(logprob_T + 0.1).equal(value(logprob_T + 0.1))
