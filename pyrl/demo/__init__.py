"""The embedded default: a small transformer that sorts digits, and questions longer than it learned."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

MODEL = Path(str(files("pyrl.demo") / "model"))
"""Directory of the packaged base model, for `AutoModelForCausalLM.from_pretrained`."""

QUESTIONS: dict[str, Path] = {
    name: MODEL.parent / f"{name}.jsonl" for name in ("train", "heldout", "length18")
}
"""Packaged question files: lengths 15 to 17 to learn from, others of the same lengths, length 18."""
