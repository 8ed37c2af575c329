"""Every instruction set computes what the float64 reference does; threads change no bit."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyrl import build_info
from pyrl.logits.token_stats import token_stats

CHILD = Path(__file__).parent / "isa_child.py"
ISAS = ["scalar", "avx2", "avx512", "avx512_bf16"]


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYRL_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@functools.cache
def digest(isa: str) -> str:
    """Of all gradients; skips where this CPU lacks the instruction set."""
    done = run(isa, str(CHILD))
    if "expected an instruction set of this CPU" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_the_reference(isa: str) -> None:
    assert len(digest(isa).strip()) == 64


def test_the_rounding_instruction_of_bfloat16_gives_the_bits_of_the_integers() -> None:
    assert digest("avx512_bf16") == digest("avx512")


def test_an_unknown_instruction_set_is_refused_with_both_names() -> None:
    done = run("avx9000", "-P", "-c", "import pyrl")
    assert done.returncode != 0
    assert "PYRL_ISA: expected scalar, avx2, avx512 or avx512_bf16" in done.stderr
    assert "got avx9000" in done.stderr


def test_the_widest_instruction_set_is_chosen() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("no /proc/cpuinfo")
    words = flags.read_text().split()
    if "avx512_bf16" in words:
        expected = "avx512_bf16"
    elif {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(words):
        expected = "avx512"
    else:
        expected = "avx2" if {"avx2", "fma", "f16c"} <= set(words) else "scalar"
    assert build_info()["isa"] == os.environ.get("PYRL_ISA", expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_one_long_row_or_many_give_the_same_bits_on_any_number_of_threads(
    rows: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits_TV = (torch.randn(rows, 99_991, generator=generator) * 3).to(dtype)
    label_T = torch.randint(99_991, (rows,), generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            leaf_TV = logits_TV.clone().requires_grad_()
            stats = token_stats(
                leaf_TV, label_T, 0.9, top_k=8, squares=True, nucleus=0.8, kept_share=0.01
            )
            assert stats.nucleus_entropy is not None
            (stats.logprob - stats.entropy + stats.nucleus_entropy).sum().backward()
            values = [v.detach() for v in vars(stats).values() if v is not None]
            results.append([*values, leaf_TV.grad])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, alone in zip(other, results[0], strict=True):
            assert ours is not None
            assert alone is not None
            assert ours.equal(alone)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits_TV = torch.randn(9, 70_001, generator=torch.Generator().manual_seed(0)) * 3
    together = token_stats(logits_TV, torch.arange(9))
    alone = token_stats(logits_TV[4:5], torch.tensor([4]))
    assert together.logprob[4] == alone.logprob[0]
    assert together.entropy[4] == alone.entropy[0]


FORK = """
import os, torch
from pyrl.logits.token_stats import token_stats
torch.set_num_threads(3)
logits_TV = torch.randn(64, 50_000)
label_T = torch.arange(64)
before = token_stats(logits_TV, label_T).entropy
child = os.fork()
if child == 0:
    same = token_stats(logits_TV, label_T).entropy.equal(before)
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert token_stats(logits_TV, label_T).entropy.equal(before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_child_of_fork_has_threads_of_its_own() -> None:
    command = [sys.executable, "-P", "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
