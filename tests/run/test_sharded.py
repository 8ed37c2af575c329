"""Weights in parts: what each process holds, and that runs end as with all weights in each."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_batch import GROUP_N, demo_model, moved, off_policy, on_policy, settings
from ranked_runs import STEPS, Job, assert_same, places
from short_run import outcome
from tiny_run import tiny_run
from torch import Tensor
from torch.distributed.tensor import DTensor

from pyrl import cli
from pyrl.learner import Learner, reader
from pyrl.learner.recompute import layers
from pyrl.loss import KL, Loss
from pyrl.ranks import ALONE, Ranks, RanksError
from pyrl.ranks.joining import joined
from pyrl.ranks.sharded import local
from pyrl.run.config import Run
from pyrl.run.plan import plan
from pyrl.run.sameness import check_ranks

Options = Callable[..., list[str]]

LEARNERS: dict[str, dict[str, Any]] = {
    "adamw": {"tokens_per_pass": 25, "gradient_checkpointing": True},
    "n_pg_igt": {"optimizer": "n_pg_igt", "tokens_per_pass": 1},
    "n_harpg": {"optimizer": "n_harpg"},
    "bfloat16": {"weights": "bfloat16"},
}
"""Settings: some with fewer passes than processes, and with numbers of passes that differ."""


def learned(run: Run, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """Weights and optimizer of two updates with a reference model, and what was held for them."""
    model = demo_model(torch.bfloat16 if run.weights == "bfloat16" else torch.float64)
    batch = on_policy(off_policy(), copy.deepcopy(model))
    learner = Learner(model, moved(model), run, ranks)
    if ranks.rank:
        while (heard := ranks.hear())[0] != "end":
            methodcaller(heard[0], *heard[1])(learner)
        return {}
    held: list[int] = []
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda *_: held.append(gathered(model)))
    for step in range(2):
        learner.update(batch, GROUP_N, step)
        batch = replace(batch, old_logprob_T=learner.logprobs(batch).astype(np.float32))
    most = max(held)
    kept = [*learner.parameters, *(p.grad for p in learner.parameters if p.grad is not None)]
    kept += [t for state in learner.optimizer.state.values() for t in state.values() if t.ndim]
    learner.gather()
    found = learner.weights() or model.state_dict()
    states, counts = learner.state()
    learner.load_state(states, counts)
    again = learner.state()[0]
    ranks.tell("end")
    assert all(torch.equal(again[name], tensor) for name, tensor in states.items())
    numbers = {"bytes": bytes_of(kept), "layers": most}
    return {**found, **states, **{n: torch.tensor(float(x)) for n, x in numbers.items()}}


def gathered(model: Any) -> int:
    """How many layers have all their weights here."""
    first = [next(layer.parameters()) for layer in layers(model)]
    return sum(not isinstance(weight, DTensor) for weight in first)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(local(tensor).untyped_storage().nbytes() for tensor in tensors)


def learn(place: dict[str, str], folder: Path) -> None:
    """One process of two, which makes all of `LEARNERS` one after the other."""
    os.environ.update(place)
    torch.set_num_threads(1)
    reader.SMALL_LOGITS = -1  # the loss reads the head's weight by itself
    with joined([], 2) as ranks:
        for name, values in LEARNERS.items():
            run = settings(Loss(kl=KL(0.1)), shard=True, updates=2, **values)
            found = learned(run, ranks)
            if not ranks.rank:
                torch.save(found, folder / name)


@pytest.fixture(scope="module")
def of_two(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    ranks = [context.Process(target=learn, args=(place, folder)) for place in places(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("name", LEARNERS)
def test_two_processes_with_half_of_the_weights_learn_as_one_with_all(
    name: str, of_two: Path
) -> None:
    run = settings(Loss(kl=KL(0.1)), updates=2, **LEARNERS[name])
    expected, found = learned(run), torch.load(of_two / name)
    assert found.pop("layers") == 1 < expected.pop("layers")
    # Each part of a weight is as large as the largest one.
    assert found.pop("bytes") <= 0.51 * expected.pop("bytes")
    assert found.keys() == expected.keys()
    # Of bfloat16 each process draws how its own part is rounded: one neighbour or the other.
    tolerance = 0.1 if name == "bfloat16" else 1e-9
    for key, tensor in expected.items():
        difference = (found[key].double() - tensor.double()).norm()
        assert difference <= tolerance * tensor.double().norm(), key


@pytest.fixture(scope="module")
def split(
    start: Callable[..., Job], options: Options, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What two processes leave that have half of the weights each."""
    output = tmp_path_factory.mktemp("split") / "run"
    job = start(*[options(output, "--shard", "--diagnostics", "attention_entropy")] * 2)
    assert job.end() == [0, 0], job.said[0].read_text()
    return outcome(output, STEPS)


