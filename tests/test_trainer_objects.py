"""A trainer that is given objects: the same run as by names, and what does not fit is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_run import SCORING, quiet, tiny, tiny_run, weights
from tyro import MISSING

import pyrl
from pyrl.demo.run import ttrl
from pyrl.learner import Learner
from pyrl.methods import METHODS
from pyrl.models import load_model
from pyrl.models.lora import LoRA, add_adapter
from pyrl.report.metrics import read_metrics
from pyrl.run.config import Run
from pyrl.run.names import ConfigError
from pyrl.run.parsing import parse_run
from pyrl.sources import DataError

UNSCORED = {"eval_before": False, "eval_after": False}


def ended(completions: list[str], **_: Any) -> list[float | None]:
    """Knows nothing of the responses that are too long."""
    return [1.0 if len(text) < 30 else None for text in completions]


def brevity(completions: list[str]) -> list[float]:
    return [-len(text) / 100 for text in completions]


def objects(run: Run) -> dict[str, Any]:
    """What the run names, loaded."""
    rows = [json.loads(line) for line in Path(run.data).read_text().splitlines()]
    model, tokenizer = load_model("demo")
    return {"model": model, "tokenizer": tokenizer, "prompts": Dataset.from_list(rows)}


@pytest.mark.parametrize("rank", [None, 4])
def test_the_same_run_by_objects_and_by_names(tmp_path: Path, rank: int | None) -> None:
    """With a reference: the first model stays as it was, though the caller's own trains."""
    run = replace(
        tiny_run(tmp_path, tiny(METHODS["ttrl"]()), steps=2, **UNSCORED), lora=LoRA(rank=rank)
    )
    named = pyrl.Trainer(run, quiet(), scoring=SCORING)
    named.train()
    given = objects(run)
    unnamed = replace(run, model=MISSING, data=MISSING, output=tmp_path / "given")
    trainer = pyrl.Trainer(unnamed, quiet(), scoring=SCORING, **given)
    assert trainer.model is given["model"]
    trainer.train()
    for name, tensor in weights(named).items():
        assert torch.equal(tensor, weights(trainer)[name]), name
    assert (tmp_path / "given" / "model").is_dir()


def test_a_run_with_objects_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(METHODS["ttrl"]()), steps=3, **UNSCORED)
    whole = pyrl.Trainer(run, quiet(), scoring=SCORING, **objects(run))
    whole.train()

    def stop(step: object, metrics: dict[str, float]) -> None:
        if metrics["step"] == 2:
            raise RuntimeError("enough")

    cut = replace(run, output=tmp_path / "cut")
    with pytest.raises(RuntimeError, match="enough"):
        pyrl.Trainer(cut, quiet(), scoring=SCORING, callbacks=[stop], **objects(run)).train()
    cut = replace(cut, resume=True)
    trainer = pyrl.Trainer(cut, quiet(), scoring=SCORING, **objects(run))
    assert trainer.step == 2
    trainer.train()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(trainer)[name]), name


