"""How benchmarks measure: variants in turn in one process, medians of per-round ratios."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

WARM_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""glibc keeps freed memory: large buffers cost page faults once and not on every call."""


M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: larger buffers are mapped one by one."""


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Variant:
    run: Callable[[], object]
    prepare: Callable[[], None] = nothing
    """Untimed, before each run: restores what the run before it overwrote."""


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    cpu: list[float]
    wall: list[float]


def interleaved(variants: Mapping[str, Variant], rounds: int) -> dict[str, Times]:
    """Round after round of all variants, after one untimed round."""
    times = {name: Times([], []) for name in variants}
    for timed in [False] + [True] * rounds:
        for name, variant in variants.items():
            variant.prepare()
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            variant.run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if timed:
                times[name].cpu.append(cpu)
                times[name].wall.append(wall)
    return times


def ratio(slower: Times, faster: Times) -> float:
    """Median over rounds of the ratio of CPU times."""
    return median(s / f for s, f in zip(slower.cpu, faster.cpu, strict=True))


def memory_loops(megabytes: int = 256) -> dict[str, tuple[Variant, int]]:
    """The fastest library loops that read and that update a large array, and the bytes they move.

    Run in turn with what they are compared with, they give the bandwidth of that moment.
    """
    values = torch.ones(megabytes << 18)
    array = values.numpy()
    read = (values.sum, values.amax, values.norm, array.max)
    update = (values.neg_, lambda: values.mul_(-1), lambda: np.negative(array, out=array))
    return {
        "read": (Variant(min(read, key=_seconds)), values.nbytes),
        "update": (Variant(min(update, key=_seconds)), 2 * values.nbytes),
    }


def _seconds(function: Callable[[], object]) -> float:
    """The least of a few runs."""
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def extra_memory(variant: Variant) -> int:
    """Largest resident memory (bytes) of a second run beyond what was resident before it.

    Freed buffers go back to the system at once: else holes between them count, which differ from
    process to process.
    """
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)
    variant.prepare()
    variant.run()
    variant.prepare()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    variant.run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status: expected a line {field}, got none")
    return int(found[1]) << 10


def in_a_fresh_process(arguments: Sequence[str], *, warm: bool = False) -> Any:
    """What this script, run with other arguments, passes to `answer`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(WARM_MALLOC if warm else {})}
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def answer(result: Mapping[str, object]) -> None:
    """Print what `in_a_fresh_process` reads."""
    print(json.dumps(result, default=asdict))


def conditions() -> str:
    """Machine, versions and commit, and a warning where other work disturbs the measurement."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    model = re.search(r"model name\s*:\s*(.*)", lines)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = f"\n\n**Load {load:.1f} on {cores} cores: not a measurement to keep.**" * (load > cores)
    return (
        f"{model[1] if model else platform.machine()}, {cores} cores, one thread; "
        f"torch {torch.__version__}; commit {commit}; load {load:.1f}{busy}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    columns = list(zip(head, *rows, strict=True))
    width = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, width, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|".join(["", "-" * (width[0] + 2), *("-" * (w + 1) + ":" for w in width[1:]), ""])
    return "\n".join([line(head), rule, *map(line, rows)])


def gate(value: float, *, least: float | None = None, most: float | None = None) -> str:
    """What was promised, and whether it holds."""
    if least is not None:
        return f">= {least:g} {'ok' if value >= least else 'MISSED'}"
    return f"<= {most:g} {'ok' if most is not None and value <= most else 'MISSED'}"
