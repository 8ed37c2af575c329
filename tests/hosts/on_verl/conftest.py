"""Tests of the adapters for verl; they run where verl is installed (docs/hosts.md)."""

from importlib.util import find_spec

import pytest

if find_spec("verl") is None:
    collect_ignore_glob = ["test_*.py"]
else:

    def pytest_configure(config: pytest.Config) -> None:
        """verl, and what it imports, warn of many things that are not pyrl's."""
        config.addinivalue_line("filterwarnings", "default")
