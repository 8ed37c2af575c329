"""Whole training steps: what is equal to what, and what true answers may not touch."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    make_trainer,
    same_bits,
    stepped,
    tiny,
    tiny_run,
    trained,
    weights,
    write_questions,
)

from pyrl import demo
from pyrl.algorithm import Algorithm
from pyrl.demo.run import echo, ettrl, ttrl
from pyrl.engine.hf import HFEngine
from pyrl.fork import TopEntropy
from pyrl.learner.guard import SamplerMismatchError
from pyrl.loss import KL, Clip
from pyrl.methods import METHODS
from pyrl.models import load_model
from pyrl.prune import Keep
from pyrl.reward import OverlongReward, RandomReward
from pyrl.select import Dynamic


def final_weights(folder: Path, algorithm: Algorithm, **settings: Any) -> dict[str, torch.Tensor]:
    """After two steps in a folder of its own; the questions are those of the parent folder."""
    folder.mkdir()
    questions = folder.parent / "questions.jsonl"
    if not questions.exists():
        write_questions(questions, 4)
    run = tiny_run(folder, algorithm, **{"data": str(questions)} | settings)
    return weights(trained(run, 2)[0])


def with_kl(algorithm: Algorithm) -> Algorithm:
    return replace(algorithm, loss=replace(algorithm.loss, kl=KL(0.01)))


# -- sampler and learner --


@pytest.mark.parametrize("make", [ttrl, ettrl, echo])
def test_sampler_and_learner_are_the_same_policy_in_every_step(make: Any, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(make(), votes=8))
    for metrics in trained(run, 3)[1]:
        assert abs(metrics["sampling/importance_sampling_ratio/mean"] - 1) < 1e-5
        assert abs(metrics["sampling/importance_sampling_ratio/max"] - 1) < 1e-4
        assert 0 < metrics["sampling/sampling_logp_difference/max"] < 1e-3
        assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0


def test_a_sampler_that_keeps_one_stale_tensor_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_run(tmp_path))
    stale = copy.deepcopy(trainer.model)
    eos = {int(trainer.tokenizer.eos_token_id)}
    trainer.sampler.engine = HFEngine(stale, eos, max_rows=trainer.run.max_rows)
    trainer.train_step()
    name = "model.layers.0.mlp.down_proj.weight"
    old = stale.get_parameter(name).detach().clone()
    stale.load_state_dict(trainer.model.state_dict())
    trainer.sampler.engine.load_weights(None, 1)
    trainer.train_step()  # all tensors are those of the learner
    stale.load_state_dict(trainer.model.state_dict() | {name: 0.5 * old})
    trainer.sampler.engine.load_weights(None, 2)
    before = weights(trainer)
    with pytest.raises(SamplerMismatchError, match="sampler has the learner's weights"):
        trainer.train_step()
    assert same_bits(weights(trainer), before)
    assert trainer.step == 2


# -- answers --


def test_true_answers_never_reach_the_weights(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in demo.QUESTIONS["train"].read_text().splitlines()[:4]]
    true = [row["answer"] for row in rows]
    found = {}
    for name, answers in {
        "true": true,
        "shuffled": true[1:] + true[:1],
        "absent": [None] * 4,
    }.items():
        data = write_questions(tmp_path / f"{name}.jsonl", 4, answers)
        found[name] = final_weights(tmp_path / name, tiny(ttrl()), data=str(data))
    assert same_bits(found["true"], found["shuffled"])
    assert same_bits(found["true"], found["absent"])


def test_the_weights_depend_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    first, again, other = (
        final_weights(tmp_path / name, tiny(ttrl()), seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same_bits(first, again)
    assert not same_bits(first, other)


# -- degenerate trees --


@pytest.mark.parametrize("train", [6, 3])
def test_ettrl_without_forks_and_reshaping_is_ttrl_bit_for_bit(train: int, tmp_path: Path) -> None:
    parent, child = tiny(ttrl(), train=train), tiny(ettrl(), train=train)
    flat = replace(child, fork=TopEntropy(forks=0), advantage=child.advantage[:1])
    assert same_bits(final_weights(tmp_path / "a", parent), final_weights(tmp_path / "b", flat))


@pytest.mark.parametrize("train", [6, 3])
def test_echo_of_width_one_and_without_its_shaping_is_ttrl_bit_for_bit(
    train: int, tmp_path: Path
) -> None:
    parent, child = tiny(ttrl(), train=train), tiny(echo(), train=train)
    flat = replace(
        child,
        fork=replace(child.fork, max_width=1),
        prune=Keep(),
        advantage=child.advantage[:1],
        loss=replace(child.loss, bounds=Clip()),
    )
    assert same_bits(final_weights(tmp_path / "a", parent), final_weights(tmp_path / "b", flat))


@pytest.mark.parametrize("change", ["fork", "advantage", "loss"])
def test_each_part_of_echo_changes_the_weights(change: str, tmp_path: Path) -> None:
    parent = tiny(ttrl(), votes=8)
    part = getattr(tiny(echo(), votes=8), change)
    # On policy no ratio meets a bound: only later updates of a step see the clip.
    how = {"learning_rate": 3e-3} if change == "loss" else {}
    parent = replace(parent, updates_per_step=2 if change == "loss" else 1)
    child = replace(parent, **{change: part})
    first, second = (
        final_weights(tmp_path / name, algorithm, **how)
        for name, algorithm in (("a", parent), ("b", child))
    )
    assert not same_bits(first, second)


# -- questions in the place of others --


def test_dapo_without_its_parts_is_grpo_with_its_clip_bit_for_bit(tmp_path: Path) -> None:
    child = tiny(METHODS["dapo"]())
    child = replace(child, reward=OverlongReward(penalty=0.0), select=Dynamic(rounds=0))
    parent = replace(tiny(METHODS["grpo"]()), loss=child.loss)
    assert same_bits(final_weights(tmp_path / "a", parent), final_weights(tmp_path / "b", child))


def test_other_questions_are_sampled_until_the_rewards_of_enough_differ(tmp_path: Path) -> None:
    """A coin that is rarely 1: most of the questions of a step give their six leaves equal ones."""
    write_questions(tmp_path / "questions.jsonl", 12)
    algorithm = replace(tiny(ttrl()), reward=RandomReward(p=0.04), select=Dynamic())
    trainer = make_trainer(tiny_run(tmp_path, algorithm, prompts_per_step=3))
    for _ in range(2):
        step = trainer.train_step()
        metrics = trainer.observe(step)
        assert len({prompt.index for prompt in step.prompts}) == len(step.prompts)
        assert metrics["select/questions"] == len(step.prompts) > 3
        assert metrics["frac_reward_zero_std"] == 0 < metrics["select/idle_tokens"] < 1
        assert len(np.unique(step.leaves.group_N[step.kept_N])) <= 3
        assert metrics["loss"] != 0 < metrics["grad_norm"]
    assert len(step.reward_N) == 6 * len(step.prompts)


# -- memory --


def test_the_size_of_a_pass_changes_the_weights_by_rounding_only(tmp_path: Path) -> None:
    # Adam divides a gradient by its own size: where the gradient is only rounding, so is the step.
    large, small = (
        final_weights(tmp_path / name, with_kl(tiny(ttrl())), tokens_per_pass=n, learning_rate=1e-6)
        for name, n in (("a", 10_000), ("b", 40))
    )
    start = load_model("demo")[0].state_dict()
    moved = torch.cat([(large[n] - start[n]).flatten() for n in large])
    differ = torch.cat([(large[n] - small[n]).flatten() for n in large])
    assert float(moved.abs().max()) > 1e-6
    assert float(differ.norm()) < 0.02 * float(moved.norm())


# -- a step without anything to learn --


def test_a_step_in_which_no_answer_can_be_read_leaves_the_weights_alone(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, with_kl(tiny(ttrl())), extractor="regex:(x+)", weight_decay=0.1)
    trainer = make_trainer(run)
    before = weights(trainer)
    metrics = stepped(trainer)
    assert same_bits(weights(trainer), before)
    assert metrics["vote/answered"] == 0
    assert "loss" not in metrics
    assert trainer.step == 1


def test_equal_rewards_leave_the_weights_alone(tmp_path: Path) -> None:
    algorithm = replace(tiny(ttrl()), reward=RandomReward(p=1))
    trainer = make_trainer(tiny_run(tmp_path, algorithm, weight_decay=0.1))
    before = weights(trainer)
    metrics = stepped(trainer)
    assert same_bits(weights(trainer), before)
    assert metrics["reward"] == metrics["frac_reward_zero_std"] == 1
    assert metrics["loss"] == metrics["grad_norm"] == 0
