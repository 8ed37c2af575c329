"""Builds csrc/*.cu for the CPU (tests/cpp/cuda_on_cpu) and puts its kernels in the core's place."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from pyrl import _core
from pyrl.logits import sample_tokens

SOURCE = Path(__file__).parent / "cpp" / "cuda_on_cpu"
DEVICE = 1
"""Where the tensors are said to be; the caller's current device is 0."""

KERNELS = ("token_stats", "token_stats_grad", "policy_loss_cuda", "fused_loss", "sample_rows")


@functools.cache
def load() -> ModuleType:
    """The module, of the folder in PYRL_CUDA_ON_CPU or built now; skips the test without tools."""
    folder = Path(os.environ.get("PYRL_CUDA_ON_CPU", "") or _build())
    (path,) = folder.glob("cuda_on_cpu.*.so")
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build() -> Path:
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"the kernels are compiled here, which needs {tool}")
    pytest.importorskip("pybind11")
    folder = SOURCE.parents[2] / "build" / "cuda_on_cpu"
    arguments = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_COMPILER=g++"]
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(folder), *arguments],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Wing:
    """A module of the core with the CUDA kernels in the place of the CPU's."""

    def __init__(self, core: ModuleType) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in KERNELS:
            return cast("Callable[..., Any]", getattr(self._core, name))
        kernel = getattr(load(), name)
        return lambda **arguments: kernel(**{**arguments, "device": DEVICE})


def in_place_of_the_core() -> Iterator[None]:
    """To be a fixture: what pyrl computes from logits, it computes with the CUDA kernels."""
    load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_core, "logits", Wing(_core.logits))
        patch.setattr(_core, "loss", Wing(_core.loss))
        patch.setattr("pyrl.loss.kernels.has_kernel", lambda device: True)
        patch.setattr(sample_tokens, "_sample_kernel", sample_tokens.sample_rows)
        yield
