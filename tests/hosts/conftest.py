"""Tests of the doors in other trainers; those of a host run where it is installed."""

import gc
from importlib.util import find_spec

import pytest

HOSTS = ("trl", "verl", "openrlhf")

collect_ignore_glob = [f"test_{host}_*.py" for host in HOSTS if find_spec(host) is None]
if find_spec("peft") is None:
    collect_ignore_glob += ["test_*_peft.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Hosts, and what they import, warn of many things that are not pyrl's."""
    if any(map(find_spec, HOSTS)):
        config.addinivalue_line("filterwarnings", "default")


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """Trainers collect garbage when they start: not among all that has been imported."""
    gc.freeze()
