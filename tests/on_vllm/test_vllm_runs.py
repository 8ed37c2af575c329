"""Every method, on vLLM: a step of training, and a run that goes on after its engine has failed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_llama import HEADS
from tiny_run import make_trainer, stepped, tiny, tiny_run
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pyrl import demo, learner
from pyrl.engine import EngineFailure
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.loss.presets import PRESETS
from pyrl.loss.terms import Terms, loss_terms
from pyrl.methods import METHODS
from pyrl.models.lora import LoRA
from pyrl.reward import RandomReward
from pyrl.run.config import Run
from pyrl.run.directory import claim


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with the demo's tokenizer, whose heads vLLM's CPU attention takes."""
    folder: Path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    torch.manual_seed(0)
    shape = HEADS | {"vocab_size": len(tokenizer), "num_hidden_layers": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    LlamaForCausalLM(LlamaConfig(**shape | special, intermediate_size=96)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(folder: Path, model: Path, method: str) -> Run:
    return tiny_run(
        folder,
        tiny(METHODS[method](), votes=8),
        method=method,
        model=str(model),
        engine="vllm",
        vllm=VLLMOptions(kv_cache_gib=0.25),
    )


OF_EACH_TREE = {
    (make().fork, make().prune, make().select, make().reward, make().temper): name
    for name, make in METHODS.items()
}.values()
"""A method for each way to sample: others differ in what they learn from it."""


@pytest.mark.parametrize("method", OF_EACH_TREE)
def test_every_method_trains_a_step(tmp_path: Path, model: Path, method: str) -> None:
    trainer = make_trainer(run_of(tmp_path, model, method))
    try:
        metrics = stepped(trainer)
        assert metrics["tree/leaves"] >= 16
        assert metrics["sync/difference"] < 1e-4
        assert metrics.get("sampling/sampling_logp_difference/max", 0.0) < 1e-4
        assert trainer.engine.weight_version() == 1
    finally:
        trainer.engine.close()


def test_an_adapter_reaches_vllm_in_the_weights_that_it_makes(tmp_path: Path, model: Path) -> None:
    """The engine's log-probs are those of the learner's adapter, after each of its updates."""
    run = run_of(tmp_path, model, "grpo")
    algorithm = replace(run.algorithm, reward=RandomReward())
    run = replace(run, algorithm=algorithm, lora=LoRA(rank=4), learning_rate=1e-2)
    trainer = make_trainer(run)
    try:
        moved = []
        for _ in range(3):
            metrics = stepped(trainer)
            assert metrics["sync/difference"] < 1e-4
            assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
            halves = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
            moved.append(sum(float(half.detach().abs().sum()) for half in halves))
        assert 0 < moved[0] != moved[1] != moved[2]
    finally:
        trainer.engine.close()


def test_a_run_whose_engine_fails_saves_its_trees_and_goes_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(run_of(tmp_path, model, "ttrl"), save_every=1)
    trainer = make_trainer(run)
    step, calls = VLLMEngine.step, []

    def failing(engine: VLLMEngine) -> object:
        calls.append(1)
        if trainer.step == 1 and len(calls) % 7 == 0:
            raise EngineFailure("it died")
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(VLLMEngine, "step", failing)
        with pytest.raises(EngineFailure, match=r"step 2: it died. What had grown is in .*resume"):
            trainer.train()
    trainer.engine.close()
    assert (run.output / "forest_in_flight").stat().st_size > 0
    again = make_trainer(replace(run, resume=True))
    assert again.step == 1
    again.train()
    assert again.step == run.steps
    assert not (run.output / "forest_in_flight").exists()
    again.engine.close()


def test_the_learner_s_own_log_probs_differ_from_those_of_vllm(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the factors of TIS are not all 1."""
    made: list[Terms] = []

    def note(*args: Any, **kwargs: Any) -> Terms:
        made.append(loss_terms(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(learner, "loss_terms", note)
    run = run_of(tmp_path, model, "ttrl")
    algorithm = replace(run.algorithm, loss=PRESETS["tis"](), reward=RandomReward())
    trainer = make_trainer(replace(run, algorithm=algorithm))
    try:
        metrics = stepped(trainer)
    finally:
        trainer.engine.close()
    factor_T = made[0].factor_T
    assert factor_T is not None
    assert 0 < float((factor_T - 1).abs().max()) < 1e-3
    assert metrics["old_logprobs/tokens"] > 0
    assert metrics["sampling/importance_sampling_ratio/max"] == 1.0


def test_ahead_of_the_learner_an_older_version_samples_and_a_resumed_run_draws_it_again(
    tmp_path: Path, model: Path
) -> None:
    run = replace(run_of(tmp_path, model, "ttrl"), ahead=True, learning_rate=1e-5)
    trainer = make_trainer(run)
    claim(run)
    taken = []
    for number in range(3):
        step = trainer.train_step()
        trainer.observe(step)
        paths = [step.rollout.forest.path(leaf) for leaf in step.leaves.leaf_N.tolist()]
        assert {v for path in paths for v in path.version.tolist()} == {max(0, number - 1)}
        taken.append(step.leaves.rows.label_T.tolist())
        if number == 1:
            trainer.unlogged = None
            trainer.save()
    trainer.close()
    again = make_trainer(replace(run, resume=True))
    assert again.step == 2
    step = again.train_step()
    again.close()
    assert step.staleness == 1
    assert step.leaves.rows.label_T.tolist() == taken[2]
