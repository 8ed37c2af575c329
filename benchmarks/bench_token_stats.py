"""Log-prob, entropy, a PPO loss and its gradient from logits, against the other implementations.

    python benchmarks/bench_token_stats.py [--shapes 512x151936 2048x49152] [--rounds 9]

One thread. The variants run in turn in one process, once with glibc's malloc as it is and once kept
warm; columns are medians over rounds of the ratio of CPU times. Peers: token_stats_peers.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from measure import (
    Times,
    Variant,
    answer,
    conditions,
    extra_memory,
    gate,
    in_a_fresh_process,
    interleaved,
    memory_loops,
    ratio,
    table,
)
from token_stats_peers import Stats, eager, trl, verl
from torch import Tensor

import pyrl
from pyrl import presets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLIP, ENTROPY = 0.2, 0.01


@dataclass(frozen=True)
class Problem:
    """Logits to differentiate and what a PPO loss with an entropy bonus needs beside them."""

    original_TV: Tensor
    logits_TV: Tensor
    label_T: Tensor
    old_logprob_T: Tensor
    advantage_T: Tensor

    def restore(self) -> None:
        self.logits_TV.grad = None
        with torch.no_grad():
            self.logits_TV.copy_(self.original_TV)

    def forget(self) -> None:
        self.logits_TV.grad = None

    def loss(self, logprob_T: Tensor, entropy_T: Tensor) -> Tensor:
        ratio_T = (logprob_T - self.old_logprob_T).exp()
        clipped_T = ratio_T.clamp(1 - CLIP, 1 + CLIP)
        gain_T = torch.minimum(ratio_T * self.advantage_T, clipped_T * self.advantage_T)
        return -(gain_T + ENTROPY * entropy_T).mean()


def problem(shape: str, dtype: str) -> Problem:
    tokens, vocabulary = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    original_TV = torch.empty(tokens, vocabulary, dtype=DTYPES[dtype])
    for row_V in original_TV:
        row_V.copy_(torch.randn(vocabulary, generator=generator) * 3)
    label_T = torch.randint(vocabulary, (tokens,), generator=generator)
    logprob_T = original_TV.gather(1, label_T[:, None])[:, 0].float() - 16
    return Problem(
        original_TV,
        original_TV.clone().requires_grad_(),
        label_T,
        logprob_T + torch.randn(tokens, generator=generator) * 0.2,
        torch.randn(tokens, generator=generator),
    )


def two_phase(inplace: bool) -> Stats:
    def stats(logits_TV: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
        both = pyrl.token_stats(logits_TV, label_T, inplace=inplace)
        return both.logprob, both.entropy

    return stats


EAGER, COMPILE, BUFFER, IN_PLACE = (
    "torch eager",
    "torch.compile",
    "pyrl two-phase",
    "pyrl two-phase, in place",
)
ONE_GO = "pyrl one-go, in place"
CALLS = "pyrl two-phase, in place, without the loss"
STATS: dict[str, Callable[[], Stats]] = {
    EAGER: lambda: eager,
    COMPILE: lambda: eager,
    "TRL": trl,
    "verl": verl,
    BUFFER: lambda: two_phase(inplace=False),
    IN_PLACE: lambda: two_phase(inplace=True),
}
GRADIENT = [*STATS, ONE_GO]
FORWARD = [name for name in STATS if name != IN_PLACE]


def gradient(name: str, problem: Problem) -> Variant:
    """Forward, loss and backward; a peer that is not installed raises ImportError."""
    if name == ONE_GO:
        return one_go(problem)
    if name == CALLS:
        return calls_alone(problem)
    stats = STATS[name]()

    def loss(logits_TV: Tensor) -> Tensor:
        return problem.loss(*stats(logits_TV, problem.label_T))

    if name == COMPILE:
        loss = torch.compile(loss, dynamic=False)
    prepare = problem.restore if "in place" in name else problem.forget
    return Variant(lambda: loss(problem.logits_TV).backward(), prepare)


def one_go(problem: Problem) -> Variant:
    loss = replace(presets.ppo(), entropy=ENTROPY)

    def run() -> None:
        out, _ = pyrl.fused_policy_loss(
            problem.logits_TV,
            problem.label_T,
            loss=loss,
            advantage_T=problem.advantage_T,
            old_logprob_T=problem.old_logprob_T,
            inplace=True,
        )
        out.loss.backward()

    return Variant(run, problem.restore)


def calls_alone(problem: Problem) -> Variant:
    """token_stats in place and its backward pass, given the upstream gradients: without the loss,
    whose temporaries are torch's."""
    upstream_T = torch.full_like(problem.advantage_T, 1e-3, dtype=torch.float64)

    def run() -> None:
        stats = pyrl.token_stats(problem.logits_TV, problem.label_T, inplace=True)
        torch.autograd.backward((stats.logprob, stats.entropy), (upstream_T, upstream_T))

    return Variant(run, problem.restore)


