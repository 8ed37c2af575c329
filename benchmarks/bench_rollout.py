"""Tokens per second of HFEngine and of transformers' generate, and what forks save.

    python benchmarks/bench_rollout.py

Flat: `--samples` responses to one prompt of 40 tokens, temperature 1, no end token, so that both
sides draw equally many tokens. Rounds alternate between the two; the gate is the median of the
rounds' ratios, in CPU time, which a busy machine distorts less than the time of day. Each round of
HFEngine starts cold: it prefills, and packs the weights as it must after each training step.
Tree: trunks and two rounds of forks in the manner of ETMR (arXiv:2508.11356).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from transformers import PreTrainedModel

from pyrl.engine import Branches, Sampling, Work
from pyrl.engine.hf import HFEngine
from pyrl.models import load_model

GATE = 1.3
TEXT = "Question: a farmer has twelve sheep and buys nine more, then sells five of them. "
PROMPT_TOKENS = 40


def flat(prompt: np.ndarray, samples: int, limit: int, *, retain: bool = False) -> Branches:
    return Branches(
        prompts=[prompt],
        prompt_B=np.zeros(samples, np.int64),
        branch_B=np.arange(samples),
        seed_B=np.arange(samples).astype(np.uint64),
        limit_B=np.full(samples, limit),
        retain=retain,
    )


def run(engine: HFEngine) -> int:
    tokens = 0
    while (count := engine.step().branch_B.size) > 0:
        tokens += count
    return tokens


class Clock:
    """Seconds since it was made: of this process's CPU time, and of the day."""

    def __init__(self) -> None:
        self._start = self._now()

    def seconds(self) -> np.ndarray:
        return self._now() - self._start

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.process_time(), time.perf_counter()])


def engine_seconds(
    model: PreTrainedModel, prompt: np.ndarray, samples: int, limit: int
) -> np.ndarray:
    clock = Clock()
    engine = HFEngine(model, eos=[])
    engine.start(Sampling())
    engine.submit(flat(prompt, samples, limit))
    if run(engine) != samples * limit:
        raise RuntimeError(f"expected {samples * limit} tokens")
    return clock.seconds()


def generate_seconds(
    model: PreTrainedModel, prompt: np.ndarray, samples: int, limit: int
) -> np.ndarray:
    ids = torch.from_numpy(prompt).long()[None]
    clock = Clock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=samples,
        max_new_tokens=limit,
        eos_token_id=None,
        pad_token_id=0,
    )
    if out.shape != (samples, ids.shape[1] + limit):
        raise RuntimeError(f"expected {samples} x {limit} tokens, got {tuple(out.shape)}")
    return clock.seconds()


def tree_work(model: PreTrainedModel, prompt: np.ndarray, limit: int) -> tuple[Work, int]:
    """Work of 4 trunks and 2 rounds of 2 forks at 2 positions each; leaves."""
    engine = HFEngine(model, eos=[])
    engine.start(Sampling())
    engine.submit(flat(prompt, 4, limit, retain=True))
    run(engine)
    rng = np.random.default_rng(0)
    leaves, newest = 4, [0, 1, 2, 3]
    for _ in range(2):
        opened = []
        for parent in newest:
            for keep in rng.integers(1, limit, 2).tolist():
                ids = np.arange(leaves, leaves + 2)
                engine.fork(parent, keep, ids, ids.astype(np.uint64))
                opened += ids.tolist()
                leaves += 2
        run(engine)
        newest = rng.choice(opened, 4, replace=False).tolist()
    return engine.work(), leaves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, tokenizer = load_model(options.model)
    theirs, _ = load_model(options.model)
    prompt = np.array((tokenizer(TEXT * 8)["input_ids"])[:PROMPT_TOKENS], np.int32)
    size = options.samples, options.tokens
    engine_seconds(ours, prompt, 2, 2)
    generate_seconds(theirs, prompt, 2, 2)

    print(f"{options.model}, {size[0]} x {size[1]} tokens, prompt {len(prompt)}, ", end="")
    print(f"{options.threads} thread(s), float32")
    print("tokens per second of CPU time (of the day)")
    print("| round | HFEngine | generate | ratio |\n|---|---|---|---|")
    ratios = []
    for i in range(options.rounds):
        mine = size[0] * size[1] / engine_seconds(ours, prompt, *size)
        others = size[0] * size[1] / generate_seconds(theirs, prompt, *size)
        ratios.append(mine[0] / others[0])
        cells = [f"{cpu:.1f} ({day:.1f})" for cpu, day in (mine, others, mine / others)]
        print(f"| {i + 1} | " + " | ".join(cells) + " |", flush=True)
    ratio = statistics.median(ratios)
    verdict = "pass" if ratio >= GATE else "FAIL"
    print(f"median ratio {ratio:.2f}, gate {GATE}: {verdict}\n")

    work, leaves = tree_work(ours, prompt, 16)
    computed = work.prompt_tokens + work.decode_tokens
    print(f"tree of {leaves} leaves x 16 tokens: {work}")
    print(f"computed {computed} of {computed + work.copied_tokens} forward tokens without sharing")
    return 0 if ratio >= GATE else 1


if __name__ == "__main__":
    sys.exit(main())
