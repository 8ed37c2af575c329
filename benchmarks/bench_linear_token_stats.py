"""Loss and gradient from hidden states and the head's weight, against the other implementations.

    python benchmarks/bench_linear_token_stats.py [--shapes 256x512x32768 ...] [--rounds 9]

Shapes are tokens x width x vocabulary. One thread; the variants run in turn in one process, with
glibc's malloc as it is; columns are medians over rounds of the ratio of CPU times. The floor is the
three GEMMs alone, into buffers that are there already. Peers: token_stats_peers.py.
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
    ratio,
    table,
)
from token_stats_peers import LinearStats, eager_linear, liger_grpo, liger_linear, verl_linear
from torch import Tensor

import pyrl
from pyrl import presets

CLIP, ENTROPY = 0.2, 0.01
FLOOR, EAGER, ONE_GO, TWO_PHASE = "three GEMMs", "torch eager", "pyrl one-go", "pyrl two-phase"
COMPILE, VERL, LIGER = "torch.compile", "verl FusedLinearForPPO", "Liger scaled CE"
LIGER_GRPO, TORCH = "Liger GRPO, no entropy", "torch linear_cross_entropy, no entropy"
CHUNK, CHUNKS = "pyrl one-go, chunk ", (64, 128, 512)


@dataclass(frozen=True)
class Problem:
    hidden_TH: Tensor
    weight_VH: Tensor
    label_T: Tensor
    old_logprob_T: Tensor
    advantage_T: Tensor

    def forget(self) -> None:
        self.hidden_TH.grad = self.weight_VH.grad = None

    def loss(self, logprob_T: Tensor, entropy_T: Tensor) -> Tensor:
        """PPO with an entropy bonus."""
        ratio_T = (logprob_T - self.old_logprob_T).exp()
        clipped_T = ratio_T.clamp(1 - CLIP, 1 + CLIP)
        gain_T = torch.minimum(ratio_T * self.advantage_T, clipped_T * self.advantage_T)
        return -(gain_T + ENTROPY * entropy_T).mean()


def problem(shape: str) -> Problem:
    tokens, width, vocabulary = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(tokens, width, generator=generator)
    weight_VH = torch.randn(vocabulary, width, generator=generator) * (3 / width**0.5)
    label_T = torch.randint(vocabulary, (tokens,), generator=generator)
    with torch.no_grad():
        logprob_T, _ = eager_linear(hidden_TH, weight_VH, label_T)
    return Problem(
        hidden_TH.requires_grad_(),
        weight_VH.requires_grad_(),
        label_T,
        logprob_T + torch.randn(tokens, generator=generator) * 0.2,
        torch.randn(tokens, generator=generator),
    )


def variant(name: str, problem: Problem) -> Variant:
    """Forward, loss and backward; a peer that is not installed raises ImportError."""
    special: dict[str, Callable[[Problem], Callable[[], object]]] = {
        FLOOR: floor,
        ONE_GO: one_go,
        TORCH: torch_cross_entropy,
        LIGER_GRPO: grpo,
    }
    if name in special:
        return Variant(special[name](problem), problem.forget)
    if name.startswith(CHUNK):
        return Variant(one_go(problem, int(name.split()[-1])), problem.forget)
    stats = STATS[name]()

    def loss(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        return problem.loss(*stats(hidden_TH, weight_VH, problem.label_T))

    if name == COMPILE:
        loss = torch.compile(loss, dynamic=False)
    return Variant(lambda: loss(problem.hidden_TH, problem.weight_VH).backward(), problem.forget)


def two_phase(hidden_TH: Tensor, weight_VH: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
    stats = pyrl.linear_token_stats(hidden_TH, weight_VH, label_T)
    return stats.logprob, stats.entropy


STATS: dict[str, Callable[[], LinearStats]] = {
    EAGER: lambda: eager_linear,
    COMPILE: lambda: eager_linear,
    VERL: verl_linear,
    LIGER: liger_linear,
    TWO_PHASE: lambda: two_phase,
}
VARIANTS = [FLOOR, *STATS, LIGER_GRPO, TORCH, ONE_GO, *(f"{CHUNK}{n}" for n in CHUNKS)]
NO_ENTROPY = (FLOOR, LIGER_GRPO, TORCH)


def floor(problem: Problem) -> Callable[[], object]:
    hidden_TH, weight_VH = problem.hidden_TH.detach(), problem.weight_VH.detach()
    logits_TV = hidden_TH @ weight_VH.T
    grad_TH, grad_VH = torch.empty_like(hidden_TH), torch.empty_like(weight_VH)

    def run() -> None:
        torch.mm(hidden_TH, weight_VH.T, out=logits_TV)
        torch.mm(logits_TV, weight_VH, out=grad_TH)
        torch.mm(logits_TV.T, hidden_TH, out=grad_VH)

    return run


def torch_cross_entropy(problem: Problem) -> Callable[[], object]:
    """Its chunked form; it computes less: no entropy."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError("torch 2.13 or later")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: torch.nn.functional.linear_cross_entropy(
        problem.hidden_TH, problem.weight_VH, problem.label_T, options=options
    ).backward()


