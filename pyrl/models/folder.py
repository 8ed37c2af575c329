"""Folder: what a directory must have to be loaded as a model, or as an adapter of one."""

from __future__ import annotations

import json
from pathlib import Path

from pyrl.models.loading import ModelError

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

ADAPTER = "adapter_config.json"
"""What makes a directory an adapter."""


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


def adapter_base(path: Path) -> str | None:
    """What the adapter in a directory was trained on; None: the directory has no adapter.

    ModelError: its file does not say.
    """
    file = path / ADAPTER
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_bytes())["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{file}: expected the settings of an adapter: {error}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{file}: expected the base model in base_model_name_or_path, got {base!r}"
        )
    return base


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
