"""LoRA stays the host's: adapters train on trees, by the host's loss and by the method's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_trl import EACH, Replays, Samples, arguments, config, trained
from peft import LoraConfig

from pyrl.methods import METHODS


def adapter() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("loss", ["host", "pyrl"])
def test_an_adapter_trains_and_the_model_below_it_does_not(loss: Any, tmp_path: Path) -> None:
    algorithm = METHODS["ettrl"]()
    algorithm = replace(algorithm, sample=replace(algorithm.sample, votes=EACH, train=EACH))
    args = config(tmp_path, max_steps=2, max_completion_length=24)
    given = arguments(args, reward_funcs=None, peft_config=adapter())
    answers = {"extractor": "whole", "equivalence": "exact"}
    trainer = Samples(**given, algorithm=algorithm, loss=loss, **answers)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    rows, _ = trained(trainer)
    moved = {name for name, t in trainer.model.state_dict().items() if not t.equal(before[name])}
    assert moved == {name for name in before if "lora_" in name}
    if loss == "pyrl":
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)
        assert rows[1]["kl"] > 0


def test_with_an_adapter_a_flat_group_gives_the_hosts_gradient(tmp_path: Path) -> None:
    more = {"beta": 0.1, "num_iterations": 2, "max_steps": 2}
    tree = Samples(**arguments(config(tmp_path, **more), peft_config=adapter()))
    ours, found = trained(tree)
    host = Replays(**arguments(config(tmp_path, **more), peft_config=adapter()))
    host.noted = tree.noted
    theirs, expected = trained(host)
    assert ours[1]["kl"] == pytest.approx(theirs[1]["kl"], rel=1e-3)
    assert expected[0].keys() == found[0].keys() != set()
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=1e-6)