def test_callbacks_and_several_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of what is known, with weights; unknown where nobody knows anything."""
    steps: list[tuple[Any, dict[str, float]]] = []
    run = tiny_run(tmp_path, tiny(METHODS["grpo"]()), steps=2, **UNSCORED)
    trainer = pyrl.Trainer(
        *(run, quiet()),
        scoring=SCORING,
        reward=[ended, brevity],
        reward_weights=[2.0, 0.5],
        callbacks=[lambda step, metrics: steps.append((step, dict(metrics)))],
        **objects(run),
    )
    trainer.train()
    assert len(steps) == 2
    for step, metrics in steps:
        texts = step.leaves.text_N
        known = [1.0 if len(text) < 30 else 0.0 for text in texts]
        expected = [2 * k - 0.005 * len(text) for k, text in zip(known, texts, strict=True)]
        assert step.reward_N.tolist() == pytest.approx(expected)
        mean = -sum(map(len, texts)) / len(texts) / 100
        assert metrics["reward/of/brevity"] == pytest.approx(mean)
        assert metrics["reward/of/ended"] == 1.0
    logged = read_metrics(run.output / "metrics.jsonl")
    assert [row["reward/of/ended"] for row in logged if "reward" in row] == [1.0, 1.0]
    unknown = pyrl.Trainer(
        replace(run, output=tmp_path / "unknown"),
        quiet(),
        reward=[lambda completions: [math.nan] * len(completions), never],
        **objects(run),
    )
    moves: list[object] = []
    monkeypatch.setattr(Learner, "update", lambda *_, **__: moves.append(None))
    assert unknown.train_step().update is None
    assert not moves


def never(completions: list[str]) -> list[None]:
    return [None] * len(completions)


def test_several_functions_of_files_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "parts.py"
    file.write_text(
        "def one(completions):\n    return [1.0] * len(completions)\n"
        "def two(completions):\n    return [2.0] * len(completions)\n"
    )
    algorithm = tiny(METHODS["grpo"]())
    given = ["--reward-function", f"{file}:one", f"{file}:two", "--reward-weights", "1", "-0.25"]
    asked = parse_run(["--model", "demo", "--data", "demo:train", *given], "grpo", algorithm)
    run = replace(
        tiny_run(tmp_path, algorithm),
        reward_function=asked.reward_function,
        reward_weights=asked.reward_weights,
    )
    step = pyrl.Trainer(run, quiet(), scoring=SCORING).train_step()
    assert set(step.reward_N.tolist()) == {0.5}
    with pytest.raises(ValueError, match="expected one for each of 2 reward functions, or none, g"):
        replace(run, reward_weights=(1.0,))
    with pytest.raises(ValueError, match="reward_function: expected a tuple of functions, got 'a"):
        tiny_run(tmp_path, algorithm, reward_function="a.py:f")


def test_settings_from_python_are_those_of_the_command_line() -> None:
    choices = {"loss": "gspo", "sample": {"votes": 40}}
    ours = pyrl.settings(
        "ettrl", model="demo", data="demo:train", steps=7, betas=[0.5, 0.6], **choices
    )
    options = "--model demo --data demo:train --steps 7 --loss gspo --sample.votes 40"
    theirs = [*options.split(), "--betas", "0.5", "0.6"]
    assert ours == parse_run(theirs, "ettrl", METHODS["ettrl"]())
    with pytest.raises(ConfigError, match="there is no setting 'stepz'; the nearest is 'steps'"):
        pyrl.settings("ettrl", stepz=7)
    with pytest.raises(ValueError, match="ettrll"):
        pyrl.settings("ettrll")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(ttrl()))
    given = objects(run)
    split = {"train": given["prompts"]}
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": given["model"]}, ValueError, "model, tokenizer: expected both of them or n"),
        (given | {"model": torch.nn.Linear(1, 1)}, ValueError, "adapter .*, got Linear"),
        (given | {"prompts": split}, DataError, "one split of a data set, got the keys train"),
        (given | {"prompts": "What?"}, DataError, "expected rows, .* got a text"),
        (given | {"prompts": [3]}, DataError, "prompts, row 0: expected"),
        (given | {"prompts": []}, DataError, "prompts: the data set is empty"),
        (given | {"reward": ["no"]}, ValueError, "expected module:function or file.py:function"),
        (given | {"reward": [3]}, ValueError, "reward: expected a function, .* got 3"),
        (given | {"reward": [never, never]}, ValueError, "of different names, got .'never', 'n"),
        (given | {"reward": [never], "reward_weights": [1, 2]}, ValueError, "expected 1 finite nu"),
    ]
    for own, kind, message in refused:
        with pytest.raises(kind, match=message):
            pyrl.Trainer(run, quiet(), **own)
    with pytest.raises(ValueError, match="data: expected the setting, or an object in its place"):
        pyrl.Trainer(replace(run, data=MISSING), quiet())
    with pytest.raises(ValueError, match="expected weights in bfloat16, as the setting 'weights'"):
        pyrl.Trainer(replace(run, weights="bfloat16"), quiet(), **given)
    adapted, tokenizer = load_model("demo")
    add_adapter(adapted, LoRA(rank=2), "demo", 0)
    with pytest.raises(ValueError, match=r"without an adapter .*, got one with an adapter"):
        pyrl.Trainer(run, quiet(), model=adapted, tokenizer=tokenizer)
    assert not run.output.exists() or not any(run.output.glob("*.yaml"))
