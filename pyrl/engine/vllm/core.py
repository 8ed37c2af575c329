"""vLLM's engine core, in this process or in a separate one that is watched."""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from multiprocessing.pool import ThreadPool
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pyrl.engine import EngineError, EngineFailure
from pyrl.engine.vllm import release
from pyrl.engine.vllm.channel import CHANNEL_RECORDS, Channel, Frame
from pyrl.engine.vllm.memory import shared_folder, write_weights
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.engine.vllm.table import FORK, TAP
from pyrl.logits.sampling import Sampling

_T = TypeVar("_T")

TAPS = ("pyrl.engine.vllm.tap:Tap", "pyrl.engine.vllm.tap:TapV2")
"""For Model Runner V1, and for V2."""
FORK_COPIES = "pyrl.engine.vllm.forks:ForkCopies"
START_SECONDS = 1800.0
"""Limit of a start: loading and compiling a large model takes minutes."""


class Core:
    """An engine core with its channel; closed, or failed, it leaves nothing behind.

    Raises EngineError for a model or an option that vLLM refuses; EngineFailure from every method
    if the engine is in a separate process and that dies or is silent for too long.
    """

    _here: ClassVar[Core | None] = None
    """The open engine of this process: closing it would close the communication groups of another
    one too."""

    def __init__(self, model: str, max_rows: int, dtype: str, options: VLLMOptions) -> None:
        if not options.own_process:
            if Core._here is not None:
                raise EngineError(
                    "vLLM runs one engine in a process: close the other one first, or give this "
                    "one a process of its own (vllm.own_process)"
                )
            Core._here = self
        self._options = options
        self._watch = _Watch() if options.own_process else None
        self._client: Any = None
        self._closed = False
        with ExitStack() as undo, _own_threads():
            undo.callback(self.close)
            config = _configuration(model, max_rows, dtype, options)
            _check_model(model, config, options)
            with _refusing(model):
                self._within(START_SECONDS, lambda: self._launch(config))
            patience = options.step_seconds if options.own_process else 0.0
            owner = os.getpid() if options.own_process else 0
            with shared_folder() as folder:
                self._channel = Channel.create(folder / "channel", CHANNEL_RECORDS)
                self._rpc("pyrl_open", str(folder / "channel"), patience, owner)
            self._try(model)
            undo.pop_all()
            atexit.register(self.close)
        self.max_model_len: int = config.model_config.max_model_len
        self.vocabulary: int = config.model_config.get_vocab_size()
        self.block_size: int = config.cache_config.block_size

    def start(self, sampling: Sampling) -> None:
        """Draw from this distribution from now on."""
        self._rpc("pyrl_sampling", astuple(sampling))

    def add(
        self, name: str, tokens: list[int], max_tokens: int, stop: list[int], extra: dict[str, Any]
    ) -> None:
        """Queue a request."""
        request = release.request(name, tokens, max_tokens, stop, extra)
        self._call(lambda: self._client.add_request(request))

    def abort(self, names: list[str]) -> None:
        """Drop requests, wherever they are."""
        self._call(lambda: self._client.abort_requests(names))

    def outputs(self) -> list[release.EngineCoreOutput]:
        """The outputs of the next step, one for each request that drew a token or ended in it."""
        outputs: list[release.EngineCoreOutput] = self._call(
            lambda: self._client.get_output()
        ).outputs
        return outputs

    def frame(self) -> Frame | None:
        """The oldest frame of drawn tokens that was not read, or None."""
        return self._channel.read()

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, int]:
        """Replace the weights and forget every cached prefix; digests of what arrived."""
        received: dict[str, int]
        if self._watch is None:
            received = self._rpc("pyrl_load", list(weights), version)[0]
        else:
            with shared_folder() as folder:
                file = write_weights(dict(weights), folder / "weights.safetensors")
                received = self._rpc("pyrl_load", str(file), version)[0]
        if not self._call(lambda: self._client.reset_prefix_cache()):
            raise EngineFailure("the prefix cache was not reset: requests still hold its blocks")
        return received

    @property
    def closed(self) -> bool:
        """Whether the engine was closed or has failed, so that every further call raises."""
        return self._closed

    def close(self) -> None:
        """Stop the engine and its processes, also those that hang."""
        atexit.unregister(self.close)
        if Core._here is self:
            Core._here = None
        self._closed = True
        self._shut_down()
        if self._watch is not None:
            self._watch.close()

    def _launch(self, config: release.VllmConfig) -> None:
        self._client = release.launch(config, own_process=self._options.own_process)
        if self._closed:  # the caller gave up waiting
            self._shut_down()

    def _shut_down(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.shutdown(timeout=2.0)

    def _try(self, model: str) -> None:
        """Draw one token: a model may load and not run (no kernel for its head size)."""
        self.add("try", [0], 1, [], {TAP: [-1, 0, 0, 1, []], FORK: ["", 0]})
        with _refusing(model):
            while not self.outputs():
                pass
        self.frame()

    def _rpc(self, method: str, *values: Any) -> list[Any]:
        answers: list[Any] = self._call(
            lambda: self._client.collective_rpc(method, args=values, kwargs={})
        )
        return answers

    def _call(self, function: Callable[[], _T]) -> _T:
        if self._closed:
            raise EngineFailure("the engine is closed, or has failed before")
        return self._within(self._options.step_seconds, function)

    def _within(self, seconds: float, function: Callable[[], _T]) -> _T:
        if self._watch is None:
            return function()
        return self._watch.call(function, seconds)


class _Watch:
    """Calls functions that may never return, on a thread that can be abandoned."""

    def __init__(self) -> None:
        self._thread = ThreadPool(1)  # a daemon: a hung call does not keep Python from ending

    def call(self, function: Callable[[], _T], seconds: float) -> _T:
        try:
            return self._thread.apply_async(function).get(seconds)
        except multiprocessing.TimeoutError:
            raise EngineFailure(f"the engine has not answered for {seconds:g} s") from None
        except release.EngineDeadError as error:
            raise EngineFailure("the engine's process has died; its messages are above") from error

    def close(self) -> None:
        self._thread.terminate()


@contextmanager
def _own_threads() -> Iterator[None]:
    """Keep torch's number of threads: in this process vLLM sets it once, and then for good."""
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


@contextmanager
def _refusing(model: str) -> Iterator[None]:
    """Turn what vLLM raises about a model or an option into an EngineError."""
    try:
        yield
    except EngineFailure:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise EngineError(f"vLLM {release.VERSION} cannot run {model}: {error}") from error


def arguments(model: str, max_rows: int, dtype: str, options: VLLMOptions) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs, which are options of `vllm serve` too."""
    cpu = release.on_cpu()
    gib = options.kv_cache_gib if options.kv_cache_gib or not cpu else 4.0
    return {
        "model": model,
        "dtype": dtype,
        "max_num_seqs": max_rows,
        "max_model_len": options.max_model_len,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": None if gib is None else int(gib * 2**30),
        "tensor_parallel_size": options.tensor_parallel_size,
        "distributed_executor_backend": "uni" if options.tensor_parallel_size == 1 else None,
        "enforce_eager": cpu if options.eager is None else options.eager,
        "block_size": options.block_size or (32 if cpu else None),
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        # A step's tokens are known before the next one is scheduled: forks enter, pruned leave.
        "async_scheduling": False,
        "worker_extension_cls": "pyrl.engine.vllm.worker.WorkerExtension",
        "disable_log_stats": True,
    }


def _configuration(
    model: str, max_rows: int, dtype: str, options: VLLMOptions
) -> release.VllmConfig:
    with _refusing(model):
        return release.configuration(
            arguments(model, max_rows, dtype, options),
            TAPS,
            FORK_COPIES if options.copy_forks else None,
        )


def _check_model(model: str, config: release.VllmConfig, options: VLLMOptions) -> None:
    """EngineError for a model that vLLM loads and that a learner cannot keep up to date."""
    if not options.own_process and release.wraps_transformers(config):
        raise EngineError(
            f"{model}: vLLM {release.VERSION} runs this architecture with the code of "
            "transformers, which it changes for its whole process: give it one of its own "
            "(--vllm.own-process True)"
        )
    if release.keeps_experts(config):
        raise EngineError(
            f"{model}: vLLM {release.VERSION} on a CPU does not compute with new weights of a "
            "mixture of experts: use --engine hf, or a GPU"
        )
