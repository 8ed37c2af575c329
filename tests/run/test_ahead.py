"""Sampling one step ahead: by which weights, what corrects for them, and the same bits again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_run import outcome
from tiny_run import (
    SCORING,
    make_trainer,
    quiet,
    same_bits,
    stepped,
    tiny,
    tiny_run,
    trained,
    weights,
)

from pyrl.algorithm import Algorithm
from pyrl.demo.run import echo, parse_demo, ttrl
from pyrl.engine import EngineFailure
from pyrl.engine.hf import HFEngine
from pyrl.engine.launch import ENGINES, Request
from pyrl.engine.launch import hf as launch_hf
from pyrl.learner import Learner
from pyrl.learner.guard import SamplerMismatchError
from pyrl.methods import METHODS
from pyrl.models.lora import LoRA
from pyrl.presets import PRESETS
from pyrl.ranks import Ranks, RanksError
from pyrl.report.metrics import read_metrics
from pyrl.rollout import Rollout
from pyrl.run import checkpoint
from pyrl.run.config import Run
from pyrl.run.plan import plan
from pyrl.run.sameness import check_ranks
from pyrl.select import Dynamic
from pyrl.tempered import Tempered
from pyrl.train import Trainer

STEPS = 4
COUNTED = ("num_tokens", "select/questions", "vote/majority_ratio", "loss", "ahead/staleness")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared: sums in another order are other bits."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def ahead_run(folder: Path, algorithm: Algorithm | None = None, **settings: Any) -> Run:
    """Steps that all learn something, so that another version is another policy."""
    values = {"ahead": True, "steps": STEPS, "learning_rate": 1e-5, "eval_before": False}
    values |= {"eval_after": False, "prompts_per_step": 4, "save_every": 1}
    return tiny_run(folder, algorithm or tiny(ttrl(), votes=8), **values | settings)


def echo_run(folder: Path, **settings: Any) -> Run:
    """Forks and prunes by thresholds that move with what was sampled before."""
    algorithm = replace(tiny(echo(), votes=8), updates_per_step=2)
    sample = replace(algorithm.sample, temperature=1.3)
    return ahead_run(folder, replace(algorithm, sample=sample), **settings)


def test_each_step_is_sampled_by_the_weights_of_one_update_before(tmp_path: Path) -> None:
    """The log-probs of its tokens are those of that version, and no longer the learner's."""
    trainer = make_trainer(ahead_run(tmp_path))
    versions = [weights(trainer)]
    for number in range(STEPS):
        step = trainer.train_step()
        row = trainer.observe(step)
        assert row["ahead/staleness"] == step.staleness == min(number, 1)
        assert 0 <= row["ahead/idle"] < 1
        handles = step.leaves.leaf_N.tolist()
        sampled = {v for leaf in handles for v in step.rollout.forest.path(leaf).version.tolist()}
        assert sampled == {max(0, number - 1)}
        versions.append(weights(trainer))
        rows = step.leaves.rows
        gaps = []
        for version in (versions[max(0, number - 1)], versions[number + 1]):
            trainer.model.load_state_dict(version, strict=False)
            gaps.append(np.abs(trainer.learner.after(rows) - rows.logprob_T).max())
        assert gaps[0] < 1e-3 < gaps[1]
    trainer.close()


def slowed(owner: type, name: str, patch: pytest.MonkeyPatch, seconds: float) -> None:
    method = getattr(owner, name)

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return method(*args, **options)

    patch.setattr(owner, name, slow)


