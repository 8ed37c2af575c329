"""Tests of the Tinker protocol; they run where its SDK and the extra `serve` are installed."""

from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.version import Version

if TYPE_CHECKING:
    from tinker_server import Server

if find_spec("tinker") is None or find_spec("starlette") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore = []
    if find_spec("tinker_cookbook") is None:
        collect_ignore.append("test_serve_recipes.py")
    if Version(version("tinker")) < Version("0.38"):
        collect_ignore.append("test_serve_alternatives.py")

    def pytest_configure(config: pytest.Config) -> None:
        """The SDK warns of names that it renames from release to release, and leaves its
        connections to the end of the process."""
        config.addinivalue_line("filterwarnings", "default")
        config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")


@pytest.fixture(scope="session", autouse=True)
def event_loop_of_the_sdk() -> Iterator[None]:
    """Ends the thread that the SDK leaves running: one that wakes while the interpreter is being
    taken down ends the process by SIGABRT, now and then."""
    yield
    from tinker.lib import internal_client_holder

    loop = internal_client_holder._internal_client_holder_thread_singleton
    if loop._thread is not None:
        loop.get_loop().call_soon_threadsafe(loop.get_loop().stop)
        loop._thread.join(30)
        assert not loop._thread.is_alive()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    from tinker_server import Server

    with Server(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def output(server: "Server") -> Path:
    return server.output