def grpo(problem: Problem) -> Callable[[], object]:
    loss, arguments = liger_grpo(), (problem.advantage_T, problem.old_logprob_T)
    return lambda: loss(
        problem.hidden_TH, problem.weight_VH, problem.label_T, *arguments
    ).backward()


def one_go(problem: Problem, chunk: int | None = None) -> Callable[[], object]:
    loss = replace(presets.ppo(), entropy=ENTROPY)

    def run() -> None:
        out, _ = pyrl.linear_policy_loss(
            problem.hidden_TH,
            problem.weight_VH,
            problem.label_T,
            loss=loss,
            chunk=chunk,
            advantage_T=problem.advantage_T,
            old_logprob_T=problem.old_logprob_T,
        )
        out.loss.backward()

    return run


def check(name: str, problem: Problem, variant: Variant) -> None:
    """The gradient of the weight is eager's in float64, on a few rows of the vocabulary."""
    rows = problem.label_T[:16]
    variant.prepare()
    variant.run()
    assert problem.weight_VH.grad is not None, name
    hidden_TH, weight_VH = problem.hidden_TH.detach(), problem.weight_VH.detach()
    logits_TV = (hidden_TH.double() @ weight_VH.double().T).requires_grad_()
    logprob_TV = logits_TV.log_softmax(dim=1)
    logprob_T = logprob_TV.gather(1, problem.label_T[:, None])[:, 0]
    entropy_T = -(logprob_TV.exp() * logprob_TV).sum(dim=1)
    problem.loss(logprob_T, entropy_T).backward()
    assert logits_TV.grad is not None
    expected = logits_TV.grad[:, rows].T @ hidden_TH.double()
    torch.testing.assert_close(
        problem.weight_VH.grad[rows].double(), expected, rtol=0, atol=1e-4 * expected.abs().max()
    )


# -- workers: each in a process of its own --


def work(shape: str, rounds: int) -> None:
    made, variants = problem(shape), {}
    for name in VARIANTS:
        try:
            variants[name] = variant(name, made)
        except ImportError:
            continue
        if name not in NO_ENTROPY:
            check(name, made, variants[name])
    answer({"times": interleaved(variants, rounds)})


def work_memory(name: str, shape: str) -> None:
    made = problem(shape)
    try:
        one = variant(name, made)
    except ImportError:
        answer({"bytes": None})
        return
    answer({"bytes": extra_memory(one)})


# -- tables --


def report(shapes: list[str], rounds: int) -> None:
    print(conditions())
    promises = []
    for shape in shapes:
        size = ["--shape", shape, "--rounds", str(rounds)]
        raw = in_a_fresh_process(["--work", "times", *size])["times"]
        times = {name: Times(**values) for name, values in raw.items()}
        rows = []
        for name in VARIANTS:
            if name not in times:
                rows.append([name, "not installed", *[""] * 4])
                continue
            extra = in_a_fresh_process(["--work", "memory", "--variant", name, *size])["bytes"]
            rows.append(
                [
                    name,
                    f"{1e3 * median(times[name].cpu):.0f}",
                    f"{1e3 * median(times[name].wall):.0f}",
                    f"{ratio(times[name], times[FLOOR]):.2f}",
                    f"{ratio(times[name], times[ONE_GO]):.2f}",
                    f"{extra / 1e6:.0f}",
                ]
            )
        print(f"\nLoss and gradients from hidden states, {shape} float32\n")
        head = ["", "ms", "wall ms", "/ three GEMMs", "/ one-go", "extra MB"]
        print(table(head, rows), flush=True)
        promises += [[f"{shape}: {name}", *rest] for name, *rest in gates(times)]
    print("\n" + table(["", "measured", "gate"], promises))


def gates(times: dict[str, Times]) -> list[list[str]]:
    """Name, value and promise."""
    floor = ratio(times[ONE_GO], times[FLOOR])
    rows = [["one-go, times three GEMMs", f"{floor:.2f}", gate(floor, most=1.25)]]
    for peer, least in ((EAGER, 1.25), (VERL, 2.0), (LIGER, 2.0), (LIGER_GRPO, 2.0)):
        if peer in times:
            value = ratio(times[peer], times[ONE_GO])
            rows.append([f"{peer}, times one-go", f"{value:.2f}", gate(value, least=least)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["256x512x32768", "512x1024x49152"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", choices=["times", "memory"], help=argparse.SUPPRESS)
    for name in ("shape", "variant"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.work == "memory":
        work_memory(args.variant, args.shape)
    elif args.work:
        work(args.shape, args.rounds)
    else:
        report(args.shapes, args.rounds)


if __name__ == "__main__":
    main()
