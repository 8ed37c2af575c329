"""Settings of `pyrl serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ServeSettings:
    """Serve a model to clients of the Tinker protocol: they sample, and train adapters of it."""

    model: str
    """"demo", "smollm2", a directory, a .gguf file, or a Hugging Face id."""
    host: str = "127.0.0.1"
    """The address to listen at: this machine's own unless told otherwise."""
    port: int = 8000
    """0: any that is free."""
    token: str | None = None
    """What clients give as their API key; it begins with "tml-", as the SDK wants it. None: one is
    drawn and shown."""
    output: Path = Path("served")
    """Where saved weights are: OUTPUT/MODEL/weights/NAME is an adapter that pyrl and transformers
    load."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the served model's weights."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""
    max_rows: int = 64
    """Samples that are drawn at the same time; further ones wait."""
    max_models: int = 16
    """Models that clients train at the same time."""
    tokens_per_pass: int = 16_384
    """Tokens that training reads at the same time; fewer need less memory."""
    seed: int = 0
    """Of adapters and samples for which a client names none."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_models", "tokens_per_pass"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name}: expected at least 1, got {vars(self)[name]}")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}")
        if self.token is not None and not self.token.startswith("tml-"):
            raise ValueError("token: expected one that begins with 'tml-', as the SDK wants it")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
