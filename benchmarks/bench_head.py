"""An update from hidden states beside one from whole logits: time, and memory by the vocabulary.

    OMP_NUM_THREADS=1 python benchmarks/bench_head.py [--layers 30]

Time: the gradient of the rows of `bench_tree_step.py` on a model of SmolLM2-135M's shape, in turn:
the learner makes a pass's logits in chunks, or all of them at once. Memory: Llamas of 4 layers of
256 with random weights and 32,000 or 151,936 columns, 32 rows of 512 tokens in one pass; the peak
of a gradient beside the weights, in a process of its own. Exit code 1 if a gate is missed: chunks
cost at most 3 % over whole logits, and with them the larger vocabulary takes at most 1.15 of the
smaller one's memory.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import torch
from bench_tree_step import SHARED, batch_of, learner_of, model_of
from measure import (
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
from transformers import LlamaConfig, LlamaForCausalLM

from pyrl.learner import Learner, reader
from pyrl.pack import TokenBatch, pack_given

SMALL = {"chunks": -1, "whole": 1 << 60}
"""Bytes of a pass's logits above which the learner makes them in chunks."""
COLUMNS = (32_000, 151_936)
ROWS, PROMPT, ANSWER = 32, 32, 480


def variant(learner: Learner, batch: TokenBatch, how: str) -> Variant:
    prepare = partial(setattr, reader, "SMALL_LOGITS", SMALL[how])
    return Variant(partial(learner.gradient, batch), prepare)


def wide(columns: int) -> Variant:
    """One pass of 16,384 tokens over a small model with so many columns."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=columns,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=ROWS * (PROMPT + ANSWER),
        tie_word_embeddings=True,
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, columns, (ROWS, PROMPT + ANSWER))
    batch = pack_given(list(tokens[:, :PROMPT]), list(tokens[:, PROMPT:]))
    batch = replace(
        batch,
        mask_T=np.ones(ROWS * ANSWER, np.bool_),
        old_logprob_T=np.full(ROWS * ANSWER, -10.8, np.float32),
        advantage_T=rng.normal(size=ROWS * ANSWER),
    )
    return variant(learner_of(LlamaForCausalLM(config), "tree"), batch, "chunks")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="COLUMNS", help="of one pass in chunks")
    options = parser.parse_args()
    if options.memory:
        answer({"bytes": extra_memory(wide(options.memory))})
        return 0
    print(conditions() + "\n")
    rows, kept = [], []
    model = model_of(options.layers)
    for name, shared in SHARED.items():
        learner, batch = learner_of(model, "tree"), batch_of(shared)
        times = interleaved({how: variant(learner, batch, how) for how in SMALL}, options.rounds)
        cost = ratio(times["chunks"], times["whole"])
        kept.append(cost <= 1.03)
        seconds = (f"{median(times[how].cpu):.2f}" for how in SMALL)
        rows.append([name, *seconds, f"{cost:.2f} ({gate(cost, most=1.03)})"])
    print(table(["rows share", "chunks s", "whole logits s", "chunks/whole"], rows) + "\n")
    memory = [in_a_fresh_process(["--memory", str(n)])["bytes"] for n in COLUMNS]
    growth = memory[1] / memory[0]
    kept.append(growth <= 1.15)
    sizes = (f"{size / 1e6:.0f}" for size in memory)
    rows = [["chunks", *sizes, f"{growth:.2f} ({gate(growth, most=1.15)})"]]
    print(table(["logits", *(f"MB, {n:,} columns" for n in COLUMNS), "larger/smaller"], rows))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
