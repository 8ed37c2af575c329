"""An adapter in the place of the weights: the same run, with what is frozen left as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, trained, weights
from torch import Tensor
from transformers import PreTrainedModel

from pyrl import cli
from pyrl.demo.run import ttrl
from pyrl.engine.sync import Shared
from pyrl.loss import KL
from pyrl.models import ModelError, base_location, checkpoint_weights, load_model
from pyrl.models import lora as adapters
from pyrl.models.lora import LoRA, add_adapter, load_adapter, without_adapter
from pyrl.report.metrics import read_metrics
from pyrl.run.checkpoint import CheckpointError, write_model
from pyrl.run.config import Run
from pyrl.run.parsing import parse_train
from pyrl.train import Trainer

TEXT = torch.arange(1, 9)[None]
RATE = 1e-4


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=TEXT, use_cache=False).logits
    return out


def adapted(lora: LoRA, seed: int = 0, std: float = 0.1) -> PreTrainedModel:
    """The demo model with an adapter that has been somewhere."""
    model = load_model("demo")[0]
    add_adapter(model, lora, str(base_location("demo")), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std, generator=torch.Generator().manual_seed(seed))
    return model


def lora_run(folder: Path, **settings: Any) -> Run:
    """Two updates a step and a reference model, so that all passes of a learner are made."""
    method = tiny(ttrl(), updates=2)
    method = replace(method, loss=replace(method.loss, kl=KL(coef=0.01)))
    values = {"lora": LoRA(rank=4), "learning_rate": RATE, **settings}
    return tiny_run(folder, method, **values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = make_trainer(lora_run(tmp_path_factory.mktemp("lora")))
    trainer.train()
    trainer.close()
    return trainer


def test_a_new_adapter_changes_nothing_and_is_the_seeds() -> None:
    model, plain = load_model("demo")[0], load_model("demo")[0]
    state = torch.get_rng_state()
    add_adapter(model, LoRA(rank=4), "demo", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), logits(plain))
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trains) == 2 * 7 * len(model.model.layers)
    assert all("lora_" in name for name in trains)
    drawn = [adapted(LoRA(rank=4), seed, std=0.0).state_dict() for seed in (3, 3, 4)]
    assert same_bits(drawn[0], drawn[1])
    assert not same_bits(drawn[0], drawn[2])


def test_what_goes_to_an_engine_and_to_disk_is_the_same_policy(tmp_path: Path) -> None:
    """By the names of the model without an adapter, as a receiver knows them."""
    model = adapted(LoRA(rank=4, alpha=5.0, targets=("q_proj", "down_proj")))
    plain, tokenizer = load_model("demo")
    expected = logits(model)
    assert (expected - logits(plain)).abs().max() > 0.1
    with without_adapter(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), expected)
    merged = checkpoint_weights(model)
    assert merged.keys() == checkpoint_weights(plain).keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)
    write_model(tmp_path, model, tokenizer)
    assert not list(tmp_path.glob("model*.safetensors"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 5
    again = load_model("demo")[0]
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    assert base_location(str(tmp_path)) == base_location("demo")
    torch.testing.assert_close(logits(load_model(str(tmp_path))[0]), expected, atol=1e-5, rtol=0)


def test_training_moves_the_adapter_alone_and_the_model_below_is_the_reference(
    finished: Trainer,
) -> None:
    first, _ = load_model("demo")
    state = finished.model.state_dict()
    for name, tensor in first.state_dict().items():
        layered = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(state.get(layered, state.get(name)), tensor)
    kl = [row["kl"] for row in read_metrics(finished.run.output / "metrics.jsonl") if "kl" in row]
    # Nothing at the first update of all; from there on the policy has left what it began as.
    assert len(kl) == 3
    assert all(1e-6 < value < 1 for value in kl)
    assert isinstance(finished.sync, Shared)


def test_a_run_with_an_adapter_goes_on_bit_for_bit_from_the_adapter_alone(
    finished: Trainer, tmp_path: Path
) -> None:
    run = lora_run(tmp_path, save_every=1)
    first, _ = trained(run, 0)
    first.train()
    first.close()
    assert same_bits(weights(first), weights(finished))
    names = {path.name for path in (run.output / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not any(name.startswith("model") for name in names)
    (run.output / "checkpoint-3").rename(tmp_path / "later")
    again = make_trainer(replace(run, resume=True))
    assert again.step == 2
    stepped(again)
    assert same_bits(weights(again), weights(finished))
    assert same_bits(again.learner.state()[0], finished.learner.state()[0])
    again.close()


def test_the_result_is_an_adapter_or_a_whole_model(finished: Trainer, tmp_path: Path) -> None:
    folder = finished.run.output / "model"
    assert (folder / "adapter_model.safetensors").is_file()
    expected = logits(finished.model)
    torch.testing.assert_close(logits(load_model(str(folder))[0]), expected, atol=1e-5, rtol=0)
    whole = make_trainer(lora_run(tmp_path, lora=LoRA(rank=4, merge=True)))
    whole.train()
    whole.close()
    folder = whole.run.output / "model"
    assert not (folder / "adapter_config.json").exists()
    torch.testing.assert_close(logits(load_model(str(folder))[0]), expected, atol=1e-5, rtol=0)


def test_an_engine_of_its_own_gets_whole_weights(finished: Trainer) -> None:
    """What vLLM is sent: names and shapes of the checkpoint that it was started from."""
    sent = checkpoint_weights(finished.model)
    known = load_model("demo")[0].state_dict()
    assert {name: w.shape for name, w in sent.items()} == {n: w.shape for n, w in known.items()}


def test_the_command_line_names_the_adapter(tmp_path: Path) -> None:
    given = ["--model", "demo", "--data", "demo:train", "--output", str(tmp_path / "run")]
    options = ["--lora.rank", "8", "--lora.alpha", "4", "--lora.targets", "q_proj", "v_proj"]
    run = parse_train(["ttrl", *given, *options, "--lora.merge"])
    assert run.lora == LoRA(8, 4.0, ("q_proj", "v_proj"), merge=True)
    assert parse_train(["ttrl", *given]).lora.rank is None


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "lora.rank: expected at least 1"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha: expected > 0, got 0"),
        ({"rank": 4, "targets": ()}, "lora.targets: expected names of linear layers"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**lora)


def test_names_of_no_layer_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    run = lora_run(tmp_path, lora=LoRA(rank=4, targets=("q_proj", "c_attn")))
    names = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ModelError, match=f"linear layers, {names}, or 'all-linear', got c_attn"):
        make_trainer(run)
    assert not run.output.exists() or not list(run.output.glob("run.yaml"))


def test_an_adapter_of_another_base_is_refused(
    finished: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of other shapes when it is read, one of other weights when a run goes on."""
    small = load_model("demo")[0]
    small.config.intermediate_size //= 2
    small = type(small)(small.config)
    with pytest.raises(ModelError, match=r"model: expected an adapter for this .*made for .*demo"):
        load_adapter(small, finished.run.output / "model")
    changed = load_model("demo")
    with torch.no_grad():
        changed[0].lm_head.weight[0, 0] += 1
    monkeypatch.setattr("pyrl.run.setup.load_model", lambda name, dtype: changed)
    with pytest.raises(CheckpointError, match="expected the weights of demo that its adapter"):
        make_trainer(replace(finished.run, resume=True))


def test_peft_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"lora.rank: peft is needed .* 'pyrl\[lora\]'"):
        make_trainer(lora_run(tmp_path))


def test_eval_takes_the_folder_of_an_adapter(
    finished: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(finished.run.output / "model")
    options = ["--equivalence", "exact", "--extractor", "whole", "--chat", "False"]
    options += ["--data", finished.run.data, "--samples", "2", "--max-tokens", "21"]
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "--model", model, *options])
    assert end.value.code == 0
    assert "greedy" in capsys.readouterr().out
