"""Sampling with statistics, against torch and transformers that only sample.

    OMP_NUM_THREADS=1 python benchmarks/bench_sample_tokens.py

64 rows of 49152 logits; two distributions: flat (normal logits, entropy 10.3 nats) and peaked (as
of a language model, 1.7 nats). Before timing, draws are held against the torch composition in
float64. Variants alternate within a round; a cell is the median over the rounds of CPU time, and
the gates are on the median of the rounds' ratios. pyrl's figures include the log-probs before and
after truncation, the entropy and the mass of the five most probable tokens; the others return
token ids alone.

A second table has draws without the most probable tokens of each row, as siblings of a fork make
them, beside draws with all tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pyrl.logits.sample_tokens import SampledTokens, sample_tokens, sample_tokens_composed
from pyrl.logits.sampling import Exclude, Sampling

ROWS, VOCABULARY = 64, 49152
SEED_B = np.arange(ROWS, dtype=np.uint64)
POSITION_B = np.zeros(ROWS, np.int64)


@dataclass(frozen=True)
class Case:
    """A distribution, a truncation and the least ratios to each peer."""

    shape: str
    dtype: torch.dtype
    sampling: Sampling
    peers: dict[str, float | None]


def torch_plain(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """softmax and multinomial."""
    if sampling != Sampling():
        raise ValueError(f"expected no truncation and temperature 1, got {sampling}")
    return torch.multinomial(torch.softmax(logits_BV, dim=1), 1)


def torch_sort(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Top-p by sorting, as engines without a kernel of their own compose it."""
    sorted_BV, order_BV = logits_BV.sort(dim=1, descending=True)
    probability_BV = torch.softmax(sorted_BV, dim=1)
    before_BV = probability_BV.cumsum(dim=1) - probability_BV
    drawn_B1 = torch.multinomial(probability_BV.masked_fill(before_BV >= sampling.top_p, 0.0), 1)
    return order_BV.gather(1, drawn_B1)


