"""A model of what a step costs on many GPUs, and its check by small measurements.

    python benchmarks/scale.py                            # the tables of docs/scale.md, in a moment
    OMP_NUM_THREADS=1 python benchmarks/scale.py measure  # the check, on this machine, in a minute

A step is sampled, learned and carried to the engines; each part takes as long as the slowest of
what it needs: arithmetic, memory, links, and the one process that grows the trees.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyrl.engine import Branches
from pyrl.engine.hf import HFEngine
from pyrl.engine.sync import Copied
from pyrl.logits.sampling import Sampling


@dataclass(frozen=True)
class Hardware:
    """One device and its links, in units a second."""

    flops: float
    """Of dense products."""
    memory: float
    """Bytes from its own memory."""
    inside: float
    """Bytes one way to the devices of its machine."""
    across: float
    """Bytes one way to another machine, for each device."""
    room: float
    """Bytes that it holds."""


# NVIDIA's data sheets: H100 and H200 SXM, 989 TFLOP/s of bf16 without sparsity, NVLink 900 GB/s
# both ways together; HBM 3.35 TB/s and 80 GB, 4.8 TB/s and 141 GB. DGX H100 and H200: a ConnectX-7
# port of 400 Gb/s for each GPU.
H100 = Hardware(989e12, 3.35e12, 450e9, 50e9, 80e9)
H200 = Hardware(989e12, 4.8e12, 450e9, 50e9, 141e9)

REACHED = {"flops": 0.4, "memory": 0.6, "links": 0.7}
"""Shares of the data sheet's numbers that programs reach: assumed, not measured here."""
HOST = 20e-6
"""Seconds of the process that grows the trees, for each sampled token: measured, 12 to 26
(docs/benchmarks.md, rollout on vLLM)."""
LAUNCH = 1e-3
"""Seconds between two steps of an engine, whatever its batch: assumed."""
MACHINE = 8
"""GPUs of a machine."""


@dataclass(frozen=True)
class Model:
    """What matters of a decoder's shape."""

    parameters: float
    layers: int
    key_heads: int
    head_size: int = 128

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in bfloat16."""
        return 2 * 2 * self.layers * self.key_heads * self.head_size


MODELS = {
    "1.5B": Model(1.5e9, 28, 2),
    "7B": Model(7.6e9, 28, 4),
    "32B": Model(32.5e9, 64, 8),
    "70B": Model(70.6e9, 80, 8),
}
"""As Qwen2.5 has them, and Llama 3 the last."""


@dataclass(frozen=True)
class Work:
    """What a step samples and learns."""

    questions: int = 128
    votes: int = 16
    prompt: int = 512
    mean: int = 2048
    """Tokens of a response."""
    longest: int = 8192
    """Tokens of the longest one, for which a synchronous step waits."""
    sampled: float = 0.72
    """Sampled tokens, as a share of those of flat groups: measured of trees by ETMR's rule."""
    read: float = 0.6
    """Tokens that the learner reads, as a share of those of all rows: prompts are read once."""

    @property
    def tokens(self) -> float:
        """Sampled in a step."""
        return self.questions * self.votes * self.mean * self.sampled

    @property
    def learned(self) -> float:
        """Read in a pass over the step."""
        return self.questions * self.votes * (self.mean + self.prompt) * self.read


def held(trained: float, frozen: float = 0.0) -> float:
    """Bytes for so many parameters at float32 with AdamW (docs/guide.md, bytes a parameter)."""
    return 16 * trained + 4 * frozen


def group(model: Model, gpu: Hardware) -> int:
    """GPUs that hold one sampler, a power of two: weights in bfloat16 in half of their memory."""
    count = 1
    while 2 * model.parameters > 0.5 * gpu.room * count:
        count *= 2
    return count


def sampling(model: Model, work: Work, gpu: Hardware, gpus: int) -> tuple[float, str]:
    """Seconds until the last response of a step has ended, and what bounds them: of samplers of
    one GPU or more, as is fastest."""
    least, sizes = group(model, gpu), (1, 2, 4, 8, 16)
    fitting = [n for n in sizes if least <= n <= max(least, min(gpus, MACHINE))]
    return min(_sampling(model, work, gpu, gpus, size) for size in fitting)


