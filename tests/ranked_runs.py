"""The processes of one run, as torchrun starts them, and what they should leave."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from pyrl import cli

STEPS = 5
ROUNDING = 1e-6
"""Of float32 weights after these steps: gradients are sums in another order."""


@dataclass
class Job:
    """The ranks of a run."""

    ranks: list[Any]
    said: list[Path]

    def end(self) -> list[int]:
        """Wait for all of them; their exit codes."""
        for rank in self.ranks:
            rank.join(60)
        return [rank.exitcode for rank in self.ranks]

    def wait_for(self, path: Path) -> None:
        """Until the run has written it."""
        while not path.exists():
            assert self.ranks[0].is_alive(), self.said[0].read_text()
            time.sleep(0.005)


def start_job(
    context: Any, said: Path, commands: Sequence[list[str]], folders: Sequence[Path] = ()
) -> Job:
    """One rank for each command, in the folder of its own if there is one."""
    job = Job([], [said / str(rank) for rank in range(len(commands))])
    for rank, (place, command) in enumerate(zip(places(len(commands)), commands, strict=True)):
        where = (job.said[rank], folders[rank] if folders else said)
        process = context.Process(target=rank_main, args=(command, place, *where))
        process.start()
        job.ranks.append(process)
    return job


def places(size: int) -> list[dict[str, str]]:
    """The environment that torchrun gives each process on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [address | sizes | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)]


def rank_main(command: list[str], place: dict[str, str], said: Path, folder: Path) -> None:
    os.environ.update(place)
    os.chdir(folder)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        cli.main(command)


def weights(found: dict[str, Any]) -> NDArray[np.float64]:
    return flat(found["model.safetensors"])


def flat(file: bytes) -> NDArray[np.float64]:
    """All numbers of a file of tensors."""
    tensors = load(file)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


def numbers(row: dict[str, float | None]) -> dict[str, float]:
    """Of a step, without that of tokens that passes read again: there are more passes."""
    found = {name: math.nan if value is None else value for name, value in row.items()}
    return found | {"pack/repeated": 0.0}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights and all numbers of two runs are the same, up to rounding."""
    distance = np.linalg.norm(weights(found) - weights(expected))
    assert distance <= ROUNDING * np.linalg.norm(weights(expected))
    for row, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-4, abs=1e-5, nan_ok=True)
    assert found["completions"] == expected["completions"]
    assert found["report"]["evaluations"] == expected["report"]["evaluations"]
