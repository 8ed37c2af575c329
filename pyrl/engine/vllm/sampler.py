"""Sampler: `pyrl sampler`, which is vLLM's server with pyrl's tap, forks and door in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyrl.engine.vllm.options import VLLMOptions


@dataclass(frozen=True)
class SamplerSettings:
    """Sample for runs on this and other machines: `pyrl train ... --engine vllm --sampler URL`.

    It is `vllm serve` with what pyrl needs in it. A run brings the weights. Whoever reaches the
    port can change them and stop what runs: it belongs into a network that others cannot reach.
    """

    model: str
    """A directory or a Hugging Face id, of the architecture that a run will train."""
    host: str = "127.0.0.1"
    """The address to listen at: this machine's own unless told otherwise."""
    port: int = 8000
    """Where a run finds it: --sampler http://HOST:PORT."""
    max_rows: int = 256
    """Branches that run at the same time; further ones wait."""
    vllm: VLLMOptions = field(default_factory=VLLMOptions)
    """How vLLM runs the model; its element type is float32 unless told otherwise."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 1 << 16:
            raise ValueError(f"port: expected 1 to 65535, got {self.port}")
        if self.max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {self.max_rows}")
        if self.vllm.sampler:
            raise ValueError("sampler: expected none: a sampler samples itself")


def serve(settings: SamplerSettings) -> None:
    """Serve until it is told to stop. EngineError if vLLM is missing or of an unknown release."""
    from pyrl.engine.vllm import core, release
    from pyrl.models import base_location

    options = settings.vllm
    model = str(base_location(settings.model))
    arguments = core.arguments(model, settings.max_rows, options.dtype or "float32", options)
    here = {"host": settings.host, "port": settings.port, "disable_uvicorn_access_log": True}
    release.serve(
        arguments | here,
        core.TAPS,
        core.FORK_COPIES if options.copy_forks else None,
        "pyrl.engine.vllm.door.Door",
    )
