"""Options: the settings of the vLLM engine."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from tyro.conf import arg

ADDRESS = re.compile(r"https?://[^/:@\s]+:\d+/?")
"""Where a sampler listens."""


@dataclass(frozen=True)
class VLLMOptions:
    """How vLLM runs the model; read when `engine` is "vllm"."""

    sampler: Annotated[tuple[str, ...], arg(aliases=["--sampler"])] = ()
    """Samplers on this or other machines, each http://HOST:PORT of a `pyrl sampler`, in the place
    of a vLLM here."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and cache in the engine; None: as the learner computes."""
    own_process: bool = False
    """Sample in a separate process, which is watched: if it dies or hangs it is started again with
    the current weights, and every unfinished branch goes on where it was."""
    max_model_len: int | None = None
    """Tokens of prompt and response at most; None: as many as the model has positions."""
    gpu_memory_utilization: float = 0.45
    """Share of a GPU's memory that weights and cache may take; the learner needs the rest."""
    kv_cache_gib: float | None = None
    """Memory of the cache; None: what gpu_memory_utilization leaves, on a CPU 4 GiB."""
    block_size: int | None = None
    """Tokens in a block of the cache; None: as vLLM chooses, on a CPU 32."""
    copy_forks: bool = True
    """Copy the part of its last block that a fork shares, where it is still cached; otherwise, and
    with a vLLM before 0.30, a fork computes it again."""
    tensor_parallel_size: int = 1
    """GPUs that share each layer; above 1 it needs own_process."""
    eager: bool | None = None
    """Run the model without torch.compile and CUDA graphs; None: only on a CPU, where compiling
    takes two minutes."""
    step_seconds: float = 300.0
    """With own_process or samplers: an engine that is silent for longer counts as hung."""
    restarts: int = 2
    """With own_process: restarts in a row, without a token between them, before the run ends; with
    samplers: attempts in a row to reach a lost one again before the others go on without it."""

    def __post_init__(self) -> None:
        positive = ("max_model_len", "kv_cache_gib", "block_size", "tensor_parallel_size")
        values = vars(self)
        for name in (*positive, "step_seconds"):
            if values[name] is not None and not values[name] > 0:
                raise ValueError(f"vllm.{name}: expected > 0, got {values[name]}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                "vllm.gpu_memory_utilization: expected a share in (0, 1], "
                f"got {self.gpu_memory_utilization}"
            )
        if self.restarts < 0:
            raise ValueError(f"vllm.restarts: expected >= 0, got {self.restarts}")
        if self.sampler:
            self._check_sampler()
        if self.tensor_parallel_size > 1 and not self.own_process:
            raise ValueError(
                f"vllm.tensor_parallel_size={self.tensor_parallel_size} needs vllm.own_process"
            )

    def _check_sampler(self) -> None:
        """ValueError for an address that is none, or an option that a sampler has been given."""
        for url in self.sampler:
            if not ADDRESS.fullmatch(url):
                raise ValueError(f"sampler: expected http://HOST:PORT, got {url}")
        if len({*self.sampler}) < len(self.sampler):
            raise ValueError(f"sampler: expected each once, got {' '.join(self.sampler)}")
        ours = ("sampler", "step_seconds", "restarts")
        for option in fields(self):
            if option.name not in ours and vars(self)[option.name] != option.default:
                raise ValueError(
                    f"vllm.{option.name}: expected to be given to `pyrl sampler`, not beside "
                    f"--sampler, got {vars(self)[option.name]}"
                )
