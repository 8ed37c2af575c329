"""The CUDA kernels on the CPU: the tests of the CPU kernels, and what only CUDA can get wrong.

Nothing here runs on a GPU; what the emulation can show and what it cannot:
tests/cpp/cuda_on_cpu/cuda_runtime.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import cuda_on_cpu
import pytest
import torch
from test_token_stats import *  # noqa: F403
from test_token_stats_options import *  # noqa: F403
from token_stats_reference import EVERYTHING
from torch import Tensor

from pyrl.logits.token_stats import STATS, token_stats

# Not about the kernels, or too many rows for an emulation.
del test_results_never_depend_on_the_number_of_threads  # noqa: F821
del test_gradcheck_passes_through_everything  # noqa: F821
del test_columns_past_the_vocabulary_are_never_counted  # noqa: F821

kernels = pytest.fixture(scope="module", autouse=True)(cuda_on_cpu.in_place_of_the_core)


@pytest.fixture(autouse=True)
def memory_of_the_cpu(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("device") == "cuda":
        pytest.skip("the emulation cannot read a GPU's memory; test_token_stats.py tests that GPU")


PART = 1 << 15
"""Columns of a row that one block of threads adds up: csrc/logits/device_sums.cuh."""


@pytest.fixture(params=[1, 2, 3])
def shuffled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads run in a random order between barriers."""
    cuda_on_cpu.load().order_threads(request.param)
    yield
    cuda_on_cpu.load().order_threads(0)


def both(logits_TV: Tensor, label_T: Tensor, softcap: float | None = None) -> Tensor:
    """All statistics and the gradient of their weighted sum, float64 [K + V, T]."""
    logits_TV = logits_TV.detach().requires_grad_()
    stats = token_stats(logits_TV, label_T, 0.9, softcap=softcap, **EVERYTHING)
    rows_KT = torch.stack([getattr(stats, name) for name in STATS])
    (rows_KT[:5] * torch.arange(1.0, 6)[:, None]).sum().backward()
    assert logits_TV.grad is not None
    return torch.cat([rows_KT.detach(), logits_TV.grad.double().T])


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_depends_on_the_order_of_threads(dtype: torch.dtype, shuffled: None) -> None:
    logits_TV, label_T = problem(2, PART + 1001, dtype)  # noqa: F405
    again = both(logits_TV, label_T, 20.0)
    cuda_on_cpu.load().order_threads(0)
    assert torch.equal(bits(again), bits(both(logits_TV, label_T, 20.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_row_has_the_same_bits_at_any_address_and_in_any_batch(dtype: torch.dtype) -> None:
    row_1V, label_1 = problem(1, PART + 333, dtype)  # noqa: F405
    alone = both(row_1V, label_1)
    batch_TV = torch.full((3, PART + 340), 7.0, dtype=dtype)
    for shift in (0, 1, 3):
        batch_TV[1, shift : shift + PART + 333] = row_1V
        part_TV = batch_TV[:, shift : shift + PART + 333]
        together = both(part_TV, label_1.expand(3).contiguous())
        assert torch.equal(bits(together[:, 1]), bits(alone[:, 0]))


def test_the_callers_device_stays_current_and_a_missing_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both(*problem(2, 5, torch.float32))  # noqa: F405
    assert cuda_on_cpu.load().current_device() == 0
    monkeypatch.setattr(cuda_on_cpu, "DEVICE", 2)
    with pytest.raises(RuntimeError, match="device of the tensors"):
        token_stats(*problem(2, 5, torch.float32))  # noqa: F405
    assert cuda_on_cpu.load().current_device() == 0


def test_the_emulation_runs_a_correct_kernel(shuffled: None) -> None:
    assert cuda_on_cpu.load().run_faulty("sum") == 63 * 64 / 2


def test_the_emulation_sees_a_missing_barrier(shuffled: None) -> None:
    assert cuda_on_cpu.load().run_faulty("missing barrier") != 63 * 64 / 2


def test_the_emulation_sees_shared_memory_that_nobody_wrote() -> None:
    assert math.isnan(cuda_on_cpu.load().run_faulty("unwritten"))


@pytest.mark.parametrize(
    ("fault", "message"), [("divergent", "different barriers"), ("early exit", "not all threads")]
)
def test_the_emulation_refuses_barriers_that_would_hang(fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda_on_cpu.load().run_faulty(fault)
