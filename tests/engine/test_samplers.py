"""The engine over samplers, with stand-ins for vLLM's servers: the trees of the embedded engine,
whatever dies, hangs or lies meanwhile. The servers themselves are in tests/on_vllm."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from driven_engine import EOS, Driver, llama
from stand_in_sampler import StandIn, free_port
from tiny_run import make_trainer, tiny, tiny_run, trained, weights
from transformers import PreTrainedModel

from pyrl.demo.run import ttrl
from pyrl.engine import RUNNING, EngineError, EngineFailure
from pyrl.engine.hf import HFEngine
from pyrl.engine.sync import Sync
from pyrl.engine.vllm import link
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.engine.vllm.served import ServedEngine
from pyrl.engine.vllm.wire import Answer, model_shape
from pyrl.models import load_model
from pyrl.models.lora import LoRA
from pyrl.reward import RandomReward
from pyrl.run.config import Run


@pytest.fixture
def model() -> PreTrainedModel:
    return llama(torch.float32)


@pytest.fixture
def two(model: PreTrainedModel) -> Iterator[tuple[StandIn, StandIn]]:
    with StandIn(copy.deepcopy(model)) as a, StandIn(copy.deepcopy(model)) as b:
        yield a, b


def engine_over(model: PreTrainedModel, *samplers: StandIn, **options: object) -> ServedEngine:
    """With the model's weights, as version 1."""
    urls = tuple(sampler.url for sampler in samplers)
    shape = model_shape(model.config.get_text_config())
    engine = ServedEngine(shape, [EOS], VLLMOptions(sampler=urls, **options))
    engine.load_weights(model.state_dict().items(), 1)
    return engine


def grow(driver: Driver) -> None:
    """Branches that fork from running and finished ones, leave, and end early."""
    driver.submit([0, 1, 2, 3] * 2, limit=12, retain=True)
    driver.step(2)
    driver.fork(0, 1, 3, exclude=driver.traces[0].tokens[1:2])
    driver.abort(2)
    driver.step(2)
    driver.fork(1, 0, 2)
    driver.finish()
    driver.fork(3, 1, 2)
    driver.finish()
    driver.engine.abort(np.array(sorted(set(driver.traces) - {2})))


def assert_same_trees(engine: ServedEngine, model: PreTrainedModel) -> None:
    ours, reference = Driver(engine), Driver(HFEngine(model, [EOS]))
    for driver in (ours, reference):
        grow(driver)
    for branch, trace in reference.traces.items():
        same = ours.traces[branch]
        # That which was aborted may have had fewer: what a lost sampler drew comes a step later.
        size = len(trace.tokens) if trace.finish != RUNNING else len(same.tokens)
        assert (same.tokens, same.finish) == (trace.tokens[:size], trace.finish), branch
        np.testing.assert_allclose(same.logprobs, trace.logprobs[:size], atol=1e-5)
        np.testing.assert_allclose(same.entropies, trace.entropies[:size], atol=1e-5)
        np.testing.assert_allclose(same.rests, trace.rests[:size], atol=1e-5)


def test_the_trees_are_those_of_the_embedded_engine(
    model: PreTrainedModel, two: tuple[StandIn, StandIn]
) -> None:
    engine = engine_over(model, *two)
    assert_same_trees(engine, model)
    assert min(sampler.drawn for sampler in two) > 20
    assert engine.work().decode_tokens > engine.work().prompt_tokens > 10
    engine.close()


def test_a_new_branch_goes_where_the_fewest_run_and_a_sibling_to_its_parent(
    model: PreTrainedModel, two: tuple[StandIn, StandIn]
) -> None:
    engine = engine_over(model, *two)
    driver = Driver(engine)
    driver.submit([0, 0, 0, 0], limit=40, seed_B=[3, 3, 3, 3])
    driver.step(1)
    assert [len(sampler.running) for sampler in two] == [2, 2]
    driver.fork(1, 1, 3)
    driver.step(1)
    assert [len(sampler.running) for sampler in two] == [2, 5]
    driver.submit([1], limit=40)
    driver.step(1)
    assert [len(sampler.running) for sampler in two] == [3, 5]
    engine.close()
    assert [len(sampler.running) for sampler in two] == [0, 0]


