"""Launch: the engine that a run asks for, and how the learner's weights reach it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pyrl.engine import Engine, EngineError
from pyrl.engine.hf import HFEngine
from pyrl.engine.sync import Shared, Sync
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.models import model_location

EngineName = Literal["hf", "vllm"]


def launch(
    name: EngineName,
    options: VLLMOptions,
    model: PreTrainedModel,
    source: str,
    eos: Collection[int],
    *,
    max_rows: int,
    dtype: str,
    probe_T: NDArray[np.int32],
) -> tuple[Engine, Callable[[int], dict[str, float]]]:
    """An engine for `model`, and the function that brings it a new version of the weights.

    `source`: where the model was loaded from; vLLM reads its configuration there. `probe_T`: token
    ids of some question, for the probe after each sync. Raises EngineError if vLLM is not
    installed, is a release that pyrl does not know, cannot run the model, or has loaded one with
    another vocabulary.
    """
    if name == "hf":
        engine = HFEngine(model, eos, max_rows=max_rows)
        return engine, Shared(engine)
    from pyrl.engine.vllm.engine import VLLMEngine  # imports vllm, which takes its time

    location = str(model_location(source))
    remote = VLLMEngine(location, eos, max_rows=max_rows, dtype=dtype, options=options)
    known = model.get_input_embeddings().num_embeddings
    if remote.vocabulary != known:
        remote.close()
        raise EngineError(
            f"{source}: vLLM's model has a vocabulary of {remote.vocabulary} tokens, the learner's "
            f"of {known}: both must load the same checkpoint"
        )
    return remote, Sync(remote, model, probe_T, options.dtype or dtype)
