"""Plan: what a run will hold in memory, from the model's configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedModel

from pyrl._core.tree import PackedTree, pack_rows
from pyrl.attention import Layout, use_pyrl_attention
from pyrl.engine.kv_cache import Prefill
from pyrl.engine.packed_linear import SMALLEST
from pyrl.learner.adamw import CHUNK
from pyrl.learner.reader import LARGE_LOGITS, SMALL_LOGITS
from pyrl.learner.recompute import layers
from pyrl.logits.lm_head import chunk_rows
from pyrl.loss.fused import is_local
from pyrl.models import load_config
from pyrl.models.lora import LoRA, add_adapter
from pyrl.run.config import Run

Parts = Mapping[str, int]

SLACK = 0.065
"""What a process holds beyond its tensors, as a share of them: 4 to 12 % were measured on a CPU
(benchmarks/bench_plan.py)."""


@dataclass(frozen=True)
class Plan:
    """Bytes by part: what is there always, and in each phase of a step."""

    always: Parts
    phases: Mapping[str, Parts]
    tokens: int
    """Tokens of a step that train at most, where nothing but questions is shared."""
    pass_tokens: int
    """Of these, in a pass of the learner."""

    def bytes_of(self, phase: str) -> int:
        """All that is there in a phase, with what the allocator takes beside it."""
        parts = sum(self.always.values()) + sum(self.phases[phase].values())
        return round(parts * (1 + SLACK))

    @property
    def peak(self) -> int:
        return max(map(self.bytes_of, self.phases))


def plan(run: Run, prompt_tokens: int, device: str) -> Plan:
    """What a run with the `hf` engine takes whose questions have so many tokens.

    Nothing is loaded: the model is made without memory, and passes through it are traced for what
    they keep. `device`: "cpu" or "cuda". ModelError, ValueError or OSError for a model or an
    adapter that cannot be.
    """
    with FakeTensorMode():
        return _plan(run, prompt_tokens, device)


def _plan(run: Run, prompt_tokens: int, device: str) -> Plan:
    model, sample = _without_memory(run), run.algorithm.sample
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    parts = run.processes if run.shard else 1
    weights, gradients = _bytes(parameters), ceil(_bytes(trained) / parts)
    always = {"weights": ceil(weights / parts), "optimizer": 2 * gradients}
    if run.algorithm.has_reference and run.lora.rank is None:
        always["reference model"] = always["weights"]
    if device == "cpu" and run.weights == "float32" and not run.shard:
        always["weights in the sampler's layout"] = sum(
            4 * m.weight.numel()
            for m in model.modules()
            if type(m) is nn.Linear and m.weight.numel() >= SMALLEST
        )
    if run.ahead:
        always["weights of the engine"] = gradients
        if device == "cpu":  # beside a GPU they are in the host's memory
            always["weights of the last sync"] = gradients
    length = prompt_tokens + sample.max_tokens
    prompts = 1 if run.pack == "tree" else sample.train
    tokens = run.prompts_per_step * (prompts * prompt_tokens + sample.train * sample.max_tokens)
    update = tokens // min(run.algorithm.updates_per_step, run.prompts_per_step)
    update = ceil(update / run.processes)
    asked = min(run.tokens_per_pass, update)
    rows = _rows(run, prompt_tokens, asked)
    head = model.get_output_embeddings().weight
    pass_tokens = len(rows.input_J)
    # The head's gradient comes first, while all is still kept; further passes find all gradients.
    beside = gradients if asked < update else _bytes([head] if head.requires_grad else [])
    branches = min(run.max_rows, ceil(run.prompts_per_step / run.processes) * sample.votes)
    largest = ceil(max(p.numel() for p in trained) / parts)
    if trained[0].dtype == torch.bfloat16:  # stepped in chunks
        largest = min(CHUNK, largest)
    return Plan(
        always,
        {
            "sampling": ({"all weights": weights} if run.shard else {})
            | {
                "keys and values": branches * length * _cached(model),
                "logits of a draw": branches * head.shape[0] * head.dtype.itemsize,
            },
            "gradient": (_gathered(model) if run.shard else {})
            | {
                "gradients": beside,
                "activations": _activations(model, run, rows),
                "logits": _logits(run, head, len(rows.label_U), device),
            },
            "optimizer": {
                "gradients": gradients,
                # A GPU updates all parameters at the same time, a CPU one after the other.
                "temporaries": gradients if device == "cuda" else 8 * largest,
            },
        },
        tokens,
        pass_tokens,
    )


LESS: dict[str, dict[str, Any]] = {
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--weights bfloat16": {"weights": "bfloat16"},
    "--lora.rank 16": {"lora": LoRA(rank=16)},
}
"""What makes a run smaller, by the options that say so; each on top of those before it."""


def smaller(run: Run, prompt_tokens: int, device: str) -> dict[str, Plan]:
    """Plans of smaller runs, by what was added to the settings."""
    least = prompt_tokens + run.algorithm.sample.max_tokens
    rows = max(1, min(run.max_rows, run.algorithm.sample.votes))
    steps = {f"--tokens-per-pass {least}": {"tokens_per_pass": least}}
    steps |= {f"--max-rows {rows}": {"max_rows": rows}}
    steps |= {"--shard": {"shard": True}} if run.processes > 1 else {}
    steps |= LESS
    plans = {}
    for options, settings in steps.items():
        if any(getattr(run, name) != value for name, value in settings.items()):
            run = replace(run, **settings)
            plans[options] = plan(run, prompt_tokens, device)
    return plans


def _gathered(model: PreTrainedModel) -> dict[str, int]:
    """What a pass has in whole of a model in parts: all that is in no layer, a layer, and the next
    one, which is on its way; the gradients of the same."""
    inside = [list(layer.parameters()) for layer in layers(model)]
    known = {id(parameter) for layer in inside for parameter in layer}
    held = [parameter for parameter in model.parameters() if id(parameter) not in known]
    held += 2 * max(inside, key=_bytes, default=[])
    return {
        "gathered weights": _bytes(held),
        "their gradients": _bytes(parameter for parameter in held if parameter.requires_grad),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def _without_memory(run: Run) -> PreTrainedModel:
    """The model as it will train, on a CPU that holds nothing (within a FakeTensorMode)."""
    config = load_config(run.model)
    # peft moves its layers about, which a fake tensor does not bear: they are made before.
    with unset_fake_temporarily(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if run.weights == "bfloat16" else torch.float32
        )
        if run.lora.rank is not None:
            add_adapter(model, run.lora, run.model, run.seed)
    use_pyrl_attention(model)
    faked: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight not in faked:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                faked[weight] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            module.register_parameter(name, faked[weight])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


def _logits(run: Run, head: nn.Parameter, tokens: int, device: str) -> int:
    """Bytes of the logits that lie in memory at a time, and of what sums the head's gradient."""
    vocabulary, width = head.shape
    size = 2 if "bfloat16" in (run.dtype, run.weights) else 4
    whole = tokens * vocabulary * size
    if whole <= SMALL_LOGITS:
        return whole
    if not is_local(run.algorithm.loss):
        return min(whole, LARGE_LOGITS)
    chunk = chunk_rows(tokens, vocabulary, width, size, device) * vocabulary * size
    sums = 4 * head.numel() if size == 2 and head.requires_grad else 0
    return chunk + sums + (size * head.numel() if run.dtype == "bfloat16" else 0)


