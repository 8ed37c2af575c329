"""Memory: folders in it, and files of weights, by which processes of one machine share them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder in memory (where /dev/shm is missing: a temporary one) for another process.

    It exists while the other process opens or reads the files in it. Memory that stays mapped is
    freed with the processes, however they end.
    """
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="pyrl-", dir=memory) as folder:
        yield Path(folder)


def write_weights(weights: dict[str, Tensor], path: Path) -> Path:
    """A file of weights; tied weights are written under each of their names."""
    save_file({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, path)
    return path
