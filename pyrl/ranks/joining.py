"""Joining: how the processes of a run start, find each other and end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pyrl.ranks import ALONE, Ranks, RanksError, noticing

HOST = "127.0.0.1"

START = timedelta(minutes=5)
"""For all processes to find each other."""

WAIT = timedelta(days=7)
"""For the leader's next word: scoring may take long. One that has ended is noticed at once."""

END = 20.0
"""Seconds for the others to end by themselves."""


@contextmanager
def joined(command: Sequence[str], processes: int) -> Iterator[Ranks]:
    """This process's place among those of `torchrun`, or among `processes` that run the command.

    Those that it starts end with it. RanksError: torchrun has started another number.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and processes not in (1, size):
        raise RanksError(
            f"processes: expected as many as torchrun has started, {size} (WORLD_SIZE), or no "
            f"--processes, got {processes}"
        )
    if max(size, processes) == 1:
        yield ALONE
        return
    with ExitStack() as ends:
        if size > 1:
            rank, local, here = _place(size)
            dist.init_process_group("gloo", timeout=START)
        else:
            rank, local, size, here = 0, 0, processes, processes
            with socket.create_server((HOST, 0)) as free:
                port = free.getsockname()[1]
            ends.callback(_end, [_start(command, port, place, size) for place in range(1, size)])
            address = f"tcp://{HOST}:{port}"
            dist.init_process_group(
                "gloo", init_method=address, rank=0, world_size=size, timeout=START
            )
        ends.callback(dist.destroy_process_group)
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
        ranks = Ranks(rank, size, local, dist.new_group(timeout=WAIT, backend=_backend()))
        with noticing(_of_connections):
            yield ranks


def _of_connections(error: RuntimeError) -> bool:
    """What FSDP's exchange says when a process has ended, whoever waits for it."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _place(size: int) -> tuple[int, int, int]:
    """Number of this process, its number on this machine, and how many there are here."""
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if missing := [name for name in names if name not in os.environ]:
        raise RanksError(
            f"WORLD_SIZE is {size}: expected torchrun's {', '.join(missing)} beside it; without "
            f"torchrun, --processes starts several processes"
        )
    rank, local, here = (int(os.environ[name]) for name in names)
    return rank, local, here


def _backend() -> str:
    """Objects travel between CPUs, gradients between the devices where they are."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _start(command: Sequence[str], port: int, rank: int, size: int) -> subprocess.Popen[bytes]:
    """Another process of the run, in the environment that torchrun would give it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    address = {"MASTER_ADDR": HOST, "MASTER_PORT": port}
    # This very package, also where the working directory has a folder of its name.
    own = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    given = place | address | {"PYTHONPATH": os.pathsep.join(filter(None, own))}
    environment = os.environ | {name: str(value) for name, value in given.items()}
    return subprocess.Popen([sys.executable, "-P", "-m", "pyrl", *command], env=environment)


def _end(others: Sequence[subprocess.Popen[bytes]]) -> None:
    for other in others:
        try:
            other.wait(END)
        except subprocess.TimeoutExpired:
            other.kill()
            other.wait()


def follow_signals() -> None:
    """Ctrl-C and SIGTERM reach all processes of a job: the leader alone acts on them, and the
    others end when it has."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
