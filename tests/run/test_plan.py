"""What a run would hold in memory, from the configuration of its model alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny, tiny_run

from pyrl import cli, demo
from pyrl.methods import METHODS
from pyrl.models import load_model
from pyrl.models.lora import LoRA
from pyrl.run import plan as plans
from pyrl.run.config import Run
from pyrl.run.plan import LESS, Plan, plan, smaller

PROMPT = 20


def demo_plan(folder: Path, method: str = "grpo", device: str = "cpu", **settings: Any) -> Plan:
    return plan(demo_run(folder, method, **settings), PROMPT, device)


def demo_run(folder: Path, method: str = "grpo", **settings: Any) -> Run:
    return tiny_run(folder, tiny(METHODS[method](), votes=8), **settings)


def trained_bytes(lora: bool = False) -> tuple[int, int]:
    """Of all weights of the demo model in float32, and of those that train."""
    from pyrl.models.lora import add_adapter

    model = load_model("demo")[0]
    if lora:
        add_adapter(model, LoRA(rank=4), "demo", 0)
    sizes = [(4 * p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def test_weights_gradients_and_moments_are_those_of_the_model(tmp_path: Path) -> None:
    weights, _ = trained_bytes()
    found = demo_plan(tmp_path)
    assert found.always["weights"] == weights
    assert found.always["optimizer"] == 2 * weights
    assert found.phases["optimizer"]["gradients"] == weights
    assert "reference model" not in found.always
    assert demo_plan(tmp_path, "ttrl").always["reference model"] == weights
    assert demo_plan(tmp_path, weights="bfloat16").always["optimizer"] == weights
    everything, trained = trained_bytes(lora=True)
    adapted = demo_plan(tmp_path, "ttrl", lora=LoRA(rank=4))
    assert adapted.always["weights"] == everything
    assert adapted.always["optimizer"] == 2 * trained
    assert "reference model" not in adapted.always


def test_a_step_has_the_tokens_that_it_samples(tmp_path: Path) -> None:
    """Two questions with 8 answers of 21 tokens; a tree reads a question once."""
    assert demo_plan(tmp_path).tokens == 2 * (PROMPT + 8 * 21)
    flat = demo_plan(tmp_path, pack="flat")
    assert flat.tokens == 2 * 8 * (PROMPT + 21)
    part = demo_plan(tmp_path, tokens_per_pass=100)
    assert part.pass_tokens == PROMPT + 4 * 20  # four answers have 100
    activations = {
        name: found.phases["gradient"]["activations"]
        for name, found in {"whole": demo_plan(tmp_path), "flat": flat, "part": part}.items()
    }
    assert activations["flat"] > 1.5 * activations["whole"] > 3 * activations["part"]
    cached = {n: demo_plan(tmp_path, max_rows=n).phases["sampling"] for n in (4, 8, 99)}
    assert cached[8]["keys and values"] == 2 * cached[4]["keys and values"]
    assert cached[99]["keys and values"] == 2 * cached[8]["keys and values"]  # 16 branches


def test_the_logits_of_a_large_vocabulary_are_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = load_model("demo")[0].config.vocab_size
    whole = demo_plan(tmp_path).phases["gradient"]["logits"]
    assert whole == 4 * vocabulary * 2 * 8 * 21
    monkeypatch.setattr(plans, "SMALL_LOGITS", 0)
    assert demo_plan(tmp_path).phases["gradient"]["logits"] < whole
    assert demo_plan(tmp_path, "gspo").phases["gradient"]["logits"] == whole


def test_each_advice_makes_it_smaller(tmp_path: Path) -> None:
    run = demo_run(tmp_path, prompts_per_step=16)
    run = replace(run, algorithm=tiny(METHODS["grpo"](), votes=32))
    peaks = [plan(run, PROMPT, "cpu").peak, *(p.peak for p in smaller(run, PROMPT, "cpu").values())]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.5 * peaks[0]
    small = replace(run, tokens_per_pass=PROMPT + 21, max_rows=32, **LESS["--weights bfloat16"])
    assert list(smaller(small, PROMPT, "cpu")) == ["--gradient-checkpointing", "--lora.rank 16"]


def test_the_command_needs_a_configuration_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(demo.MODEL / "config.json", tmp_path)
    asked = ["plan", "ttrl", "--model", str(tmp_path), "--sample.max-tokens", "21"]
    for options, code, said in (
        (["--gpu", "24"], 0, "together, and 6.5% beside"),
        (["--gpu", "0.001", "--prompt-tokens", "9"], 0, "does not fit in 0.001 GB"),
        ([], 0, "weights in the sampler's layout"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*asked, *options])
        assert ended.value.code == code
        assert said in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    for model, said in (
        (str(tmp_path), "the configuration cannot be loaded"),
        (str(tmp_path / "gone"), "no such directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", "ttrl", "--model", model])
        assert ended.value.code == 2
        assert f"pyrl: {model}: {said}" in capsys.readouterr().err