def test_the_bits_do_not_depend_on_who_is_slow_nor_on_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions that a step refuses are replaced while it begins, by the weights of that time."""
    algorithm = replace(tiny(ttrl(), votes=8), select=Dynamic(rounds=1))
    found, counts = [], []
    for name, owner, call, seconds, every in (
        ("sampler", HFEngine, "step", 0.003, 0),
        ("learner", Learner, "update", 0.2, 2),
    ):
        folder = tmp_path / name
        folder.mkdir()
        with monkeypatch.context() as patch:
            slowed(owner, call, patch, seconds)
            trainer = make_trainer(
                ahead_run(folder, algorithm, eval_every=every, prompts_per_step=2)
            )
            trainer.train()
            trainer.close()
        found.append(weights(trainer))
        rows = read_metrics(trainer.run.output / "metrics.jsonl")
        counts.append([{name: row.get(name) for name in COUNTED} for row in rows])
    assert same_bits(*found)
    assert counts[0] == counts[1]
    assert max(row["select/questions"] or 0 for row in counts[0]) > 2


def test_a_step_is_sampled_while_the_one_before_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other: neither would go on if they took turns."""
    both = threading.Barrier(2, timeout=60)
    run, update = Rollout.run, Learner.update
    trainer = make_trainer(ahead_run(tmp_path, steps=3))

    def sampling(rollout: Rollout) -> Any:
        if threading.current_thread() is not threading.main_thread():
            both.wait()
        return run(rollout)

    def learning(learner: Learner, *given: Any, **named: Any) -> Any:
        if trainer.step + 1 < trainer.run.steps:
            both.wait()
        return update(learner, *given, **named)

    monkeypatch.setattr(Rollout, "run", sampling)
    monkeypatch.setattr(Learner, "update", learning)
    rows = [stepped(trainer) for _ in range(3)]
    trainer.close()
    assert [row["ahead/staleness"] for row in rows] == [0, 1, 1]
    assert "timing/waiting" in rows[2]
    assert "timing/sampling" not in rows[2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = echo_run(tmp_path_factory.mktemp("whole"))
    trainer = make_trainer(run)
    trainer.train()
    trainer.close()
    return {"data": run.data, "left": outcome(run.output, STEPS)}


class Killed(Exception):
    pass


def at_call(count: int, what: Callable[[], None], method: Callable[..., Any]) -> Any:
    calls = 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            what()
        return method(*args, **options)

    return called


def killed() -> None:
    raise Killed


def interrupted() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("owner", "name", "call", "what"),
    [
        (Rollout, "run", 3, killed),
        (Learner, "update", 2, killed),
        (Learner, "update", 3, interrupted),
    ],
    ids=["sampling", "update", "a signal in an update"],
)
def test_a_run_that_ended_anywhere_goes_on_bit_for_bit(
    owner: type,
    name: str,
    call: int,
    what: Callable[[], None],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    every = 100 if what is interrupted else 1
    run = echo_run(tmp_path, save_every=every, data=uninterrupted["data"])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(call, what, getattr(owner, name)))
        trainer = make_trainer(run)
        with pytest.raises(Killed if what is killed else KeyboardInterrupt):
            trainer.train()
        assert not [t for t in threading.enumerate() if "_grow" in t.name]
        trainer.close()
    found = checkpoint.latest(run.output)
    assert found is not None
    assert 0 < found.step < STEPS
    assert found.sampler().keys() == dict(trainer.model.named_parameters()).keys()
    again = make_trainer(replace(run, resume=True))
    again.train()
    again.close()
    assert outcome(run.output, STEPS) == uninterrupted["left"]


def test_a_run_that_is_given_more_steps_is_the_longer_run(tmp_path: Path) -> None:
    found = []
    for name, parts in (("two", (2, STEPS)), ("one", (STEPS,))):
        folder = tmp_path / name
        folder.mkdir()
        for steps in parts:
            run = ahead_run(folder, steps=steps, resume=(folder / "run").exists())
            trainer = make_trainer(run)
            trainer.train()
            trainer.close()
        found.append(weights(trainer))
    assert same_bits(*found)


def test_an_engine_that_fails_ahead_of_the_learner_says_so_when_its_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed() -> None:
        raise EngineFailure("the engine is gone")

    monkeypatch.setattr(Rollout, "run", at_call(3, failed, Rollout.run))
    trainer = make_trainer(ahead_run(tmp_path))
    with pytest.raises(EngineFailure, match="step 3: the engine is gone"):
        trainer.train()
    trainer.close()
    found = checkpoint.latest(trainer.run.output)
    assert found is not None
    assert found.step == 2


def test_a_sampler_with_other_weights_than_its_version_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(ahead_run(tmp_path, learning_rate=1e-6))
    trainer.train_step()
    trainer.sampler.drop()
    engine = trainer.sampler.engine
    with torch.no_grad():
        engine._model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(0.5)
    trainer.sampler.begin(1)
    before = weights(trainer)
    with pytest.raises(SamplerMismatchError, match="the weights after step 0, which it sampled"):
        trainer.train_step()
    assert same_bits(weights(trainer), before)
    assert trainer.step == 1
    trainer.close()


