"""Tests of the door in TRL; they run where TRL is installed (docs/hosts.md)."""

import gc
from importlib.util import find_spec

import pytest

if find_spec("trl") is None:
    collect_ignore_glob = ["test_*.py"]
else:

    def pytest_configure(config: pytest.Config) -> None:
        """TRL, and what it imports, warn of many things that are not pyrl's."""
        config.addinivalue_line("filterwarnings", "default")


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """Trainers collect garbage when they start: not among all that has been imported."""
    gc.freeze()
