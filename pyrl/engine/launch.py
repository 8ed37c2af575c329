"""Launch: the engines by name, and how the learner's weights reach each of them.

An engine from outside the package is one more entry of `ENGINES`, made before a run is read.
Importing this file imports no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyrl.engine import Dtype, Engine, EngineError
from pyrl.engine.vllm.options import VLLMOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """What a run tells the function that launches its engine."""

    model: PreTrainedModel
    """The learner's, whose policy is to be sampled."""
    source: str
    """Where it was loaded from: what `pyrl.models.load_model` takes."""
    eos: Collection[int]
    """Token ids that end a response."""
    max_rows: int
    """Branches that run at the same time; further ones wait."""
    dtype: Dtype
    """What the learner computes in."""
    probe_T: NDArray[np.int32]
    """Token ids of some question, for a probe after each sync."""
    gather: Callable[[], None] | None = None
    """Brings the model's weights together where each process has a part of them; None: it has all.
    An engine that shares them calls it before it uses them."""
    vllm: VLLMOptions = field(default_factory=VLLMOptions)
    ahead: bool = False
    """The engine samples while the learner updates, so that it needs weights of its own."""


Carry = Callable[[int], dict[str, float]]
"""Brings an engine the learner's weights as they are now, under a new version; metrics of that."""


def hf(request: Request) -> tuple[Engine, Carry]:
    """transformers, with the learner's own weights; ahead of the learner with a copy of those that
    train. EngineError beside samplers."""
    from pyrl.engine.hf import HFEngine
    from pyrl.engine.sync import Copied, Shared

    if request.vllm.sampler:
        raise EngineError("sampler: expected with --engine vllm, got it with hf")
    if request.ahead:
        frozen = {id(p): p for p in request.model.parameters() if not p.requires_grad}
        copy = deepcopy(request.model, frozen)
        beside = HFEngine(copy, request.eos, max_rows=request.max_rows)
        return beside, Copied(beside, request.model, copy)
    engine = HFEngine(request.model, request.eos, max_rows=request.max_rows, gather=request.gather)
    return engine, Shared(engine)


def vllm(request: Request) -> tuple[Engine, Carry]:
    """vLLM, which reads the model's configuration where the model was loaded from; or samplers.

    Raises EngineError if vLLM is not installed, is a release that pyrl does not know, cannot run
    the model, or has loaded one with another vocabulary; or for a sampler that does not fit.
    """
    from pyrl.engine.sync import Sync
    from pyrl.engine.vllm.engine import VLLMEngine
    from pyrl.engine.vllm.served import ServedEngine
    from pyrl.engine.vllm.wire import model_shape
    from pyrl.models import base_location

    if request.vllm.sampler:
        shape = model_shape(request.model.config.get_text_config())
        served = ServedEngine(shape, request.eos, request.vllm)
        return served, Sync(served, request.model, request.probe_T)
    engine = VLLMEngine(
        str(base_location(request.source)),
        request.eos,
        max_rows=request.max_rows,
        dtype=request.dtype,
        options=request.vllm,
    )
    vocabulary = request.model.get_input_embeddings().num_embeddings
    if engine.vocabulary != vocabulary:
        engine.close()
        raise EngineError(
            f"{request.source}: vLLM's model has a vocabulary of {engine.vocabulary} tokens, the "
            f"learner's of {vocabulary}: both must load the same checkpoint"
        )
    return engine, Sync(engine, request.model, request.probe_T)


ENGINES: dict[str, Callable[[Request], tuple[Engine, Carry]]] = {"hf": hf, "vllm": vllm}
"""The function that launches each engine; `Run.engine` names one."""
