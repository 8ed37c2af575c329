"""Run by test_isa.py with PYRL_ISA set: statistics and gradients against float64, then a digest."""

from __future__ import annotations

import hashlib
import math
import os

import token_stats_reference as reference
import torch
from torch import Tensor

from pyrl import build_info
from pyrl.logits.token_stats import token_stats

ASKED = {**reference.EVERYTHING, "self_certainty": False}  # infinite with masked tokens
SHAPES = [(0, 5), (1, 1), (1, 33), (3, 15), (2, 16), (4, 63), (2, 4097), (1, 20011)]


def logits_of(rows: int, vocabulary: int, dtype: torch.dtype, padding: int) -> Tensor:
    """Rows `padding` elements apart and not aligned; a fifth of the tokens masked."""
    generator = torch.Generator().manual_seed(vocabulary)
    wide = torch.randn(rows, vocabulary + padding, generator=generator) * 4
    wide[torch.rand(wide.shape, generator=generator) < 0.2] = -math.inf
    logits_TV = wide.to(dtype)[:, padding:]
    logits_TV[:, vocabulary // 2] = 1.5  # the label
    return logits_TV


def check(
    rows: int, vocabulary: int, dtype: torch.dtype, padding: int, softcap: float | None
) -> Tensor:
    """The gradient, after it and the statistics were held against the reference."""
    logits_TV = logits_of(rows, vocabulary, dtype, padding)
    label_T = torch.full((rows,), vocabulary // 2)
    ours_TV = logits_TV.detach().requires_grad_()
    stats = token_stats(ours_TV, label_T, 0.8, softcap=softcap, **ASKED)
    wide_TV = logits_TV.double().requires_grad_()
    expected = reference.token_stats(wide_TV, label_T, 0.8, softcap=softcap)
    reference.assert_stats(stats, expected, 2e-6)
    own = reference.weighted_sum(reference.given(stats))
    truth = reference.weighted_sum({name: expected[name] for name in reference.given(stats)})
    (slope_TV,) = torch.autograd.grad(own, ours_TV, retain_graph=True)
    (expected_TV,) = torch.autograd.grad(truth, wide_TV)
    half = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-5)
    torch.testing.assert_close(slope_TV.double(), expected_TV, rtol=half, atol=1e-6)
    (tiny_TV,) = torch.autograd.grad(stats.logprob.sum() * 1e-37, ours_TV)
    if dtype == torch.bfloat16:  # no subnormal result, as the instruction of AVX-512 BF16 has it
        assert ((tiny_TV == 0) | (tiny_TV.abs() >= 2.0**-126)).all()
    return torch.cat([slope_TV, tiny_TV])


def check_late_maximum(dtype: torch.dtype) -> None:
    """Far above the logits before it, where 2^t against their maximum overflows; then infinite."""
    logits_TV = torch.randn(2, 20011, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits_TV[:, -1] += 30
    label_T = torch.tensor([3, 20010])
    stats = token_stats(logits_TV, label_T, 0.2, top_k=5)
    reference.assert_stats(stats, reference.token_stats(logits_TV, label_T, 0.2), 2e-6)
    logits_TV[1, -1] = math.inf
    stats = token_stats(logits_TV, label_T, 0.2)
    assert stats.entropy.isnan().tolist() == [False, True]


def main() -> None:
    assert build_info()["isa"] == os.environ["PYRL_ISA"]
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_late_maximum(dtype)
        for rows, vocabulary in SHAPES:
            for padding, softcap in ((0, 6.0), (3, None)):
                slope_TV = check(rows, vocabulary, dtype, padding, softcap)
                digest.update(slope_TV.float().numpy().tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