def test_the_ratio_is_to_the_policy_that_sampled_or_a_factor_corrects_for_it(
    tmp_path: Path,
) -> None:
    """With TIS the ratio is to the learner before the update, and the factor leads there."""
    plain = tiny(ttrl(), votes=8)
    tis = replace(plain, loss=PRESETS["ftis"]())
    learned = replace(plain, loss=PRESETS["lp_reg"]())
    found = {}
    for name, algorithm in (("plain", plain), ("tis", tis), ("learned", learned)):
        folder = tmp_path / name
        folder.mkdir()
        trainer, rows = trained(ahead_run(folder, algorithm), 2)
        trainer.close()
        found[name] = rows[1]
        assert rows[1]["sampling/sampling_logp_difference/max"] > 1e-3
        assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-3
    ratio = "sampling/importance_sampling_ratio/max"
    assert abs(found["plain"][ratio] - 1) > 1e-3
    assert abs(found["learned"][ratio] - 1) > 1e-3
    assert abs(found["tis"][ratio] - 1) < 1e-5
    assert abs(found["tis"]["loss/factor"] - 1) > 1e-6
    assert "old_logprobs/seconds" in found["tis"]
    assert "old_logprobs/seconds" not in found["plain"]


def test_an_adapter_is_copied_and_the_weights_below_it_are_shared(tmp_path: Path) -> None:
    trainer, _ = trained(ahead_run(tmp_path, lora=LoRA(rank=2), learning_rate=1e-3), 2)
    trainer.save()
    trainer.close()
    copy = dict(trainer.sampler.engine._model.named_parameters())
    for name, own in trainer.model.named_parameters():
        assert (copy[name] is own) == ("lora_" not in name)
    found = checkpoint.latest(trainer.run.output)
    assert found is not None
    assert {"lora_" in name for name in found.sampler()} == {True}


def test_a_plan_has_the_copy(tmp_path: Path) -> None:
    run = ahead_run(tmp_path)
    found, cuda = plan(run, 20, "cpu").always, plan(run, 20, "cuda").always
    assert found["weights of the engine"] == found["weights"] == cuda["weights of the engine"]
    assert found["weights of the last sync"] == found["weights"]
    assert "weights of the last sync" not in cuda
    adapted = plan(replace(run, lora=LoRA(rank=2)), 20, "cpu").always
    assert 0 < adapted["weights of the engine"] < found["weights"] / 10


@pytest.mark.parametrize(
    ("algorithm", "settings", "said"),
    [
        (
            tiny(METHODS["gpg"]()),
            {},
            r"ahead: expected a loss that weighs .*, got loss.ratio.of 'one'",
        ),
        (
            replace(tiny(ttrl()), temper=Tempered(share=0.25)),
            {},
            r"ahead: expected temper.share 0, got 0.25",
        ),
        (
            tiny(ttrl()),
            {"old_logprobs": "learner"},
            r"ahead: expected old_logprobs 'auto' with this loss, got 'learner'",
        ),
    ],
    ids=["no ratio", "tempered", "learner's log-probs"],
)
def test_what_cannot_be_right_is_refused_by_name(
    algorithm: Algorithm, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = ahead_run(tmp_path, algorithm, **settings)
    with pytest.raises(ValueError, match=said):
        Trainer(run, quiet(), scoring=SCORING)
    make_trainer(replace(run, ahead=False)).close()


def test_several_processes_and_engines_without_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ahead_run(tmp_path)
    with pytest.raises(RanksError, match="ahead: expected one process, got 2"):
        check_ranks(run, Ranks(size=2))

    def shared(request: Request) -> Any:
        return launch_hf(replace(request, ahead=False))

    monkeypatch.setitem(ENGINES, "shared", shared)
    with pytest.raises(ValueError, match="ahead: expected an engine with weights of its own"):
        make_trainer(replace(run, engine="shared"))


def test_the_demo_has_the_option() -> None:
    assert parse_demo(["ttrl", "--ahead"]).ahead
    assert not parse_demo(["ttrl"]).ahead
