"""Machine: the compiled part, GPUs, threads, memory and disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

import pyrl
from pyrl.doctor import Finding, told
from pyrl.models.gguf import user_cache

GIB = 1 << 30
LEAST_MEMORY, LEAST_DISK = 2 * GIB, 1 * GIB
"""Torch alone takes half a gigabyte; two checkpoints of half a billion weights take twelve."""

DRIVER = Path("/proc/driver/nvidia/version")
"""It is there where an NVIDIA driver is loaded."""
MEMORY = Path("/proc/meminfo")


def findings() -> Iterator[Finding]:
    """In this order."""
    yield _instruction_set()
    yield _gpus()
    yield _kernels()
    yield _threads()
    yield _memory()
    yield _disk("disk for runs", Path("runs"), "--output", needed=True)
    yield _disk("disk for models", Path(HF_HOME), "HF_HOME", needed=False)
    yield _disk("disk of pyrl", user_cache(), "XDG_CACHE_HOME", needed=False)


def _instruction_set() -> Finding:
    """Which kernels run on this CPU."""
    asked = os.environ.get("PYRL_ISA")
    value = pyrl.build_info()["isa"]
    if asked is None:
        return Finding("instruction set", value)
    todo = "unset PYRL_ISA to use the widest of this CPU"
    return Finding("instruction set", f"{value}, by PYRL_ISA", todo, needed=False)


def _gpus() -> Finding:
    """What torch sees."""
    built = torch.version.cuda
    torch_is = f"torch for CUDA {built}" if built else "torch without CUDA"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(d) for d in range(torch.cuda.device_count())]
        return Finding("GPU", f"{', '.join(names)}; {torch_is}")
    todo = ""
    if DRIVER.exists():
        todo = (
            "update the NVIDIA driver, or install an older torch"
            if built
            else ("install a torch built for CUDA: a GPU's driver is loaded")
        )
    return Finding("GPU", f"none; {torch_is}", todo, needed=False)


def _kernels() -> Finding:
    """Whether pyrl's own CUDA kernels are compiled, and run where there is a GPU."""
    name, built, gpu = "CUDA kernels", pyrl.build_info()["cuda"], torch.cuda.is_available()
    if built is None:
        todo = "install nvcc, then PYRL_CUDA=on pip install . in the source tree" if gpu else ""
        return Finding(name, "not in this build", todo, needed=False)
    if not gpu:
        return Finding(name, f"compiled by nvcc {built}; no GPU to run on")
    try:
        stats = pyrl.token_stats(
            torch.zeros(2, 8, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
        )
        stats.logprob.sum().item()
    except RuntimeError as error:
        todo = "update the driver, or build pyrl with an older nvcc (PYRL_CUDA=off: without)"
        return Finding(name, f"nvcc {built}, do not run: {told(error)}", todo)
    return Finding(name, f"compiled by nvcc {built}, run on the GPU")


def _threads() -> Finding:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    value = f"{threads} on {cores} cores" + (f", OMP_NUM_THREADS={asked}" if asked else "")
    todo = ""
    if threads > cores:
        todo = f"--threads {cores}: more threads than cores wait for each other"
    elif asked and threads < cores:
        todo = f"unset OMP_NUM_THREADS, or --threads {cores}, to use all cores"
    return Finding("threads", value, todo, needed=False)


def _memory() -> Finding:
    """What is left for new processes."""
    found = [line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable")]
    free = int(found[0].split()[1]) << 10
    todo = f"free memory: a run needs {LEAST_MEMORY / GIB:.0f} GiB" if free < LEAST_MEMORY else ""
    return Finding("memory", f"{free / GIB:.1f} GiB free", todo)


def _disk(name: str, path: Path, option: str, *, needed: bool) -> Finding:
    """Free space where a directory is, or will be made; the option chooses another."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    shown = str(path).replace(str(Path.home()), "~", 1)
    free = shutil.disk_usage(there).free
    value = f"{free / GIB:.1f} GiB free for {shown}"
    todo = ""
    if not os.access(there, os.W_OK):
        value, todo = f"{shown} cannot be written", f"choose another place by {option}"
    elif free < LEAST_DISK:
        todo = f"free {LEAST_DISK / GIB:.0f} GiB, or choose another place by {option}"
    return Finding(name, value, todo, needed)
