"""vLLM: whether it is installed, in a release that pyrl knows, and loads."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from pyrl.doctor import BROKEN, Finding, told
from pyrl.engine import EngineError


def findings() -> Iterator[Finding]:
    """One line. vLLM is imported, which takes seconds; no model is loaded."""
    try:
        release = import_module("pyrl.engine.vllm.release")
    except EngineError as error:
        value, _, todo = str(error).partition(": ")
        yield Finding("engine vllm", value, todo, needed=False)
    except BROKEN as error:
        todo = "install a vLLM that fits torch and the driver (docs/vllm.md)"
        yield Finding("engine vllm", f"does not load: {told(error)}", todo, needed=False)
    else:
        yield Finding("engine vllm", f"{release.VERSION} loads")
