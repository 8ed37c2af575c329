"""Every preset of policy_loss with its gradients, against the same composed of torch operations.

    python benchmarks/bench_policy_loss.py [--tokens 1000000] [--rounds 9] [--presets ppo gspo]

One thread. A preset and its composition (policy_loss_peers.py) run in turn in one process, forward
and autograd.grad with respect to log-prob and entropies, once with glibc's malloc as it is and once
kept warm; ratios are medians over rounds of the ratio of CPU times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from measure import (
    Times,
    Variant,
    answer,
    conditions,
    gate,
    in_a_fresh_process,
    interleaved,
    ratio,
    table,
)
from policy_loss_peers import GROUP, torch_loss
from torch import Tensor

import pyrl
from pyrl.loss import ClipCov, Loss, LossState
from pyrl.loss.presets import PRESETS

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LENGTH = 1000
"""Tokens of each response: equal, so that the composition needs neither padding nor a mask."""
LEAST = 5.0
STATE = LossState(entropy=0.8, nucleus_entropy=0.5)
DIFFERENTIABLE = ("logprob_T", "entropy_T", "nucleus_entropy_T")


def columns(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """[responses, tokens] of a plausible policy, somewhat off the one that sampled."""
    generator = torch.Generator().manual_seed(1)
    shape = (tokens // LENGTH, LENGTH)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -torch.rand(shape, generator=generator, dtype=torch.float64).pow(4) * 6 - 1e-3
    reward = 2 * torch.randint(0, 2, (shape[0], 1), generator=generator).double() - 1
    entropy = (0.3 - old * 0.5 + normal(0.1)).clamp(min=0.01)
    found = {
        "logprob_T": (old + normal(0.1)).clamp(max=-1e-4),
        "entropy_T": entropy,
        "nucleus_entropy_T": entropy / 2,
        "old_logprob_T": old,
        "rollout_logprob_T": (old + normal(0.02)).clamp(max=-1e-4),
        "proxy_logprob_T": old + 0.01,
        "expert_logprob_T": (old + normal(0.5)).clamp(max=-1e-4),
        "second_logprob_T": old * 1.1,
        "advantage_T": (reward + 0.1 * normal(1.0)[:, :1]).expand(shape),
        "reward_T": reward.expand(shape),
        "sum_p2_T": torch.exp(-entropy),
        "sum_p2_logp_T": -0.3 * entropy,
    }
    made = {name: value.to(dtype).contiguous() for name, value in found.items()}
    for name in DIFFERENTIABLE:
        made[name].requires_grad_()
    return made


def leaves(c: dict[str, Tensor]) -> list[Tensor]:
    return [c[name] for name in DIFFERENTIABLE]


def ours(loss: Loss, c: dict[str, Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
    rows, length = c["logprob_T"].shape
    flat = {name: value.flatten() for name, value in c.items()}
    logprob_T, entropy_T = flat.pop("logprob_T"), flat.pop("entropy_T")
    result = pyrl.policy_loss(
        logprob_T,
        entropy_T,
        loss=loss,
        offset_N1=torch.arange(rows + 1) * length,
        group_N=torch.arange(rows) // GROUP,
        state=STATE,
        **flat,
    )
    return result.loss, torch.autograd.grad(result.loss, leaves(c), allow_unused=True)


def theirs(loss: Loss, c: dict[str, Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
    value = torch_loss(loss, c, STATE)
    return value, torch.autograd.grad(value, leaves(c), allow_unused=True)


def check(name: str, c: dict[str, Tensor]) -> None:
    """In float64, value and gradients agree with the composition's."""
    loss = PRESETS[name]()
    if name == "clip_cov":  # all that may be dropped: another generator drops other tokens
        loss = replace(loss, keep=(ClipCov(share=1.0),))
    (mine, my_grads), (peer, peer_grads) = ours(loss, c), theirs(loss, c)
    torch.testing.assert_close(mine, peer, rtol=1e-9, atol=1e-12, msg=lambda m: f"{name}: {m}")
    for a, b in zip(my_grads, peer_grads, strict=True):
        zero = torch.zeros_like(c["logprob_T"])
        a, b = zero if a is None else a, zero if b is None else b
        scale = max(b.abs().max().item(), 1e-12)
        torch.testing.assert_close(
            a / scale, b / scale, rtol=1e-7, atol=1e-7, msg=lambda m: f"{name}: {m}"
        )


def work(dtype: str, tokens: int, rounds: int, presets: Sequence[str]) -> None:
    """Times of both, preset by preset."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Times]] = {}
    for name in presets:
        check(name, columns(min(tokens, 16 * LENGTH), torch.float64))
        c, loss = columns(tokens, DTYPES[dtype]), PRESETS[name]()
        found[name] = interleaved(
            {
                "torch": Variant(lambda loss=loss, c=c: theirs(loss, c)),
                "pyrl": Variant(lambda loss=loss, c=c: ours(loss, c)),
            },
            rounds,
        )
    answer({"presets": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--work", choices=DTYPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.tokens, options.rounds, options.presets)
        return
    print(conditions(), end="\n\n")
    size = ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
    measured = {
        (dtype, warm): in_a_fresh_process(
            ["--work", dtype, *size, "--presets", *options.presets], warm=warm
        )["presets"]
        for dtype in DTYPES
        for warm in (False, True)
    }
    rows = []
    for name in options.presets:
        times = {k: {n: Times(**t) for n, t in v[name].items()} for k, v in measured.items()}
        ratios = [ratio(t["torch"], t["pyrl"]) for t in times.values()]
        warm = times["float64", True]
        rows.append(
            [
                name,
                *(f"{1e3 * median(warm[n].cpu):.1f}" for n in ("torch", "pyrl")),
                *(f"{value:.1f}" for value in ratios),
                gate(min(ratios), least=LEAST),
            ]
        )
    head = ["preset", "torch ms", "pyrl ms", "float32", "warm", "float64", "warm", "gate"]
    print(f"{options.tokens} tokens; ms: float64, warm\n")
    print(table(head, rows))


if __name__ == "__main__":
    main()
