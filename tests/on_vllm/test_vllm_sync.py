"""Weights that provably arrive: what is stale, damaged or unused stops the run."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from driven_engine import PROMPTS, Driver
from small_llama import Small, small_llama
from torch import Tensor

from pyrl.engine.hf import HFEngine
from pyrl.engine.sync import Sync, SyncError
from pyrl.engine.vllm.core import Core

PROBE = np.arange(4, 31, dtype=np.int32)


def test_new_weights_are_used_and_every_token_carries_their_version(small: Small) -> None:
    learner = small_llama(seed=2)
    metrics = Sync(small.engine, learner, PROBE)(11)
    assert 0 < metrics["sync/difference"] < 1e-4
    assert small.engine.weight_version() == 11
    ours, reference = Driver(small.engine), Driver(HFEngine(learner, [3]))
    for driver in (ours, reference):
        driver.submit([0, 1, 2, 3], limit=9)
        driver.finish()
    for branch, trace in reference.traces.items():
        assert ours.traces[branch].tokens == trace.tokens
        np.testing.assert_allclose(ours.traces[branch].logprobs, trace.logprobs, atol=1e-4)
    Sync(small.engine, small.model, PROBE)(12)


def change(name: str, how: Callable[[Tensor], Tensor]) -> Callable[..., dict[str, int]]:
    """A `Core.load` on whose way one tensor is changed."""
    load = Core.load

    def changed(core: Core, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, int]:
        return load(core, [(n, how(t) if n == name else t) for n, t in weights], version)

    return changed


def test_a_stale_tensor_stops_the_run_with_its_name(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    stale = small.model.state_dict()[name].clone()
    monkeypatch.setattr(Core, "load", change(name, lambda _: stale))
    learner = small_llama()
    with torch.no_grad():  # less than any probe would notice
        learner.get_parameter(name)[0, 0] += 1e-7
    with pytest.raises(SyncError, match=rf"1 of \d+ tensors arrived stale or damaged: {name}$"):
        Sync(small.engine, learner, PROBE)(13)


def test_a_tensor_that_arrives_and_is_not_used_stops_the_run(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Core.load

    def forgetful(core: Core, weights: list[tuple[str, Tensor]], version: int) -> dict[str, int]:
        received = load(core, weights, version)
        load(core, list(old.items()), version)
        return received

    old = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    monkeypatch.setattr(Core, "load", forgetful)
    with pytest.raises(SyncError, match="all tensors arrived, and the engine computes with others"):
        Sync(small.engine, small_llama(seed=4), PROBE)(14)


def test_a_prefix_that_outlives_its_weights_stops_the_run(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = Sync(small.engine, small_llama(), PROBE)
    sync(15)
    client = small.engine._core._client
    monkeypatch.setattr(client, "reset_prefix_cache", lambda: True)
    with pytest.raises(SyncError, match="a cached prefix"):
        Sync(small.engine, small_llama(seed=5), PROBE)(16)
    monkeypatch.undo()
    sync(17)


def test_tokens_of_other_weights_are_refused(small: Small) -> None:
    driver = Driver(small.engine)
    driver.submit(list(range(len(PROMPTS))), limit=5)
    small.engine._version += 1
    with pytest.raises(RuntimeError, match="drawn with weights of version"):
        driver.step()
    small.engine._version -= 1
    small.clear(driver)
