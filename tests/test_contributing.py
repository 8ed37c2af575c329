"""The recipes of CONTRIBUTING.md, as they stand there: parts added from outside the package."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import make_trainer, stepped, tiny, tiny_run, weights

from pyrl.engine.launch import ENGINES
from pyrl.methods.registry import Registry
from pyrl.run.parsing import parse_train

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The blocks of the page as a file; its entry in the table of engines is gone afterwards."""
    monkeypatch.setitem(ENGINES, "counting", ENGINES["hf"])
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    path = tmp_path / "parts.py"
    path.write_text("".join(blocks), "utf-8")
    return str(path)


def test_a_method_of_added_parts_trains_on_an_added_engine(plugin: str, tmp_path: Path) -> None:
    method = Registry((plugin,)).method("careful")
    assert type(method.fork).__qualname__ == "Unsure"
    # No token of the demo is quite certain, and most nearly are.
    algorithm = tiny(replace(method, fork=replace(method.fork, below=1.0)), votes=8)
    trainer = make_trainer(tiny_run(tmp_path, algorithm, engine="counting"))
    before = weights(trainer)
    row = stepped(trainer)
    assert row["tree/forks"] > 0
    assert 0 <= row["advantage/at_ceiling"] < 1
    assert 0 < row["select/tokens"] <= 1
    assert trainer.states.select is not None
    assert 0 < trainer.states.select["mean"] < 1
    assert row["loss"] is not None
    assert type(trainer.engine).__qualname__ == "Counting"
    assert vars(trainer.engine)["drawn"] == row["num_tokens"]
    assert not all(torch.equal(before[name], now) for name, now in weights(trainer).items())


def test_the_value_of_a_loss_axis_keeps_what_it_says(plugin: str) -> None:
    from pyrl.loss.policy_loss import policy_loss

    old_T = torch.tensor([-1e-4, -1.0, -2.0, -3e-4], dtype=torch.float64)
    logprob_T = old_T.clone().requires_grad_()
    result = policy_loss(
        logprob_T,
        torch.ones_like(old_T),
        loss=Registry((plugin,)).make("loss", "certain"),
        old_logprob_T=old_T,
        advantage_T=torch.ones_like(old_T),
        offset_N1=torch.tensor([0, 4]),
    )
    result.loss.backward()
    assert logprob_T.grad is not None
    assert (logprob_T.grad != 0).tolist() == [False, True, True, False]


def test_their_fields_are_settings_of_the_command_line(plugin: str) -> None:
    options = ["--model", "demo", "--data", "demo:train", "--engine", "counting"]
    options += ["--fork.below", "0.5", "--advantage.ceiling.most", "2", "--plugin", plugin]
    run = parse_train(["careful", *options])
    assert run.engine == "counting"
    assert run.algorithm.fork.below == 0.5
    assert run.algorithm.advantage[-1].most == 2
    names = ["--fork", "unsure", "--advantage", "grpo,ceiling", "--loss", "certain"]
    other = parse_train(["ttrl", *names, *options]).algorithm
    assert (other.fork, other.advantage) == (run.algorithm.fork, run.algorithm.advantage)
    assert other.loss == Registry((plugin,)).make("loss", "certain")


def test_the_legend_names_the_axes_that_arrays_carry() -> None:
    legend = set(re.findall(r"^\| `([A-Z])` \|", PAGE.read_text("utf-8"), re.M))
    used = {
        letter
        for path in (PAGE.parent / "pyrl").rglob("*.py")
        for letters in re.findall(r"\b[a-z]\w*_([A-Z]{1,2})1?\b", path.read_text("utf-8"))
        for letter in letters
    }
    assert used == legend