def _activations(model: PreTrainedModel, run: Run, rows: PackedTree) -> int:
    """Bytes that the backward pass over these rows needs, beside the weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()._cdata
        if memory not in weights:
            kept[memory] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=run.dtype == "bfloat16"),
    ):
        _forward(model, Layout.of_tree(rows))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    if not run.gradient_checkpointing:
        return size
    text = model.config.get_text_config()
    layers: int = text.num_hidden_layers
    inputs: int = layers * len(rows.input_J) * text.hidden_size * model.dtype.itemsize
    return size // layers + inputs


def _rows(run: Run, prompt_tokens: int, tokens: int) -> PackedTree:
    """Questions with answers that share nothing else, until there are so many tokens to read."""
    sample, rows, read = run.algorithm.sample, list[NDArray[np.int32]](), 0
    while read < tokens:
        question, answer = divmod(len(rows), sample.train)
        prompt = np.full(prompt_tokens, 2 * question, np.int32)
        rows.append(np.concatenate([prompt, np.full(sample.max_tokens, 2 * answer + 1, np.int32)]))
        read += sample.max_tokens + prompt_tokens * (answer == 0 or run.pack == "flat")
    offset_N1 = np.cumsum([0, *map(len, rows)])
    prompts_N = np.full(len(rows), prompt_tokens)
    return pack_rows(np.concatenate(rows), offset_N1, prompts_N, run.pack == "tree")


def _cached(model: PreTrainedModel) -> int:
    """Bytes of keys, values and the hidden state of a token."""
    cache, tokens = Prefill(), 16
    hidden = _forward(model, Layout.of_rows(np.array([tokens])), cache)
    (prefix,) = cache.prefixes(hidden, [0, tokens])
    return _bytes(prefix) // tokens


def _forward(model: PreTrainedModel, layout: Layout, cache: Prefill | None = None) -> Tensor:
    tokens = len(layout)
    hidden: Tensor = model.get_decoder()(
        input_ids=torch.zeros(1, tokens, dtype=torch.long),
        position_ids=torch.arange(tokens)[None],
        # The layout says who sees whom; a mask of four axes is taken as it is.
        attention_mask=torch.empty(1, 1, 1, 1),
        layout=layout,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return hidden


@dataclass(frozen=True)
class Room:
    """What is asked of a plan, beside the settings of the run."""

    gpu: float | None = None
    """Gigabytes (10^9 bytes) of the GPU; None: the run is on a CPU."""
    prompt_tokens: int = 256
    """Tokens of a question with all that stands before it."""

    def __post_init__(self) -> None:
        if self.gpu is not None and not self.gpu > 0:
            raise ValueError(f"gpu: expected gigabytes > 0, got {self.gpu}")
        if self.prompt_tokens < 1:
            raise ValueError(f"prompt_tokens: expected at least 1, got {self.prompt_tokens}")

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else "cuda"

    def fits(self, found: Plan) -> bool | None:
        """None: nobody has said how much there is."""
        return None if self.gpu is None else found.peak <= self.gpu * 1e9


def shown(run: Run, room: Room) -> tuple[Table, Table | None]:
    """The plan of a run by part, and what would make it smaller: None where it fits."""
    found = plan(run, room.prompt_tokens, room.device)
    title = (
        f"{run.method} on {run.model} (GB)\n{found.tokens:,} tokens train in a step, "
        f"{found.pass_tokens:,} in a pass"
    )
    table = Table(title=title)
    for column in ("part", *found.phases):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, size in found.always.items():
        table.add_row(name, *[_gigabytes(size)] * len(found.phases))
    for name in dict.fromkeys(name for part in found.phases.values() for name in part):
        sizes = [part.get(name) for part in found.phases.values()]
        table.add_row(name, *("" if size is None else _gigabytes(size) for size in sizes))
    sums = map(found.bytes_of, found.phases)
    table.add_row(f"together, and {SLACK:.1%} beside", *map(_gigabytes, sums), style="bold")
    if room.fits(found):
        return table, None
    less = Table(title="smaller" if room.gpu is None else f"does not fit in {room.gpu:g} GB")
    for column in ("with, and all above", "peak (GB)", *([] if room.gpu is None else ["fits"])):
        less.add_column(column)
    for options, other in smaller(run, room.prompt_tokens, room.device).items():
        fits = [] if room.gpu is None else ["yes" if room.fits(other) else "no"]
        less.add_row(options, _gigabytes(other.peak), *fits)
    return table, less


def too_large(run: Run, error: torch.OutOfMemoryError) -> str:
    """What torch says of a GPU without memory, beside what the plan says of the run."""
    room = Room(gpu=1.0)
    peak = plan(run, room.prompt_tokens, room.device).peak
    said = str(error).partition(". GPU")[0]
    return (
        f"{said}: expected a GPU with {_gigabytes(peak)} GB for this run by `pyrl plan` (with "
        f"questions of {room.prompt_tokens} tokens), which also says by which options it is smaller"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"
