"""Weights of the embedded engine, and the requests that it refuses."""

import numpy as np
import pytest
import torch
from driven_engine import PROMPTS, SHAPE, Driver, assert_as_a_fresh_forward, llama
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
)

from pyrl.engine import Branches
from pyrl.engine.hf import HFEngine
from pyrl.logits.sampling import Sampling


def test_dropout_is_off_while_sampling() -> None:
    model = llama(attention_dropout=0.5)
    driver = Driver(HFEngine(model, []))
    model.train()
    driver.submit([0, 1], limit=8)
    driver.finish()
    assert_as_a_fresh_forward(driver, llama())


def test_weights_are_replaced_by_name_and_version() -> None:
    other = llama()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    engine = HFEngine(llama(), [])
    engine.load_weights(other.state_dict().items(), version=4)
    assert engine.weight_version() == 4
    driver = Driver(engine)
    driver.submit([0, 1], limit=8)
    driver.finish()
    assert_as_a_fresh_forward(driver, other)


def test_shared_weights_that_the_learner_changed_are_sampled_from() -> None:
    model = llama()
    driver = Driver(HFEngine(model, []))
    driver.submit([0], limit=4)
    driver.finish()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    driver.engine.load_weights(None, 1)
    driver.traces.clear()
    driver.submit([0, 1], limit=8)
    driver.finish()
    assert_as_a_fresh_forward(driver, model)


def test_weights_must_fit_exactly() -> None:
    engine = HFEngine(llama(), [])
    state = llama().state_dict()
    before = engine._model.lm_head.weight.clone()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    missing = {name: value for name, value in state.items() if name != "model.norm.weight"}
    for weights, message in (
        (missing, r"missing names \['model.norm.weight'\]"),
        (state | {"extra": torch.zeros(1)}, r"unknown names \['extra'\]"),
        (state | {"model.norm.weight": torch.zeros(3)}, r"expected \(24,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(weights.items(), 1)
    assert engine.weight_version() == 0
    assert torch.equal(engine._model.lm_head.weight, before)


def test_tied_weights_need_one_name_and_must_agree() -> None:
    source = llama(tie_word_embeddings=True)
    engine = HFEngine(llama(tie_word_embeddings=True), [])
    state = {name: value + 0.1 for name, value in source.state_dict().items()}
    with pytest.raises(ValueError, match="equal tensors for the tied weights"):
        engine.load_weights((state | {"lm_head.weight": state["lm_head.weight"] + 1}).items(), 1)
    state.pop("lm_head.weight")
    engine.load_weights(state.items(), 1)
    assert torch.equal(engine._model.lm_head.weight, state["model.embed_tokens.weight"])


def test_weights_never_change_under_a_cache() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0], limit=3, retain=True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="1 branches are running, queued or retained"):
            driver.engine.load_weights(None, 1)
        driver.step(2)
    driver.abort(0)
    driver.engine.load_weights(None, 1)
    assert driver.engine.weight_version() == 1


def test_bad_requests_say_what_was_expected() -> None:
    driver = Driver(HFEngine(llama(), []))
    with pytest.raises(
        ValueError, match="prompt of 5 tokens fits the model's 64 positions, got 60"
    ):
        driver.submit([0], limit=60)
    with pytest.raises(ValueError, match="limit of at least 1"):
        driver.submit([0], limit=0)
    driver.submit([0], limit=5)
    driver.step(2)
    with pytest.raises(RuntimeError, match="1 branches are running"):
        driver.engine.start(Sampling())
    with pytest.raises(ValueError, match=r"keep in 0\.\.2 \(running parent\), got 3"):
        driver.fork(0, 3)
    with pytest.raises(ValueError, match="branch 77 is unknown"):
        driver.fork(77, 0)
    with pytest.raises(ValueError, match="branch 77 is unknown"):
        driver.abort(77)
    with pytest.raises(ValueError, match="identifiers that are not in use"):
        driver.engine.fork(0, 1, np.array([5, 5]), np.array([1, 2], np.uint64))
    with pytest.raises(ValueError, match="identifiers that are not in use"):
        driver.engine.fork(0, 1, np.array([0]), np.array([1], np.uint64))
    driver.finish()
    with pytest.raises(ValueError, match="branch 0 is unknown"):
        driver.fork(0, 1)
    with pytest.raises(ValueError, match="max_rows: expected at least 1"):
        HFEngine(llama(), [], max_rows=0)


def test_a_finished_branch_cannot_be_forked_behind_its_last_token() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0], limit=3, retain=True)
    driver.finish()
    with pytest.raises(ValueError, match=r"keep in 0\.\.2 \(finished parent\), got 3"):
        driver.fork(0, 3)


def test_branches_must_name_a_prompt() -> None:
    one = np.zeros(1, np.int64)
    branches = Branches(PROMPTS, one - 1, one, one.astype(np.uint64), one + 1)
    with pytest.raises(ValueError, match=r"expected prompt_B in 0\.\."):
        HFEngine(llama(), []).submit(branches)


@pytest.mark.parametrize("prompt", [[], [5, 31], [-1]])
def test_prompts_must_have_tokens_of_the_vocabulary(prompt: list[int]) -> None:
    one = np.zeros(1, np.int64)
    branches = Branches([np.array(prompt, np.int32)], one, one, one.astype(np.uint64), one + 1)
    with pytest.raises(ValueError, match="prompt 0: expected at least one token, and ids below 31"):
        HFEngine(llama(), []).submit(branches)


def test_an_engine_that_was_not_started_does_not_step() -> None:
    with pytest.raises(RuntimeError, match="call start first"):
        HFEngine(llama(), []).step()


def test_an_idle_engine_samples_nothing() -> None:
    engine = HFEngine(llama(), [])
    engine.start(Sampling())
    assert engine.step().branch_B.size == 0


def test_models_that_rescale_their_logits_are_refused() -> None:
    model = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0))
    with pytest.raises(ValueError, match="changes its hidden states or its logits"):
        HFEngine(model, [])


def test_long_prompts_are_prefilled_in_several_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrl.engine.hf.PREFILL_TOKENS", 6)
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1, 2, 3], limit=5)
    driver.finish()
    assert driver.engine.work().prompt_tokens == 13
    assert_as_a_fresh_forward(driver, llama())