@pytest.mark.parametrize(
    ("fault", "restarts"),
    [("die", 1), ("cut", 1), ("cut", 0), ("silent", 1), ("garbage", 1), ("error", 1)],
)
def test_no_token_changes_where_a_sampler_fails(
    model: PreTrainedModel,
    two: tuple[StandIn, StandIn],
    fault: str,
    restarts: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is reached again where that is allowed and possible; otherwise the other one goes on."""
    monkeypatch.setattr(link, "WAIT", 0.1)
    monkeypatch.setattr(link, "REACH", 0.3)
    engine = engine_over(model, *two, restarts=restarts)
    two[0].faults = {4: fault}
    assert_same_trees(engine, model)
    back = restarts == 1 and fault != "die"
    assert two[0].loads == ([1, 1] if back else [1])
    assert two[1].loads == [1]
    said = {
        "die": "does not answer /pyrl/step",
        "cut": "does not answer /pyrl/step",
        "silent": "does not answer /pyrl/step: timed out",
        "garbage": "expected tokens, got b'no tokens'",
        "error": "answers /pyrl/step with 500: it is full",
    }
    assert f"a sampler is lost: {two[0].url}" in caplog.text
    assert said[fault] in caplog.text
    assert ("samples again" in caplog.text) == back
    engine.close()


def test_a_lost_sampler_is_asked_again_at_the_next_sync(
    model: PreTrainedModel, two: tuple[StandIn, StandIn]
) -> None:
    engine = engine_over(model, *two, restarts=0)
    two[0].faults = {4: "die"}
    assert_same_trees(engine, model)
    engine.load_weights(model.state_dict().items(), 2)
    assert (two[0].loads, two[1].loads) == ([1], [1, 2])
    two[0].stop()
    with StandIn(copy.deepcopy(model), two[0].port) as another:
        learned = llama(torch.float32)
        with torch.no_grad():
            learned.get_output_embeddings().weight.mul_(1.5)
        found = Sync(engine, learned, np.arange(9, dtype=np.int32))(3)
        assert found["sync/difference"] < 1e-5
        assert (another.loads, two[1].loads) == ([3], [1, 2, 3])
        assert_same_trees(engine, learned)
        assert another.drawn > 20
        engine.close()


def test_without_a_sampler_the_run_ends_and_names_them(
    model: PreTrainedModel, two: tuple[StandIn, StandIn]
) -> None:
    engine = engine_over(model, *two)
    for sampler in two:
        sampler.faults = {3: "die"}
    named = ".*".join(re.escape(f"{sampler.url} does not answer") for sampler in two)
    with pytest.raises(EngineFailure, match=f"no sampler is left: {named}"):
        grow(Driver(engine))
    engine.close()


def test_a_sampler_that_serves_another_run_is_left_to_it(
    model: PreTrainedModel, two: tuple[StandIn, StandIn]
) -> None:
    first = engine_over(model, *two)
    driver = Driver(first)
    driver.submit([0, 1], limit=40)
    driver.step(1)
    second = engine_over(model, two[0])
    driver.finish()
    assert two[0].loads == [1, 1]
    driver.abort(*first._known)
    first.load_weights(model.state_dict().items(), 2)
    assert (two[0].loads, two[1].loads) == ([1, 1], [1, 2])
    third = engine_over(model, two[1])
    with pytest.raises(EngineFailure, match=r"no sampler is left: .*serves another run now"):
        first.load_weights(model.state_dict().items(), 3)
    for engine in (first, second, third):
        engine.close()


def test_weights_of_another_version_are_not_sampled_from(
    model: PreTrainedModel, two: tuple[StandIn, StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_over(model, *two)
    two[0].version = 7
    assert_same_trees(engine, model)
    assert "drawn with weights of version 7, expected 1" in caplog.text
    engine.close()


def test_samplers_that_took_different_weights_are_named(
    model: PreTrainedModel, two: tuple[StandIn, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_over(model, *two)
    monkeypatch.setattr(two[1], "route", lambda *_: b'{"weight_version": "2"}')
    with pytest.raises(EngineFailure, match=f"{two[1].url} has taken other weights"):
        engine.load_weights(model.state_dict().items(), 2)
    engine.close()


def test_an_old_version_after_a_sync_is_named(
    model: PreTrainedModel, two: tuple[StandIn, StandIn]
) -> None:
    engine = engine_over(model, two[0])
    two[0].missing = {"/update_weight_version"}
    with pytest.raises(EngineFailure, match="has no /update_weight_version: start it with"):
        engine.load_weights(model.state_dict().items(), 2)
    engine.close()


WRONG = {
    "another pyrl": ({"pyrl": "0.0.1"}, "expected a sampler of pyrl .*, as here, got pyrl 0.0.1"),
    "another model": (
        {"shape": {"model_type": "qwen2", "num_hidden_layers": 3, "hidden_size": 8}},
        "expected a model like the learner's, model_type llama, num_hidden_layers 2, hidden_size "
        "24, got a model, model_type qwen2, num_hidden_layers 3, hidden_size 8: both must load",
    ),
    "another type": ({"dtype": "bfloat16"}, "expected the same dtype at all of them, got http"),
    "another vLLM": ({"vllm": "0.31.0"}, "expected the same vllm at all of them, got http"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_samplers_that_do_not_fit_are_refused(
    model: PreTrainedModel, two: tuple[StandIn, StandIn], wrong: str
) -> None:
    about, said = WRONG[wrong]
    two[1].about |= about
    with pytest.raises(EngineError, match=said):
        engine_over(model, *two)


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ("/pyrl/open", "has no /pyrl/open: start it with `pyrl sampler --model MODEL"),
        ("/weight_info", r"has no /weight_info: its vLLM has no routes .*VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_that_lacks_a_part_is_refused(
    model: PreTrainedModel, two: tuple[StandIn, StandIn], route: str, said: str
) -> None:
    two[1].missing = {route}
    with pytest.raises(EngineError, match=f"sampler: {two[1].url} {said}"):
        engine_over(model, *two)


def test_a_server_of_another_kind_is_refused(
    model: PreTrainedModel, two: tuple[StandIn, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two[1], "route", lambda *_: b"hello")
    with pytest.raises(EngineError, match=f"{two[1].url} is no sampler: it answers b'hello'"):
        engine_over(model, *two)


def test_nobody_at_an_address_is_refused(model: PreTrainedModel) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError, match=f"sampler: {url} does not answer /pyrl/open: .*refused"):
        ServedEngine(model_shape(model.config), [EOS], VLLMOptions(sampler=(url,)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": ("a:1",)}, "expected http://HOST:PORT, got a:1"),
        ({"sampler": ("http://a:1/v1",)}, "expected http://HOST:PORT, got http://a:1/v1"),
        ({"sampler": ("http://a:1",) * 2}, "expected each once, got http://a:1 http://a:1"),
        (
            {"sampler": ("http://a:1",), "block_size": 16},
            "vllm.block_size: expected to be given to `pyrl sampler`, not beside --sampler, got 16",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        VLLMOptions(**options)


def test_what_is_no_answer_is_refused() -> None:
    assert Answer.from_bytes(Answer([], 2, (1, 2, 3, 4)).to_bytes()).running == 2
    head = b'{"frames": [[1, 2]], "running": 0, "work": [0, 0, 0, 0]}\n'
    with pytest.raises(ValueError, match="0 records arrived, 2 were sent"):
        Answer.from_bytes(head)


@pytest.fixture
def demo_samplers() -> Iterator[tuple[StandIn, StandIn]]:
    model, _ = load_model("demo")
    with StandIn(model) as a, StandIn(copy.deepcopy(model)) as b:
        yield a, b


def run_over(folder: Path, *samplers: StandIn, **settings: object) -> Run:
    algorithm = replace(tiny(ttrl()), reward=RandomReward())
    options = VLLMOptions(sampler=tuple(sampler.url for sampler in samplers))
    return tiny_run(folder, algorithm, engine="vllm", vllm=options, **settings)


def test_an_adapter_trains_over_samplers_as_over_the_embedded_engine(
    tmp_path: Path, demo_samplers: tuple[StandIn, StandIn]
) -> None:
    run = run_over(tmp_path, *demo_samplers, lora=LoRA(rank=4), learning_rate=1e-3)
    trainer, rows = trained(run, 2)
    embedded = replace(run, engine="hf", vllm=VLLMOptions(), output=tmp_path / "hf")
    _, expected = trained(embedded, 2)
    for row, same in zip(rows, expected, strict=True):
        assert row["sync/difference"] < 1e-4
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        for name in ("tree/leaves", "reward", "reward_std"):
            assert row[name] == same[name]
    assert demo_samplers[0].loads == demo_samplers[1].loads == [0, 1, 2]
    trainer.engine.close()


def test_a_run_without_samplers_is_resumed_with_others(
    tmp_path: Path,
    demo_samplers: tuple[StandIn, StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They die in the second step; what is trained in the end is what would have been."""
    run = run_over(tmp_path, *demo_samplers, save_every=1, steps=2, learning_rate=1e-5)
    run = replace(run, eval_before=False, eval_after=False)
    trainer, step = make_trainer(run), ServedEngine.step

    def dying(engine: ServedEngine) -> object:
        for sampler in demo_samplers:
            sampler.dead = trainer.step == 1 and len(engine._known) > 2  # not in the sync
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(ServedEngine, "step", dying)
        with pytest.raises(EngineFailure, match=r"step 2: no sampler is left: .*resume"):
            trainer.train()
    trainer.engine.close()
    with StandIn(load_model("demo")[0]) as another:
        options = VLLMOptions(sampler=(another.url,))
        resumed = make_trainer(replace(run, vllm=options, resume=True))
        resumed.train()
        resumed.engine.close()
    embedded = replace(run, engine="hf", vllm=VLLMOptions(), output=tmp_path / "hf")
    expected, _ = trained(embedded, 2)
    assert resumed.step == expected.step == 2
    for name, weight in weights(expected).items():
        torch.testing.assert_close(weights(resumed)[name], weight, atol=2e-6, rtol=0)


def test_samplers_need_the_engine_that_asks_them(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, vllm=VLLMOptions(sampler=("http://a:1",)))
    with pytest.raises(EngineError, match="sampler: expected with --engine vllm, got it with hf"):
        make_trainer(run)
