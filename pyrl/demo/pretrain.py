"""Train the embedded default's base model from scratch: it learns to sort up to about 14 digits.

`python -m pyrl.demo.pretrain --seed 0 --output DIR` takes about a minute on one core and gives the
same weights each time on the same machine; seed 0 made the packaged ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyrl.demo.task import build_tokenizer, draw_questions, solve
from pyrl.models.loading import quiet_progress

IGNORE = -100
"""Label of a position that does not train; torch's cross entropy skips it."""


@dataclass(frozen=True)
class Pretraining:
    """Lengths, optimizer and schedule; it stops early, with the lengths above 14 half learned."""

    lengths: tuple[int, ...] = tuple(range(2, 17))
    weights: tuple[float, ...] = (1.0,) * 9 + (0.05,) * 6
    batch: int = 128
    steps: int = 280
    learning_rate: float = 1e-3
    warmup: int = 100
    period: int = 400
    """Steps of half a cosine; `steps` ends before it."""

    def factor(self, step: int) -> float:
        """Multiplies the learning rate at this step (0-based)."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.period))
        return min(1.0, (step + 1) / self.warmup) * max(0.05, cosine)


def build_model(seed: int) -> LlamaForCausalLM:
    """A fresh model of 335,424 parameters; projections into the residual stream start smaller."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    residual = 0.02 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, residual if into_residual else 0.02)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def draw_batch(rng: np.random.Generator, recipe: Pretraining) -> tuple[Tensor, Tensor]:
    """Input ids and labels [B, T], padded on the right; only the answer and its end train."""
    tokenizer = build_tokenizer()
    weights = np.array(recipe.weights)
    longest = 2 * max(recipe.lengths) + 2
    input_BT = torch.full((recipe.batch, longest), tokenizer.pad_token_id)
    label_BT = torch.full_like(input_BT, IGNORE)
    lengths_B = rng.choice(recipe.lengths, recipe.batch, p=weights / weights.sum())
    for row, length in enumerate(lengths_B):
        (question,) = draw_questions(rng, int(length), 1)
        ids = [*tokenizer(question + solve(question)).input_ids, tokenizer.eos_token_id]
        input_BT[row, : len(ids)] = torch.tensor(ids)
        label_BT[row, length + 1 : len(ids)] = input_BT[row, length + 1 : len(ids)]
    return input_BT, label_BT


def pretrain(model: LlamaForCausalLM, seed: int, recipe: Pretraining) -> Iterator[float]:
    """Train `model` in place on fresh examples; yields the loss of each step (nats per token)."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.factor)
    model.train()
    for _ in range(recipe.steps):
        input_BT, label_BT = draw_batch(rng, recipe)
        loss = model(input_ids=input_BT, labels=label_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()
    model.eval()


@torch.no_grad()
def greedy_accuracy(model: PreTrainedModel, questions: Sequence[str]) -> float:
    """Fraction of questions (all of one length) that greedy decoding answers exactly."""
    tokenizer = build_tokenizer()
    input_BT = tokenizer(list(questions), return_tensors="pt").input_ids
    output_BT = model.generate(
        input_BT,
        attention_mask=torch.ones_like(input_BT),
        max_new_tokens=input_BT.shape[1] + 2,
        do_sample=False,
    )
    answers = tokenizer.batch_decode(output_BT[:, input_BT.shape[1] :], skip_special_tokens=True)
    return float(np.mean([a == solve(q) for a, q in zip(answers, questions, strict=True)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pyrl.demo.pretrain", description=__doc__)
    parser.add_argument("--seed", type=int, required=True, help="of the weights and the examples")
    parser.add_argument("--output", type=Path, required=True, help="directory for the model")
    parser.add_argument("--steps", type=int, default=Pretraining.steps)
    options = parser.parse_args(arguments)
    # One thread: sums in another order would give other weights.
    torch.set_num_threads(1)
    model = build_model(options.seed)
    for step, loss in enumerate(pretrain(model, options.seed, Pretraining(steps=options.steps))):
        if step % 10 == 0:
            print(f"step {step}: {loss:.3f} nats per token", flush=True)
    with quiet_progress():
        model.save_pretrained(options.output)
    build_tokenizer().save_pretrained(options.output)
    rng = np.random.default_rng([options.seed, 1])
    for length in range(12, 19):
        accuracy = greedy_accuracy(model, draw_questions(rng, length, 200))
        print(f"length {length}: greedy {accuracy:.3f}")


if __name__ == "__main__":
    main()
