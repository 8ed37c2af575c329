"""The policy loss by the CUDA kernels is the CPU's; see test_cuda_on_cpu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cuda_on_cpu
import pytest
import torch
from policy_fixture import PPO
from test_policy_loss import *  # noqa: F403
from test_policy_loss_golden import test_gradients_are_the_golden_ones  # noqa: F401
from test_policy_loss_reference import LOSSES, STATE
from test_policy_loss_traps import test_products_of_ratios_do_not_overflow  # noqa: F401
from torch import Tensor

from pyrl import _core
from pyrl.loss import Loss, PositionClip, Ratio, Unbounded
from pyrl.loss.aggregate import SeqMeanTokenMean, TokenSum
from pyrl.loss.policy_loss import PolicyLoss, policy_loss
from pyrl.loss.spec import LossSpec

kernels = pytest.fixture(scope="module", autouse=True)(cuda_on_cpu.in_place_of_the_core)

LENGTHS = (0, 300, 1, 31, 0, 0, 257, 2, 40, 64, 0)
"""Of responses: none and some tokens, a warp, and more than a block of 256 threads."""
SCANS = ("seq_geo", "seq_prod", "cum_prod", "cum_geo", "min_prefix")


@pytest.fixture(params=[1, 2])
def shuffled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads run in a random order between barriers."""
    cuda_on_cpu.load().order_threads(request.param)
    yield
    cuda_on_cpu.load().order_threads(0)


