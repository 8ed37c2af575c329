"""Terms of a mini-batch, preset by preset, beside a training step of a model on as many tokens.

    python benchmarks/bench_loss_terms.py [--tokens 1000000] [--rounds 5] [--presets hapo siren]

One thread. The step is forward and backward of a Llama of 135 million parameters (the shape of
SmolLM2-135M, random weights) on a short row, taken times the number of tokens: less than any step
takes, since longer rows cost more attention.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median

import torch
from bench_policy_loss import LENGTH, STATE, columns
from measure import Variant, conditions, gate, interleaved, table
from policy_loss_peers import GROUP
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyrl.loss.loss import Loss
from pyrl.loss.presets import PRESETS
from pyrl.loss.terms import loss_terms

ROW = 256
"""Tokens of the model's row."""
MOST = 0.01
"""Largest share of a step that the terms may take."""


def step_seconds(rounds: int) -> float:
    """Time of a step for each of its tokens."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    token_BT = torch.arange(ROW)[None]
    run = Variant(lambda: model(input_ids=token_BT, labels=token_BT).loss.backward())
    return median(interleaved({"step": run}, rounds)["step"].cpu) / ROW


def terms(loss: Loss, columns_T: dict[str, Tensor]) -> object:
    leaves = len(columns_T["advantage_T"]) // LENGTH
    return loss_terms(
        loss,
        columns_T,
        offset_N1=torch.arange(leaves + 1) * LENGTH,
        group_N=torch.arange(leaves) // GROUP,
        state=STATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    step = step_seconds(options.rounds) * options.tokens
    columns_T = {k: v.detach().flatten() for k, v in columns(options.tokens, torch.float64).items()}
    losses = {name: PRESETS[name]() for name in options.presets}
    variants = {n: Variant(partial(terms, loss, columns_T)) for n, loss in losses.items()}
    measured = interleaved(variants, options.rounds)
    rows = []
    for name, times in measured.items():
        seconds = median(times.cpu)
        share = seconds / step
        rows.append([name, f"{1e3 * seconds:.1f}", f"{share:.4%}", gate(share, most=MOST)])
    print(conditions(), end="\n\n")
    print(f"{options.tokens} tokens of float64; a step: {step:.0f} s\n")
    print(table(["preset", "terms ms", "of a step", "gate"], rows))


if __name__ == "__main__":
    main()