def test_a_run_with_weights_in_parts_ends_as_one_process(
    one: dict[str, Any], split: dict[str, Any]
) -> None:
    rows = [dict(row) for row in split["metrics"]]
    told = [row.pop(name) for row in rows for name in [*row] if "attention_entropy" in name]
    assert len(told) > STEPS
    assert_same({**split, "metrics": rows}, one)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_run_goes_on_with_as_many_parts_or_in_one(
    start: Callable[..., Job],
    options: Options,
    one: dict[str, Any],
    split: dict[str, Any],
    killed: int,
    tmp_path: Path,
) -> None:
    """To the same bits with as many; the checkpoint is that of a run in one process."""
    output, dice = tmp_path / "run", random.Random(killed)
    job = start(*[options(output, "--shard")] * 2)
    job.wait_for(output / f"checkpoint-{dice.randint(1, STEPS - 1)}")
    time.sleep(dice.uniform(0, 0.3))
    job.ranks[killed].kill()
    codes = job.end()
    assert (codes[killed], codes[1 - killed]) == (-signal.SIGKILL, 3)
    if killed:
        assert start(*[options(output, "--resume", "--shard")] * 2).end() == [0, 0]
        found = outcome(output, STEPS)
        for name in ("model", "optimizer.safetensors", "completions"):
            assert found[name] == split[name]
    else:
        assert start(options(output, "--resume")).end() == [0]
        assert_same(outcome(output, STEPS), one)


def test_one_process_has_nothing_to_share(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, shard=True, prompts_per_step=2)
    with pytest.raises(RanksError, match=r"shard: expected several processes .* got 1"):
        check_ranks(run, ALONE)
    with pytest.raises(RanksError, match=r"engine: expected 'hf' with --shard, .* got 'vllm'"):
        check_ranks(replace(run, engine="vllm"), Ranks(size=2))


def test_a_plan_has_each_process_with_its_part(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, prompts_per_step=4)
    whole, half = (plan(r, 20, "cpu") for r in (run, replace(run, processes=2, shard=True)))
    for name in ("weights", "optimizer"):
        assert half.always[name] == whole.always[name] / 2
    assert half.phases["sampling"]["all weights"] == whole.always["weights"]
    assert half.phases["sampling"]["keys and values"] < whole.phases["sampling"]["keys and values"]
    assert 0 < half.phases["gradient"]["gathered weights"] < whole.always["weights"]
    assert half.phases["optimizer"]["gradients"] == whole.phases["optimizer"]["gradients"] / 2


def test_a_gpu_that_is_too_small_is_told_with_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("pyrl.train.Trainer.train", full)
    command = ["train", "ttrl", "--model", "demo", "--data", "demo:train", "--device", "cpu"]
    command += ["--sample.max-tokens", "12"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--output", str(tmp_path / "run")])
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert "CUDA out of memory. Tried to allocate 2 GiB" in said
    assert " GB for this run by `pyrl plan`" in said
