"""Service: the one file that imports the Tinker SDK, in the releases that pyrl is tested with."""

from __future__ import annotations

import asyncio
import atexit
import gc
import warnings
from asyncio import AbstractEventLoop, run_coroutine_threadsafe
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from pyrl.engine import EngineError, EngineFailure
from pyrl.models import model_location
from pyrl.remote.releases import TESTED, tested

ANSWER = 10.0
"""Seconds in which a server must say that it is there."""


class Service:
    """A server, and the model that it has by the run's name."""

    def __init__(self, url: str, model: str, timeout: float) -> None:
        """ImportError: no SDK. EngineError: one that is not tested, a server that does not answer
        or refuses the token, or a model that it does not have."""
        check_sdk()
        check_answers(url)
        import tinker
        from tinker import types

        self.url, self.types, self._timeout = url, types, timeout
        self._error: type[Exception] = tinker.TinkerError
        try:
            self._service = tinker.ServiceClient(base_url=url)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # 0.38 would have another client ask
                told = self._service.get_server_capabilities()
        except self._error as error:
            raise EngineError(f"--tinker: {url}: the server refuses: {error}") from error
        self.name = _name(model, [served.model_name for served in told.supported_models], url)
        """How the server calls the model."""
        self.tells_top = tested_with_top()
        """Samples come with the log-probs of the most probable tokens, if these are asked for."""
        atexit.register(_end, self._service.holder.get_loop())  # and begins a session

    def wait(self, future: Any) -> Any:
        """The result of a request; EngineFailure: there is none."""
        try:
            return future.result(self._timeout)
        except self._error as error:
            raise EngineFailure(f"{self.url}: {error}") from error
        except TimeoutError as error:
            raise EngineFailure(
                f"{self.url}: expected an answer within {self._timeout:g} s (--remote.timeout), "
                f"got none"
            ) from error

    def ready(self, make: Callable[[], Any]) -> Any:
        """The client that a call makes: release 0.25 waits in the call, 0.38 gives a future."""
        try:
            client = make()
        except self._error as error:
            raise EngineFailure(f"{self.url}: {error}") from error
        return self.wait(client) if hasattr(client, "result") else client

    def trainer(self, rank: int, seed: int) -> Any:
        """A client that trains a new adapter."""
        make = self._service.create_lora_training_client
        return self.ready(lambda: make(self.name, rank=rank, seed=seed))

    def trainer_from(self, path: str) -> Any:
        """One that goes on with weights and optimizer where `save_state` has put them."""
        make = self._service.create_training_client_from_state_with_optimizer
        return self.ready(lambda: make(path))

    def untrained(self) -> Any:
        """A client that samples from the model without an adapter."""
        make = self._service.create_sampling_client
        return self.ready(lambda: make(base_model=self.name))

    def told(self, what: str, answer: Any) -> Any:
        """A part of an answer; EngineFailure where the server has left it out."""
        if answer is None:
            raise EngineFailure(f"{self.url}: expected {what} with the answer, got none")
        return answer

    def text(self, tokens: Sequence[int]) -> Any:
        """Token ids as the SDK has them."""
        return self.types.ModelInput.from_ints([*tokens])

    def close(self) -> None:
        """Tell the server that nothing more comes, where the release can."""
        if hasattr(self._service, "close"):
            self.wait(self._service.close("success"))


def check_sdk() -> None:
    """ImportError: there is none; EngineError: pyrl is not tested with this release."""
    if find_spec("tinker") is None:
        raise ImportError("--tinker: the SDK is missing; pip install 'pyrl[tinker]'")
    if not tested(found := version("tinker")):
        raise EngineError(
            f"--tinker: expected a tinker SDK from {TESTED[0]} to {TESTED[1]}, which pyrl was "
            f"tested with, got {found}; pip install tinker=={TESTED[1]}"
        )


def tested_with_top() -> bool:
    """Whether this release of the SDK can ask for the top log-probs of samples."""
    return tuple(map(int, version("tinker").split(".")[:2])) >= (0, 38)


def check_answers(url: str) -> None:
    """EngineError unless somebody answers at this address: the SDK itself would try for minutes."""
    if not url.startswith(("http://", "https://")):
        raise EngineError(f"--tinker: expected an address that begins with http, got {url!r}")
    try:
        with urlopen(f"{url.rstrip('/')}/api/v1/healthz", timeout=ANSWER):
            return
    except HTTPError:
        return  # an answer
    except (URLError, OSError, ValueError) as error:
        raise EngineError(f"--tinker: {url}: no server answers: {error}") from error


def _name(model: str, served: Sequence[str | None], url: str) -> str:
    for name in (model, str(model_location(model))):
        if name in served:
            return name
    has = ", ".join(name for name in served if name)
    raise EngineError(f"model: {url} has {has or 'no model'}, got {model!r}")


def _end(loop: AbstractEventLoop) -> None:
    """End the SDK's thread: one that wakes while the interpreter is taken down ends the process by
    a signal, now and then."""
    gc.collect()  # clients that nobody has any more end what they have begun
    if loop.is_running():
        run_coroutine_threadsafe(_end_tasks(), loop).result(ANSWER)
        loop.call_soon_threadsafe(loop.stop)


async def _end_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
