"""An engine that is not there: what to install is said."""

import sys

import numpy as np
import pytest
from driven_engine import llama

from pyrl.engine import EngineError
from pyrl.engine.launch import ENGINES, Request


def hide_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without vLLM."""
    import importlib.metadata

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for name in ("release", "core", "engine", "tap"):
        monkeypatch.delitem(sys.modules, f"pyrl.engine.vllm.{name}", raising=False)


def test_launch_without_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_vllm(monkeypatch)
    with pytest.raises(EngineError, match=r'vLLM is not installed: pip install "pyrl\[vllm\]"'):
        ENGINES["vllm"](
            Request(
                model=llama(),
                source="nowhere",
                eos=[2],
                max_rows=4,
                dtype="float32",
                probe_T=np.zeros(4, np.int32),
            )
        )