def batch(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """Columns, mask and responses; tokens outside the mask hold NaN."""
    generator = torch.Generator().manual_seed(1)
    tokens, leaf_T = sum(lengths), torch.repeat_interleave(torch.tensor(lengths))

    def numbers(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(tokens, generator=generator, dtype=torch.float64)

    leaf_N = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    old = -numbers().abs() - 0.01
    columns = {
        "logprob_T": -(old + numbers(0.3)).abs() - 0.01,
        "entropy_T": numbers().abs() + 0.01,
        "nucleus_entropy_T": numbers().abs(),
        "old_logprob_T": old,
        "rollout_logprob_T": old + numbers(0.1),
        "ref_logprob_T": (old + numbers(0.3)).float(),
        "proxy_logprob_T": old + numbers(0.3),
        "expert_logprob_T": (old + numbers(0.3)).float(),
        "second_logprob_T": old + numbers(0.3),
        "sum_p2_T": numbers().abs(),
        "sum_p2_logp_T": -numbers().abs(),
    }
    mask_T = torch.rand(tokens, generator=generator) < 0.8
    columns = {name: column.masked_fill(~mask_T, math.nan) for name, column in columns.items()}
    return columns | {
        "advantage_T": leaf_N[leaf_T],
        "reward_T": leaf_N.sign()[leaf_T],
        "mask_T": mask_T,
        "offset_N1": torch.tensor([0, *lengths]).cumsum(0),
        "group_N": torch.arange(len(lengths)) % 3,
        "state": STATE,
        "per_token": True,
    }


def by_the_cpu(given: dict[str, Any]) -> PolicyLoss:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrl.loss.kernels.has_kernel", lambda device: False)
        return policy_loss(**given)


def outputs(result: PolicyLoss) -> list[Tensor]:
    per_token = (result.loss_T, result.logprob_grad_T, result.entropy_grad_T)
    return [result.loss, result.totals, *(each for each in per_token if each is not None)]


def assert_the_cpus(given: dict[str, Any]) -> None:
    ours, expected = outputs(policy_loss(**given)), outputs(by_the_cpu(given))
    assert all(each.isfinite().all() for each in expected)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def bits(result: PolicyLoss) -> list[list[int]]:
    return [each.reshape(-1).view(torch.int64).tolist() for each in outputs(result)]


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_the_cpus(name: str) -> None:
    assert_the_cpus({**batch(), "loss": LOSSES[name]})


def test_the_kernel_is_what_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core.loss, "policy_loss", None)
    assert policy_loss(**batch(), loss=PPO).loss.isfinite()
    with pytest.raises(TypeError, match="not callable"):
        by_the_cpu({**batch(), "loss": PPO})


@pytest.mark.parametrize("of", SCANS)
def test_scans_with_a_cut_and_bounds_by_position_are_the_cpus(of: Any) -> None:
    cut = replace(PPO, ratio=Ratio(of, pre_clip=0.2), aggregate=SeqMeanTokenMean())
    assert_the_cpus({**batch(), "loss": cut})
    positions = PositionClip(0.01, 0.02, 0.1, 0.5)
    assert_the_cpus({**batch(), "loss": replace(PPO, ratio=Ratio(of), bounds=positions)})
    alone = replace(PPO, bounds=replace(positions, dual=0.0))
    assert_the_cpus({**batch(), "mask_T": None, **unmasked(), "loss": alone})


def unmasked() -> dict[str, Any]:
    """The columns of batch without NaN."""
    given = batch()
    return {k: v.nan_to_num(-0.5) for k, v in given.items() if k.endswith(("prob_T", "entropy_T"))}


@pytest.mark.parametrize("of", SCANS)
def test_nan_reaches_the_tokens_that_it_reaches_on_the_cpu(of: Any) -> None:
    given = {**batch(), "loss": replace(PPO, ratio=Ratio(of))}
    given["logprob_T"][303] = math.nan
    assert given["mask_T"][303]
    ours, expected = policy_loss(**given), by_the_cpu(given)
    assert expected.loss_T is not None
    assert expected.loss_T.isnan().any()
    torch.testing.assert_close(ours.loss_T, expected.loss_T, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("of", ["cum_prod", "cum_geo"])
def test_a_far_token_counts_in_a_prefix_as_it_does_on_the_cpu(of: Any) -> None:
    given = {**batch(), "loss": replace(PPO, ratio=Ratio(of), bounds=Unbounded())}
    first, second = (400 + given["mask_T"][400:].nonzero()[:2, 0]).tolist()
    given["logprob_T"][first] -= 50.0
    given["old_logprob_T"][second] -= 30.0
    assert_the_cpus(given)


def test_without_responses_or_a_mask_it_is_the_cpus() -> None:
    for tokens in (1, 255, 257):
        given = {k: v[:tokens] for k, v in (batch() | unmasked()).items() if k.endswith("_T")}
        del given["mask_T"]
        assert_the_cpus({**given, "loss": PPO, "per_token": True})


def test_narrow_columns_have_narrow_results() -> None:
    given = batch()
    given |= {k: v.float() for k, v in given.items() if k.endswith("_T") and k != "mask_T"}
    for name in ("ppo", "gspo", "kl and entropy"):
        ours, expected = (
            outputs(each({**given, "loss": LOSSES[name]}))
            for each in (lambda given: policy_loss(**given), by_the_cpu)
        )
        assert ours[0].dtype == ours[2].dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["ctpo", "gspo", "minpro", "kl and entropy"])
def test_no_loss_depends_on_the_order_of_threads(name: str, shuffled: None) -> None:
    again = bits(policy_loss(**batch(), loss=LOSSES[name]))
    cuda_on_cpu.load().order_threads(0)
    assert again == bits(policy_loss(**batch(), loss=LOSSES[name]))


@pytest.mark.parametrize("of", SCANS)
def test_a_response_has_the_same_bits_in_any_batch(of: Any) -> None:
    loss: Loss = replace(PPO, ratio=Ratio(of), bounds=Unbounded(), aggregate=TokenSum())
    given = batch()
    whole = policy_loss(**given, loss=loss)
    for n in (1, 6):
        begin, end = given["offset_N1"][n : n + 2].tolist()
        alone = {k: v[begin:end] for k, v in given.items() if k.endswith("_T")}
        offset_N1 = torch.tensor([0, end - begin])
        part = policy_loss(**alone, offset_N1=offset_N1, loss=loss)
        assert torch.equal(part.logprob_grad_T, whole.logprob_grad_T[begin:end])


def test_more_tokens_than_threads_are_all_visited() -> None:
    tokens = 256 * 256 + 300
    ones_T = torch.ones(tokens, dtype=torch.float64)
    given = {"logprob_T": -ones_T, "entropy_T": ones_T, "old_logprob_T": -ones_T}
    result = policy_loss(**given, advantage_T=ones_T, loss=replace(PPO, aggregate=TokenSum()))
    assert result.totals.tolist() == [tokens, 0, 0, 0, 0, 0, tokens, 1]
    assert result.logprob_grad_T.equal(-ones_T)
    assert result.loss.item() == -tokens
    advantage_T = ones_T.index_fill(0, torch.tensor([70, 70 + 256 * 256]), math.inf)
    with pytest.raises(ValueError, match=r"expected finite numbers, got inf at 70$"):
        policy_loss(**given, advantage_T=advantage_T, loss=PPO)


def test_the_first_token_that_is_wrong_is_named() -> None:
    given = batch((600, 3)) | {"mask_T": None}
    given |= {k: v.nan_to_num(-0.5) for k, v in given.items() if k.endswith("prob_T")}
    advantage_T = given["advantage_T"]
    advantage_T[[70, 300, 301]] = math.nan
    advantage_T[71] = math.inf
    with pytest.raises(ValueError, match=r"advantage_T: expected finite numbers, got nan at 70$"):
        policy_loss(**given, loss=PPO)
    with pytest.raises(ValueError, match=r"advantage_T: expected finite numbers, got inf at 71$"):
        policy_loss(**given | {"mask_T": torch.arange(603) > 70}, loss=PPO)


@pytest.mark.parametrize(
    ("column", "changed", "message"),
    [
        (5, torch.ones(3, dtype=torch.float64), r"columns\[5\]: expected 7 entries, got \[3\]"),
        (5, torch.ones(7, dtype=torch.int64), "columns: expected float32 or float64, got torch.i"),
    ],
)
def test_the_op_reads_no_column_out_of_bounds(column: int, changed: Tensor, message: str) -> None:
    logprob_T = COLUMNS["logprob_T"]  # noqa: F405
    columns: list[Tensor | None] = [None] * 19
    columns[column] = changed
    weight_N, spec = torch.ones(2, dtype=torch.float64), LossSpec().numbers()
    with pytest.raises(ValueError, match=message):
        torch.ops.pyrl.policy_loss(
            *(logprob_T, logprob_T, None, columns, None, torch.tensor([0, 4, 7]), weight_N),
            *(None, None, spec, False),
        )


def test_the_callers_device_stays_current_when_a_loss_is_refused() -> None:
    bad_T = torch.full((7,), math.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected finite numbers"):
        fixture_loss(advantage_T=bad_T)  # noqa: F405
    assert cuda_on_cpu.load().current_device() == 0
