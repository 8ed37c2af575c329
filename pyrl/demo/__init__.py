"""The embedded default: a small transformer that sorts digits, and questions too long for it."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Directory of the packaged base model, for `AutoModelForCausalLM.from_pretrained`."""

QUESTIONS: dict[str, Path] = {
    name: MODEL.parent / f"{name}.jsonl" for name in ("train", "heldout", "length18")
}
"""Packaged question files: 15 to 17 digits to learn from, others of 15 to 17, and 18 digits."""
