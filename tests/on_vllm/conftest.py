"""Tests of the vLLM engine; they run where vLLM is installed (docs/vllm.md)."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from small_llama import Small

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:

    def pytest_configure(config: pytest.Config) -> None:
        """vLLM, and what it imports, warn of many things that are not pyrl's."""
        config.addinivalue_line("filterwarnings", "default")

    @pytest.fixture(scope="module")
    def small(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Small]":
        """One engine in this process for all tests of a file, and the model that it runs."""
        from small_llama import Small, small_llama

        torch.set_num_threads(1)
        folder: Path = tmp_path_factory.mktemp("small")
        made = Small(small_llama(), folder)
        yield made
        made.engine.close()
