"""What trees without replacement cost on the host, beside the decode steps of an engine.

    OMP_NUM_THREADS=1 python benchmarks/bench_without_replacement.py

64 questions of the demo with 16 leaves each: up to 1024 running branches on the demo's model, the
smallest that there is, so that the shares are the largest. "rule" is the call of the law in C++,
"host" it and all that follows: the forest's forks and prunes, the engine's queues and budgets. CPU
time, sums over a rollout, medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from pyrl.demo.run import MAX_TOKENS
from pyrl.engine.hf import HFEngine
from pyrl.fork import WithoutReplacement
from pyrl.logits.sampling import Sampling
from pyrl.models import load_model
from pyrl.prompts import load_prompts
from pyrl.prune import Keep
from pyrl.rollout import Rollout

GATE = 0.05
"""The rule's share of a decode step at most."""


class Clock:
    """CPU seconds in some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.process_time()
            result = call(*arguments)
            self.seconds += time.process_time() - started
            return result

        return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--votes", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model("demo")
    prompts = load_prompts(
        "demo:train", tokenizer, max_tokens=64, chat=False, limit=options.questions
    )
    found = []
    for seed in range(options.rounds):
        engine = HFEngine(model, [tokenizer.eos_token_id], max_rows=1024)
        run = Rollout(
            engine,
            [prompt.tokens for prompt in prompts],
            votes=options.votes,
            limit=MAX_TOKENS,
            sampling=Sampling(options.temperature),
            fork=WithoutReplacement(),
            prune=Keep(),
            signals=None,
            seed=seed,
        )
        assert run.law is not None
        steps, host, rule = Clock(), Clock(), Clock()
        engine.step = steps.timed(engine.step)
        run._follow = host.timed(run._follow)
        run.law.grow = rule.timed(run.law.grow)
        run.run()
        found.append((steps.seconds, host.seconds, rule.seconds, run.counts.siblings))
    step, host_s, rule_s, siblings = (
        statistics.median(values) for values in zip(*found, strict=True)
    )
    verdict = "ok" if rule_s <= GATE * step else "MISSED"
    print("| steps (s) | host (s) | rule (s) | siblings | host / steps | rule / steps (gate) |")
    print("|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {step:.3f} | {host_s:.3f} | {rule_s:.4f} | {siblings:.0f} | {host_s / step:.3f} "
        f"| {rule_s / step:.4f} (≤ {GATE} {verdict}) |"
    )
    return verdict != "ok"


if __name__ == "__main__":
    sys.exit(main())
