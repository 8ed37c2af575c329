"""What an update holds in memory, by what trains and in which type.

    OMP_NUM_THREADS=1 python benchmarks/bench_memory.py [--layers 30]

A model of SmolLM2-135M's shape with random weights, one question of 64 tokens, 8 answers of 64 that
share half of it. "peak" is the largest resident memory, beyond what was resident before the model
was made, until after two whole updates: gradient, clipping, optimizer. "recomputed": the same with
--gradient-checkpointing, so that hardly an activation is kept. Each runs in a process of its own.
Exit code 1 if a gate is missed: recomputed, a LoRA of rank 16 takes at most 0.45 of float32, and
weights in bfloat16 at most 0.6 either way.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_tree_step import batch_of, learner_of, model_of
from measure import M_MMAP_THRESHOLD, answer, conditions, gate, in_a_fresh_process, resident, table

from pyrl.learner import Learner
from pyrl.models.lora import LoRA, add_adapter

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"weights": "bfloat16"},
    "LoRA 16, float32": {"lora": LoRA(rank=16)},
    "LoRA 16, bfloat16": {"lora": LoRA(rank=16), "weights": "bfloat16"},
}
GATES = {
    ("bfloat16", "kept"): 0.6,
    ("bfloat16", "recomputed"): 0.6,
    ("LoRA 16, float32", "recomputed"): 0.45,
}


def peak(settings: dict[str, Any], activations: str, layers: int) -> dict[str, int]:
    """Bytes that two updates take, and how many parameters train."""
    # Freed buffers go back at once: holes between those that are kept differ between processes.
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)
    batch = batch_of(32)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = model_of(layers)
    run = replace(learner_of(model_of(1), "tree").run, **settings)
    run = replace(run, gradient_checkpointing=activations == "recomputed")
    if run.weights == "bfloat16":
        model.bfloat16()
    if run.lora.rank is not None:
        add_adapter(model, run.lora, "", seed=0)
    learner = Learner(model, None, run)
    for _ in range(2):
        learner.gradient(batch)
        torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        learner.optimizer.step()
    return {
        "peak": resident("VmHWM") - before,
        "training": sum(p.numel() for p in learner.parameters),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--variant", nargs=2, metavar=("WEIGHTS", "ACTIVATIONS"))
    options = parser.parse_args()
    if options.variant:
        name, activations = options.variant
        answer(peak(VARIANTS[name], activations, options.layers))
        return 0
    print(conditions() + "\n")
    rows, kept, full = [], [], {}
    for name in VARIANTS:
        cells = []
        for how in ("kept", "recomputed"):
            found = in_a_fresh_process(["--layers", str(options.layers), "--variant", name, how])
            share = found["peak"] / full.setdefault(how, found["peak"])
            most = GATES.get((name, how))
            kept.append(most is None or share <= most)
            cells.append(f"{found['peak'] / 1e6:.0f}")
            cells.append(f"{share:.2f}" + (f" ({gate(share, most=most)})" if most else ""))
        rows.append([name, f"{found['training'] / 1e6:.1f}", *cells])
    head = ["weights", "million that train", "peak MB", "of float32"]
    print(table([*head, "recomputed: peak MB", "of float32"], rows))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
