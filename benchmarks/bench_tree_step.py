"""One update on trees, on flat rows and on padded ones, by how much the rows share.

    OMP_NUM_THREADS=1 python benchmarks/bench_tree_step.py [--layers 30]

A model of SmolLM2-135M's shape with random weights, one question of 64 tokens, 8 answers of 64, of
which more or less begin alike; float32, one backward pass each, in turn. "share" is the part of the
flat rows' tokens that a tree does not read. Padded: a forward pass of transformers over [8, 128]
with a mask, and statistics of the same tokens. Each begins with the memory that others freed given
back. Extra memory is the peak of a second pass beside the model and its gradients, in a process of
its own. Exit code 1 if a gate is missed: the tree's
gain is at least 0.85 of the ratio of tokens, it never costs more than 3 % and never more memory.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyrl.attention import plain_attention
from pyrl.learner import Learner
from pyrl.logits.token_stats import token_stats
from pyrl.methods import METHODS
from pyrl.pack import TokenBatch, pack_given
from pyrl.run.config import Run

PROMPT, ANSWERS, ANSWER = 64, 8, 64
SHARED = {"nothing": None, "the prompt": 0, "half of the answer": 32, "most of it": 60}
"""What the rows have in common, and how many tokens of the answer that is."""


def model_of(layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batch_of(shared: int | None) -> TokenBatch:
    """Rows of random tokens; log-probs that no policy reported, since nothing is checked here."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 49152, PROMPT)
    trunk = rng.integers(0, 49152, shared or 0)
    prompts, answers = [], []
    for n in range(ANSWERS):
        own = rng.integers(0, 49152, ANSWER - len(trunk))
        own[0] = n  # no two answers go on alike
        prompts.append(rng.integers(0, 49152, PROMPT) if shared is None else prompt)
        answers.append(np.concatenate([trunk, own]))
    batch = pack_given(prompts, answers)
    tokens = len(batch.label_T)
    return replace(
        batch,
        mask_T=np.ones(tokens, np.bool_),
        old_logprob_T=np.full(tokens, -10.8, np.float32),
        advantage_T=rng.normal(size=tokens),
    )


def learner_of(model: PreTrainedModel, how: str) -> Learner:
    algorithm = METHODS["grpo"]()
    algorithm = replace(
        algorithm, loss=replace(algorithm.loss, kl=replace(algorithm.loss.kl, coef=0))
    )
    return Learner(model, None, Run("", "", "grpo", algorithm, Path("runs"), pack=how))


def padded(learner: Learner, batch: TokenBatch) -> None:
    """The same loss from padded rows; all have one length, so that nothing is lost to padding."""
    model, length = learner.model, PROMPT + ANSWER
    input_NL = torch.from_numpy(batch.input_I).reshape(ANSWERS, length)
    with plain_attention(model):
        model.set_attn_implementation("sdpa")
        hidden = model.get_decoder()(
            input_ids=input_NL, attention_mask=torch.ones_like(input_NL), use_cache=False
        ).last_hidden_state
    logits_TV = model.get_output_embeddings()(hidden[:, PROMPT - 1 : -1].flatten(0, 1))
    stats = token_stats(logits_TV, torch.from_numpy(batch.label_T), 1.0, inplace=True)
    weight_T = torch.from_numpy(batch.advantage_T) / len(batch.label_T)
    (-(stats.logprob - stats.logprob.detach()).exp() * weight_T).sum().backward()


def variants(layers: int, shared: int | None) -> dict[str, Variant]:
    model, batch = model_of(layers), batch_of(shared)
    learners = {how: learner_of(model, how) for how in ("tree", "flat")}
    runs: dict[str, Callable[[], object]] = {
        how: partial(learner.gradient, batch) for how, learner in learners.items()
    }
    runs["padded"] = lambda: padded(learners["flat"], batch)

    def begin() -> None:
        """The gradients' pages go back: which variant finds them must not depend on the turn."""
        model.zero_grad()
        ctypes.CDLL("libc.so.6").malloc_trim(0)

    return {name: Variant(run, begin) for name, run in runs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("SHARED", "HOW"), help="of one pass")
    options = parser.parse_args()
    if options.memory:
        name, how = options.memory
        answer({"bytes": extra_memory(variants(options.layers, SHARED[name])[how])})
        return 0
    print(conditions() + "\n")
    rows, kept = [], []
    for name, shared in SHARED.items():
        made = variants(options.layers, shared)
        times = interleaved(made, options.rounds)
        learner = learner_of(model_of(1), "tree")
        list(learner.reader.passes(batch_of(shared)))
        read = learner.reader.metrics()
        tokens = read["pack/tokens"] / read["pack/unique"]
        gain = ratio(times["flat"], times["tree"])
        least = 0.97 if shared is None else 0.85 * tokens
        memory = {
            how: in_a_fresh_process(
                ["--layers", str(options.layers), "--memory", name, how], warm=False
            )["bytes"]
            for how in made
        }
        kept += [gain >= least, memory["tree"] <= 1.01 * memory["flat"]]
        rows.append(
            [
                name,
                f"{1 - 1 / tokens:.2f}",
                f"{tokens:.2f}",
                *(f"{median(times[how].cpu):.2f}" for how in made),
                f"{gain:.2f} ({gate(gain, least=round(least, 2))})",
                *(f"{memory[how] / 1e6:.0f}" for how in made),
            ]
        )
    head = ["rows share", "share", "tokens flat/tree", "tree s", "flat s", "padded s", "flat/tree"]
    print(table([*head, "tree MB", "flat MB", "padded MB"], rows))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