def forward(name: str, problem: Problem) -> Variant:
    stats = STATS[name]()
    if name == COMPILE:
        stats = torch.compile(stats, dynamic=False)

    def run() -> object:
        with torch.no_grad():
            return stats(problem.original_TV, problem.label_T)

    return Variant(run)


def check(name: str, problem: Problem, variant: Variant) -> None:
    """The gradient of 16 rows is that of float64 up to rounding; a peer's within ten times that."""
    rows = torch.linspace(0, len(problem.label_T) - 1, 16).long()
    variant.prepare()
    variant.run()
    ours_TV = problem.logits_TV.grad
    assert ours_TV is not None, name
    wide_TV = problem.original_TV[rows].double().requires_grad_()
    logprob_TV = wide_TV.log_softmax(dim=1)
    logprob_T = logprob_TV.gather(1, problem.label_T[rows, None])[:, 0]
    entropy_T = -(logprob_TV.exp() * logprob_TV).sum(dim=1)
    few = Problem(
        wide_TV, wide_TV, problem.label_T[rows], problem.old_logprob_T[rows].double(),
        problem.advantage_T[rows].double(),
    )  # fmt: skip
    (few.loss(logprob_T, entropy_T) * 16 / len(problem.label_T)).backward()
    assert wide_TV.grad is not None
    half, own = problem.original_TV.dtype != torch.float32, name.startswith("pyrl")
    tolerance = (0.005 if half else 1e-5) * wide_TV.grad.abs().max().item()
    error_T = (ours_TV[rows].double() - wide_TV.grad).abs().amax(dim=1)
    wrong_T = error_T > (tolerance if own else 10 * tolerance)
    # A log-prob that a peer has rounded to bfloat16 may fall on the other side of the clip.
    most = 8 if half and not own else 0
    assert wrong_T.sum() <= most, f"{name}: {int(wrong_T.sum())} of 16 rows, {error_T.max():.3g}"
    problem.restore()


# -- workers: each in a process of its own --


def work(task: str, shape: str, dtype: str, rounds: int) -> None:
    """Times of every variant that is installed, beside the loops that measure the memory."""
    made, loops = problem(shape, dtype), memory_loops()
    variants = {name: variant for name, (variant, _) in loops.items()}
    for name in GRADIENT if task == "gradient" else FORWARD:
        try:
            variants[name] = gradient(name, made) if task == "gradient" else forward(name, made)
        except ImportError:
            continue
        if task == "gradient":
            check(name, made, variants[name])
    moved = {name: size for name, (_, size) in loops.items()}
    answer({"times": interleaved(variants, rounds), "moved": moved})


def work_memory(name: str, shape: str, dtype: str) -> None:
    made = problem(shape, dtype)
    try:
        variant = gradient(name, made)
    except ImportError:
        answer({"bytes": None})
        return
    answer({"bytes": extra_memory(variant)})


# -- tables --


@dataclass(frozen=True)
class Result:
    """Times of one problem: `gradient` with malloc as it is and kept warm, `forward` kept warm."""

    shape: str
    dtype: str
    cold: dict[str, Times]
    warm: dict[str, Times]
    forward: dict[str, Times]
    moved: dict[str, int]
    extra: dict[str, int | None]

    def share(self, times: dict[str, Times], name: str, loop: str, passes: int) -> float:
        """Share of the measured bandwidth, if the logits move `passes` times."""
        tokens, vocabulary = map(int, self.shape.split("x"))
        moved = passes * tokens * vocabulary * DTYPES[self.dtype].itemsize
        return ratio(times[loop], times[name]) * moved / self.moved[loop]