def _sampling(model: Model, work: Work, gpu: Hardware, gpus: int, size: int) -> tuple[float, str]:
    copies = max(1, gpus // size)
    branches = work.questions * work.votes / copies
    context = work.prompt + work.mean / 2
    room = size * gpu.room * 0.85 - 2 * model.parameters
    rows = min(branches, max(1.0, room / (context * model.token_bytes)))
    weights = 2 * model.parameters / (size * gpu.memory * REACHED["memory"])
    cache = rows * context * model.token_bytes / (size * gpu.memory * REACHED["memory"])
    arithmetic = 2 * model.parameters * rows / (size * gpu.flops * REACHED["flops"])
    each = {
        "weights from memory": weights + cache if weights >= cache else 0.0,
        "keys and values from memory": weights + cache if cache > weights else 0.0,
        "arithmetic": arithmetic,
        "trees of one process": HOST * rows * copies,
    }
    bound = max(each, key=lambda name: each[name])
    steps = work.tokens / copies / rows
    alone = LAUNCH + weights
    many = (each[bound] + LAUNCH) * steps
    # The tail: few branches are left, and a step costs what the weights do.
    few = max(0.0, work.longest - steps) * alone
    return many + few, bound if many > few else "the longest response"


def learning(model: Model, work: Work, gpu: Hardware, gpus: int) -> tuple[float, str]:
    """Seconds of an update with every GPU's share of the weights gathered for each pass."""
    share = gpus * gpu.flops * REACHED["flops"]
    arithmetic = 6 * model.parameters * work.learned / share
    if gpus == 1:
        return arithmetic, "arithmetic"
    link = (gpu.inside if gpus <= MACHINE else gpu.across) * REACHED["links"]
    passes = max(1.0, work.learned / gpus / 16_384)
    # Gathered for the forward and the backward pass, and a gradient that is summed and scattered.
    carried = 3 * 2 * model.parameters * passes / link
    return (arithmetic, "arithmetic") if arithmetic > carried else (carried, "links")


def carrying(model: Model, gpu: Hardware, gpus: int) -> float:
    """Seconds of a sync: all weights in bfloat16 to every sampler, in a ring."""
    if gpus == 1:
        return 2 * 2 * model.parameters / (gpu.memory * REACHED["memory"])
    link = (gpu.inside if gpus <= MACHINE else gpu.across) * REACHED["links"]
    return 2 * model.parameters / (link * min(gpus, group(model, gpu)))


@dataclass(frozen=True)
class Split:
    """A step that is sampled ahead: some GPUs sample, the others learn."""

    samplers: int
    seconds: float
    idle: float
    """Share of the step in which the learner waits."""


def ahead(model: Model, work: Work, gpu: Hardware, gpus: int) -> Split | None:
    """The fastest split; None where there are too few GPUs for both."""
    found = []
    for samplers in sorted({group(model, gpu) << n for n in range(10)} | {gpus * 3 // 4}):
        learners = gpus - samplers
        if samplers < group(model, gpu) or learners * gpu.room < held(model.parameters):
            continue
        seconds = sampling(model, work, gpu, samplers)[0]
        own = learning(model, work, gpu, learners)[0] + carrying(model, gpu, gpus)
        found.append(Split(samplers, max(seconds, own), max(0.0, 1 - own / max(seconds, own))))
    return min(found, key=lambda split: (round(split.seconds), split.idle), default=None)


def tables(work: Work, gpu: Hardware) -> None:
    """The tables of docs/scale.md."""
    print("| model | GPUs | sampling (s) | bound by | update (s) | bound by | sync (s) ", end="")
    print("| step (s) | ahead (s) | samplers | gain | idle |")
    print("|---|---:|---:|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for name, model in MODELS.items():
        for gpus in (1, 8, 64, 512):
            if held(model.parameters) > gpus * gpu.room:
                print(f"| {name} | {gpus} | does not fit |" + " |" * 9)
                continue
            sample, limit = sampling(model, work, gpu, gpus)
            update, other = learning(model, work, gpu, gpus)
            sync = carrying(model, gpu, gpus)
            whole = sample + update + sync
            split = ahead(model, work, gpu, gpus)
            after = ["", "", "", ""]
            if split is not None:
                gain = f"{whole / split.seconds:.2f}"
                after = [f"{split.seconds:.0f}", str(split.samplers), gain, f"{split.idle:.0%}"]
            cells = [name, gpus, f"{sample:.0f}", limit, f"{update:.1f}", other, f"{sync:.2f}"]
            print(f"| {' | '.join(map(str, [*cells, f'{whole:.0f}', *after]))} |")
    print(
        "\n| model | float32 (GB) | H200 at least | bfloat16 (GB) | LoRA on float32 (GB) ", end=""
    )
    print("| copy of --ahead, hf (GB) |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, model in MODELS.items():
        size = model.parameters / 1e9
        least = -(-held(model.parameters) // gpu.room)
        cells = [f"{16 * size:.0f}", f"{least:.0f}", f"{8 * size:.0f}", f"{4 * size:.0f}"]
        print(f"| {name} | {' | '.join([*cells, f'{4 * size:.0f}'])} |")


def llama(layers: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def seconds(call: Callable[[], object], rounds: int = 2) -> float:
    """Of the processor, the median after one call that is not timed."""
    times = []
    for _ in range(rounds + 1):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return median(times[1:])


def measured(model: LlamaForCausalLM, rows: int, tokens: int) -> dict[str, float]:
    """Seconds of an update over so many tokens, of a pass without a gradient, of a decode step of
    so many rows, and of a sync to a copy."""
    id_BT = torch.arange(tokens).view(4, -1) % 8000

    def forward() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=id_BT, use_cache=False).logits
        return logits.float().logsumexp(-1).mean()

    def update() -> None:
        model.zero_grad()
        torch.autograd.backward(forward())

    engine = HFEngine(model, [0], max_rows=rows)
    engine.start(Sampling())
    prompt = np.arange(1, 33, dtype=np.int32)
    many = np.arange(rows)
    branch: Any = many.astype(np.int64)
    limit = np.full(rows, 1000)
    zeros = np.zeros(rows, np.int64)
    engine.submit(Branches([prompt], zeros, branch, many.astype(np.uint64), limit))
    found = {"update": seconds(update), "pass": seconds(torch.no_grad()(forward))}
    found["decode step"] = seconds(engine.step, 8)
    engine.abort(branch)
    copy = Copied(engine, model, llama(model.config.num_hidden_layers, model.config.hidden_size))
    return found | {"sync": seconds(lambda: copy(1))}


def predicted(
    rates: Mapping[str, float], body: float, all_: float, rows: int, tokens: int
) -> dict[str, float]:
    """The same by the model's formulas."""
    return {
        "update": 6 * body * tokens / rates["update"],
        "pass": 2 * body * tokens / rates["pass"],
        "decode step": max(4 * body / rates["memory"], 2 * body * rows / rates["pass"]),
        "sync": 4 * all_ / rates["copy"],
    }


def sizes(model: LlamaForCausalLM) -> tuple[float, float]:
    """Parameters that a token meets, and all."""
    everything = sum(p.numel() for p in model.parameters())
    return everything - model.get_input_embeddings().weight.numel(), everything


def check() -> None:
    """Rates from one small model, and what they say of others."""
    first = llama(4, 512)
    body, all_ = sizes(first)
    small = measured(first, 64, 1024)
    lone = measured(first, 1, 1024)["decode step"]
    rates = {
        "update": 6 * body * 1024 / small["update"],
        "pass": 2 * body * 1024 / small["pass"],
        "memory": 4 * body / lone,
        "copy": 4 * all_ / small["sync"],
    }
    print(", ".join(f"{name} {rate / 1e9:.1f} G/s" for name, rate in rates.items()), "\n")
    print("| layers x width | M parameters | rows | tokens | part | predicted (ms) ", end="")
    print("| measured (ms) | ratio |\n|---|---:|---:|---:|---|---:|---:|---:|")
    cases: Sequence[tuple[int, int, int, int]] = [(4, 256, 64, 1024), (12, 512, 4, 2048)]
    for layers, width, rows, tokens in cases:
        model = llama(layers, width)
        own, whole = sizes(model)
        found = measured(model, rows, tokens)
        for part, guess in predicted(rates, own, whole, rows, tokens).items():
            cells = [f"{layers} x {width}", f"{whole / 1e6:.0f}", rows, tokens, part]
            cells += [
                f"{1e3 * guess:.1f}",
                f"{1e3 * found[part]:.1f}",
                f"{guess / found[part]:.2f}",
            ]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["tables", "measure"], default="tables")
    parser.add_argument("--gpu", choices=["h100", "h200"], default="h200")
    options = parser.parse_args()
    if options.what == "measure":
        check()
    else:
        tables(Work(), {"h100": H100, "h200": H200}[options.gpu])


if __name__ == "__main__":
    main()