def transformers_warpers(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logits warpers of `generate` (none for temperature 1), softmax and multinomial."""
    warpers = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    warped_BV = warpers(torch.zeros(ROWS, 1, dtype=torch.int64), logits_BV)
    return torch.multinomial(torch.softmax(warped_BV, dim=1), 1)


PEERS: dict[str, Callable[[Tensor, Sampling], Tensor]] = {
    "torch softmax + multinomial": torch_plain,
    "torch sort": torch_sort,
    "transformers' warpers": transformers_warpers,
}
PLAIN: dict[str, float | None] = {
    "torch softmax + multinomial": 25.0,
    "transformers' warpers": None,
}
TOP_P: dict[str, float | None] = {"torch sort": 10.0, "transformers' warpers": None}
OTHER: dict[str, float | None] = {"transformers' warpers": None}
CASES = [
    Case(shape, dtype, sampling, peers)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ("flat", "peaked")
    for sampling, peers in (
        (Sampling(), PLAIN),
        (Sampling(top_p=0.95), TOP_P),
        (Sampling(top_k=50), OTHER),
        (Sampling(min_p=0.05), OTHER),
    )
]


EXCLUDED = [
    (rows, vocabulary, sampling, count)
    for rows, vocabulary in ((64, 32768), (64, 151936), (1024, 32768), (1024, 151936))
    for sampling in (Sampling(), Sampling(top_k=50))
    for count in (1, 16)
]
"""Rows, vocabulary, truncation and excluded tokens of each row."""
MOST = 1.1
"""Of the time of a draw with all tokens."""


def logits(shape: str, rows: int = ROWS, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if shape == "flat":
        return torch.randn(rows, vocabulary, generator=generator)
    logits_BV = 2 * torch.randn(rows, vocabulary, generator=generator)
    likely_BK = torch.randint(0, vocabulary, (rows, 20), generator=generator)
    return logits_BV.scatter_add_(1, likely_BK, torch.linspace(14, 4, 20).expand(rows, 20))


def check(logits_BV: Tensor, sampling: Sampling) -> None:
    """Raise unless draws and statistics are those of the composition in float64."""
    ours = sample_tokens(logits_BV, SEED_B, POSITION_B, sampling)
    expected = sample_tokens_composed(logits_BV, SEED_B, POSITION_B, sampling)
    np.testing.assert_array_equal(ours.token_B, expected.token_B)
    for field in ("logprob_B", "entropy_B", "confidence_B"):
        mine, others = getattr(ours, field), getattr(expected, field)
        np.testing.assert_allclose(mine, others, rtol=0, atol=2e-6, err_msg=field)
    # Rounding (relative 1e-7) may move a token of a flat row's many across the edge of the nucleus.
    mine, others = ours.truncated_logprob_B, expected.truncated_logprob_B
    np.testing.assert_allclose(mine, others, rtol=0, atol=5e-5)


def cpu_seconds(run: Callable[[], Tensor | SampledTokens], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def measure(case: Case, rounds: int) -> bool:
    """Print a row for each peer; whether all gates are met."""
    logits_BV = logits(case.shape).to(case.dtype)
    check(logits_BV, case.sampling)
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in case.peers}
    for _ in range(rounds):
        ours.append(
            cpu_seconds(lambda: sample_tokens(logits_BV, SEED_B, POSITION_B, case.sampling), 5)
        )
        for name, times in theirs.items():
            times.append(cpu_seconds(lambda name=name: PEERS[name](logits_BV, case.sampling), 1))
    met = True
    for name, gate in case.peers.items():
        ratio = statistics.median(t / o for t, o in zip(theirs[name], ours, strict=True))
        applies = gate is not None and case.dtype == torch.float32
        met &= not applies or ratio >= gate
        cells = [
            str(case.dtype).removeprefix("torch."),
            case.shape,
            f"top_k {case.sampling.top_k}" * bool(case.sampling.top_k)
            + f"top_p {case.sampling.top_p}" * (case.sampling.top_p < 1)
            + f"min_p {case.sampling.min_p}" * bool(case.sampling.min_p),
            f"{1e3 * statistics.median(ours):.2f}",
            name,
            f"{1e3 * statistics.median(theirs[name]):.1f}",
            f"{ratio:.1f}",
            (f">= {gate:.0f} " + ("ok" if ratio >= gate else "FAIL")) if applies else "",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    return met


def measure_excluded(
    rows: int, vocabulary: int, sampling: Sampling, count: int, rounds: int
) -> bool:
    """Print a row; whether the gate is met."""
    logits_BV = logits("peaked", rows, vocabulary)
    token_BE = logits_BV.topk(count, dim=1).indices.int().numpy()
    exclude = Exclude(token_BE.ravel(), np.arange(0, rows * count + 1, count))
    keys = np.arange(rows, dtype=np.uint64), np.zeros(rows, np.int64)
    drawn = sample_tokens(logits_BV, *keys, sampling, exclude)
    if (drawn.token_B[:, None] == token_BE).any():
        raise ValueError("an excluded token was drawn")
    repeats = max(1, 2**27 // (rows * vocabulary))
    ours: list[float] = []
    plain: list[float] = []
    for _ in range(rounds):
        for times, taken in ((plain, None), (ours, exclude)):
            run = partial(sample_tokens, logits_BV, *keys, sampling, taken)
            times.append(cpu_seconds(run, repeats))
    ratio = statistics.median(o / p for o, p in zip(ours, plain, strict=True))
    cells = [
        f"{rows} x {vocabulary}",
        f"top_k {sampling.top_k}" * bool(sampling.top_k),
        f"{count}",
        f"{1e3 * statistics.median(plain):.2f}",
        f"{1e3 * statistics.median(ours):.2f}",
        f"{ratio:.2f}",
        f"<= {MOST} " + ("ok" if ratio <= MOST else "FAIL"),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)
    return ratio <= MOST


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{ROWS} x {VOCABULARY}, {options.threads} thread(s), {options.rounds} rounds")
    print("| logits | shape | truncation | pyrl (ms) | peer | peer (ms) | ratio | gate |")
    print("|---|---|---|---|---|---|---|---|")
    met = [measure(case, options.rounds) for case in CASES]
    print("| rows | truncation | excluded | all tokens (ms) | without them (ms) | ratio | gate |")
    print("|---|---|---|---|---|---|---|")
    met += [measure_excluded(*case, options.rounds) for case in EXCLUDED]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