def measured(shape: str, dtype: str, rounds: int) -> Result:
    size = ["--shape", shape, "--dtype", dtype, "--rounds", str(rounds)]
    cold, warm, forwards = (
        in_a_fresh_process(["--work", task, *size], warm=warm)
        for task, warm in (("gradient", False), ("gradient", True), ("forward", True))
    )
    extra = {
        name: in_a_fresh_process(["--work", "memory", "--variant", name, *size])["bytes"]
        for name in [*GRADIENT, CALLS]
    }
    times = ({n: Times(**t) for n, t in r["times"].items()} for r in (cold, warm, forwards))
    return Result(shape, dtype, *times, cold["moved"], extra)


def gradient_table(result: Result) -> str:
    rows = []
    for name in GRADIENT:
        extra = result.extra[name]
        if extra is None:
            rows.append([name, "not installed", *[""] * 6])
            continue
        both = (result.cold, result.warm)
        rows.append(
            [
                name,
                *(f"{1e3 * median(times[name].cpu):.0f}" for times in both),
                *(f"{ratio(times[name], times[IN_PLACE]):.1f}" for times in both),
                *(f"{ratio(times[name], times[ONE_GO]):.1f}" for times in both),
                f"{extra / 1e6:.2f}",
            ]
        )
    head = ["", "ms", "warm", "/ two-phase", "warm", "/ one-go", "warm", "extra MB"]
    return table(head, rows)


def forward_table(result: Result) -> str:
    rows = [
        [
            name,
            f"{1e3 * median(result.forward[name].cpu):.0f}",
            f"{1e3 * median(result.forward[name].wall):.0f}",
            f"{ratio(result.forward[name], result.forward[BUFFER]):.1f}",
        ]
        for name in FORWARD
        if name in result.forward
    ]
    return table(["", "ms", "wall ms", "/ pyrl"], rows)


def gates(result: Result) -> list[list[str]]:
    """What is promised of this problem: name, value, whether it is met."""
    cold, warm = result.cold, result.warm

    def over(times: dict[str, Times], peer: str, ours: str) -> float:
        return ratio(times[peer], times[ours])

    allowed = 16 * int(result.shape.split("x")[0]) + (64 << 10)
    promises: list[tuple[str, float, float]] = [
        ("two-phase, times torch eager", over(cold, EAGER, IN_PLACE), 12),
        ("  malloc kept warm", over(warm, EAGER, IN_PLACE), 6),
        ("two-phase, times torch.compile", over(cold, COMPILE, IN_PLACE), 5),
        ("  malloc kept warm", over(warm, COMPILE, IN_PLACE), 3),
        ("one-go, times torch.compile, warm", over(warm, COMPILE, ONE_GO), 4.5),
    ]
    if result.dtype == "float32":
        forward = result.share(result.forward, BUFFER, "read", 1)
        promises.append(("forward, % of read bandwidth", 100 * forward, 65))
        one_go = result.share(warm, ONE_GO, "update", 2)
        promises.append(("one-go, % of update bandwidth", 100 * one_go, 60))
    rows = [[name, f"{value:.1f}", gate(value, least=least)] for name, value, least in promises]
    for name in (CALLS, ONE_GO):
        extra = result.extra[name] or 0
        rows.append(
            [f"{name}, extra KiB", f"{extra / 1024:.0f}", gate(extra / 1024, most=allowed / 1024)]
        )
    return [[f"{result.shape} {result.dtype}: {name}", *rest] for name, *rest in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["512x151936", "2048x49152", "64x262144"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", choices=["gradient", "forward", "memory"], help=argparse.SUPPRESS)
    for name in ("shape", "dtype", "variant"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.work == "memory":
        work_memory(args.variant, args.shape, args.dtype)
    elif args.work:
        work(args.work, args.shape, args.dtype, args.rounds)
    else:
        report(args.shapes, args.dtypes, args.rounds)


def report(shapes: list[str], dtypes: list[str], rounds: int) -> None:
    print(conditions())
    promises = []
    for shape in shapes:
        for dtype in dtypes:
            result = measured(shape, dtype, rounds)
            print(f"\nLoss and gradient, {shape} {dtype}\n\n{gradient_table(result)}")
            print(f"\nLog-prob and entropy alone, warm\n\n{forward_table(result)}", flush=True)
            promises += gates(result)
    print("\n" + table(["", "measured", "gate"], promises))


if __name__ == "__main__":
    main()
