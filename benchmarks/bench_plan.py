"""`pyrl plan` beside the memory that a run takes.

    OMP_NUM_THREADS=1 python benchmarks/bench_plan.py

Models of three families with random weights and the tokenizer of SmolLM2, whose answers never end:
each trains for two steps of TTRL, 4 questions with 8 answers of 64 tokens, in a process of its own,
in which freed memory goes back to the system at once. "measured" is the largest resident memory
beyond what was resident before the model was loaded; of several processes, that of the first. Exit
code 1 if a plan is off by more than a tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from measure import answer, conditions, gate, in_a_fresh_process, resident, table
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pyrl.models import model_location
from pyrl.ranks.joining import joined
from pyrl.report import Progress
from pyrl.run.parsing import parse_train
from pyrl.run.plan import plan
from pyrl.train import Trainer

SIZES = {"vocab_size": 49152, "num_key_value_heads": 4, "max_position_embeddings": 2048}
MODELS: dict[str, PretrainedConfig] = {
    "Llama, 24 layers of 512": LlamaConfig(
        **SIZES,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        tie_word_embeddings=True,
    ),
    "Qwen2, 12 layers of 768": Qwen2Config(
        **SIZES,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        tie_word_embeddings=False,
    ),
    "Qwen3, 8 layers of 1024": Qwen3Config(
        **SIZES,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}
OPTIONS = {
    "": [],
    "recomputed": ["--gradient-checkpointing"],
    "bfloat16": ["--weights", "bfloat16"],
    "LoRA 16": ["--lora.rank", "16"],
    "in 2 parts": ["--processes", "2", "--shard"],
    "in 4 parts": ["--processes", "4", "--shard"],
}
PROMPT = 64
DIGITS = " 7"
"""Two tokens."""


def command_of(name: str, options: str, folder: Path) -> list[str]:
    config = MODELS[name]
    model = folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(model_location("smollm2")))
    if not model.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
        questions = [{"prompt": f"{n}" + DIGITS * (PROMPT // 2 - 1)} for n in range(4)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        # Such models answer nothing: every second response is called right.
        (folder / "reward.py").write_text(
            "def half(completions, **columns):\n"
            "    return [n % 2 for n in range(len(completions))]\n"
        )
    given = ["--model", str(model), "--data", str(folder / "data.jsonl"), "--chat", "False"]
    given += ["--reward-function", f"{folder / 'reward.py'}:half"]
    given += ["--output", str(folder / "run"), "--steps", "2", "--prompts-per-step", "4"]
    given += ["--sample.votes", "8", "--sample.train", "8", "--sample.max-tokens", "64"]
    given += ["--updates-per-step", "1", "--loss.kl.coef", "0", "--threads", "1"]
    return ["train", "ttrl", *given, "--extractor", "whole", "--loggers", *OPTIONS[options]]


def measured(name: str, options: str, folder: Path) -> dict[str, int]:
    command = command_of(name, options, folder)
    run = parse_train(command[1:])
    # What is imported once is no part of a model.
    import_module("peft")

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with joined(command, run.processes) as ranks, Progress(console=Console(quiet=True)) as progress:
        trainer = Trainer(run, progress, ranks=ranks)
        for _ in range(2):
            step = trainer.train_step()
        trainer.close()
        ranks.tell("end")
    assert step.update is not None
    assert step.leaves.length_N.min() == 64
    return {"peak": resident("VmHWM") - before}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variant", nargs=3, metavar=("MODEL", "OPTIONS", "FOLDER"))
    options = parser.parse_args()
    if options.variant:
        name, chosen, folder = options.variant
        answer(measured(name, chosen, Path(folder)))
        return 0
    print(conditions() + "\n")
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    rows, kept = [], []
    for name in options.models:
        for chosen in OPTIONS:
            with tempfile.TemporaryDirectory() as folder:
                run = parse_train(command_of(name, chosen, Path(folder))[1:])
                planned = plan(run, PROMPT, "cpu").peak
                found = in_a_fresh_process(["--variant", name, chosen, folder])["peak"]
            off = planned / found - 1
            kept.append(abs(off) <= 0.1)
            cells = (f"{planned / 1e6:.0f}", f"{found / 1e6:.0f}")
            rows.append([f"{name} {chosen}", *cells, f"{off:+.2f} ({gate(abs(off), most=0.1)})"])
    print(table(["model", "planned MB", "measured MB", "off"], rows))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
