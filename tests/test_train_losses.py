"""Every published loss in a run: it trains, or a sentence says what it needs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from acting import ACTS
from learner_batch import (
    GROUP_N,
    PLAIN,
    PROMPT_N,
    RESPONSE_N,
    demo_model,
    off_policy,
    on_policy,
    settings,
)
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, weights, write_questions

from pyrl import demo, learner
from pyrl.algorithm import Algorithm
from pyrl.demo.run import echo, ttrl
from pyrl.learner import Learner
from pyrl.loss import (
    KL,
    Blend,
    Clip,
    ClipV,
    EntropySmoothing,
    Loss,
    NucleusAnchor,
    Penalty,
    TokenGroup,
    TopCovariance,
    Unbounded,
)
from pyrl.loss.old_policy import Memory, expert_column
from pyrl.loss.penalties import ExpertLeak
from pyrl.loss.presets import PRESETS
from pyrl.loss.terms import Terms
from pyrl.methods import METHODS
from pyrl.pack import pack_given
from pyrl.report.metrics import MEANING
from pyrl.run.directory import claim
from pyrl.train import Trainer

torch.set_num_threads(1)


def with_loss(loss: Loss, **changes: Any) -> Algorithm:
    return replace(tiny(ttrl(), votes=4), loss=loss, **changes)


def with_experts(path: Path, column: str = "expert") -> str:
    """Four questions whose true answers are an expert's responses."""
    rows = [json.loads(line) for line in demo.QUESTIONS["train"].read_text().splitlines()[:4]]
    lines = [json.dumps({"prompt": row["prompt"], column: row["answer"]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def terms(monkeypatch: pytest.MonkeyPatch) -> list[Terms]:
    """The terms of each mini-batch, as they are made."""
    made: list[Terms] = []
    inner = learner.loss_terms

    def note(*args: Any, **kwargs: Any) -> Terms:
        made.append(inner(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(learner, "loss_terms", note)
    return made


def only_terms(terms: list[Terms]) -> Terms:
    """Of the one mini-batch that was made since the last call."""
    (made,) = terms
    terms.clear()
    return made


# -- every preset --


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ACTS])
def test_every_preset_trains(name: str, tmp_path: Path) -> None:
    """The others do as the losses of their methods."""
    trainer = make_trainer(tiny_run(tmp_path, with_loss(PRESETS[name](), updates_per_step=2)))
    before = weights(trainer)
    row = stepped(trainer)
    assert row["grad_norm"] > 0
    assert not same_bits(weights(trainer), before)
    assert {n for n in row if n.startswith("old_logprobs/")} <= MEANING.keys()


def test_rewards_that_are_no_signs_are_refused_by_the_loss_that_needs_signs(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, with_loss(PRESETS["entrocraft"]()))
    with pytest.raises(ValueError, match=r"rewards of -1 or 1, got 0 by VoteReward; .*wrong -1"):
        make_trainer(run)


def test_a_loss_that_reads_an_expert_is_refused_without_one(tmp_path: Path) -> None:
    refused = (
        r"questions.jsonl: loss.penalties: ExpertLeak needs an expert's response to each question "
        r"in the column 'teacher' \(--loss.penalties.expert-leak.expert\), got None for question 0"
    )
    loss = replace(PRESETS["calibrl"](), penalties=(ExpertLeak(expert="teacher"),))
    with pytest.raises(ValueError, match=refused):
        make_trainer(tiny_run(tmp_path, with_loss(loss)))
    data = with_experts(tmp_path / "data.jsonl", "teacher")
    assert stepped(make_trainer(tiny_run(tmp_path, with_loss(loss), data=data)))["loss"] != 0


# -- the learner's own log-probs --


@pytest.mark.parametrize("name", ["tis", "icepop"])
def test_an_engine_of_another_precision_has_another_policy(
    name: str, tmp_path: Path, terms: list[Terms]
) -> None:
    """The engine computes in float32, the learner in bfloat16: factors are old / rollout."""
    run = tiny_run(tmp_path, with_loss(PRESETS[name]()), dtype="bfloat16")
    row = stepped(make_trainer(run))
    factor_T = only_terms(terms).factor_T
    assert factor_T is not None
    assert 0 < float((factor_T - 1).abs().mean()) < 0.05
    assert row["sampling/importance_sampling_ratio/max"] == 1.0
    assert row["old_logprobs/seconds"] > 0
    # Twelve prompts of 16 to 18 tokens, and their responses.
    assert 8 * 16 < row["old_logprobs/tokens"] < 8 * (18 + 21)


def test_a_loss_that_compares_both_is_refused_with_the_engine_s_alone(tmp_path: Path) -> None:
    for name, need in (
        ("tis", "TIS: needs the column rollout_logprob_T"),
        ("minirl", "loss.ratio: needs the column rollout_logprob_T"),
        ("clip_v", "ClipV: needs the column sum_p2_T"),
        ("siren", "NucleusAnchor: needs the column nucleus_entropy_T"),
    ):
        expected = f"old_logprobs: expected 'auto' or 'learner' for this loss, got 'engine': {need}"
        with pytest.raises(ValueError, match=expected):
            make_trainer(tiny_run(tmp_path, with_loss(PRESETS[name]()), old_logprobs="engine"))


def test_the_pass_is_made_where_somebody_reads_it() -> None:
    """The first update of a step learns with the policy that it would look up."""
    batch = on_policy(off_policy(), demo_model(torch.float32))
    ppo, tis = PRESETS["ppo"](), PRESETS["tis"]()
    for loss, updates, samples, whose, made in (
        (ppo, 2, "float32", "auto", False),
        (tis, 1, "float32", "auto", True),
        (ppo, 1, "bfloat16", "auto", False),
        (ppo, 2, "bfloat16", "auto", True),
        (ppo, 1, "float32", "learner", False),
        (ppo, 2, "float32", "learner", True),
        (ppo, 2, "bfloat16", "engine", False),
        (PRESETS["kl_cov"](), 2, "float32", "auto", True),
    ):
        run = settings(loss, updates=updates, old_logprobs=whose, learning_rate=1e-7)
        learned = Learner(demo_model(torch.float32), None, run)
        learned.sampler_dtype = samples
        row = learned.update(batch, GROUP_N, 0)
        assert ("old_logprobs/seconds" in row) == made, (loss, updates, samples, whose)


def test_another_engine_has_another_policy_also_in_the_same_precision() -> None:
    learned = Learner(demo_model(torch.float32), None, settings())
    assert not learned.looks
    learned.sampler_shares = False
    assert learned.looks


# -- penalties by absolute value --


@pytest.mark.parametrize("whose", ["auto", "engine"])
def test_kl_cov_does_not_push_by_the_sign_of_rounding(whose: Any, tmp_path: Path) -> None:
    """On policy |logprob - old| has no gradient, however large its coefficient."""
    found = []
    for coef in (0.0, 1000.0):
        penalty = Penalty(coef, "abs", "old", TopCovariance(0.5))
        loss = Loss(bounds=Unbounded(), dual=None, kl=KL(0.0), penalties=(penalty,))
        trainer = make_trainer(tiny_run(tmp_path, with_loss(loss), old_logprobs=whose))
        stepped(trainer)
        found.append(weights(trainer))
        trainer.close()
    assert same_bits(*found)


# -- updates that share a step's samples --


def test_methods_state_the_updates_of_their_papers() -> None:
    """All others train once on all samples of a step."""
    updates = {name: make().updates_per_step for name, make in METHODS.items()}
    assert {name: several for name, several in updates.items() if several > 1} == {
        **dict.fromkeys(("ttrl", "ttrl_unique", "ettrl", "echo", "echo_paper"), 8),
        **dict.fromkeys(("echo_fixed", "echo_released", "dr_grpo", "siren", "clip_cov"), 8),
        **dict.fromkeys(("dapo", "steer", "steer_exp", "top_entropy", "hapo", "cispo"), 16),
        **dict.fromkeys(("scrl", "ddrl", "ttrl_guard", "evol_rl", "om_grpo", "spear"), 8),
        "kl_cov": 8,
        "ctpo": 16,
        "gspo": 4,
    }
    with pytest.raises(ValueError, match="updates_per_step: expected >= 1, got 0"):
        replace(METHODS["grpo"](), updates_per_step=0)


def test_the_bounds_of_the_demo_s_echo_act(tmp_path: Path) -> None:
    method = echo()
    assert method.updates_per_step > 1
    found = []
    for bounds in (method.loss.bounds, Clip(0.2, 0.2), Clip(1e-3, 1e-3)):
        algorithm = tiny(method, votes=8, updates=method.updates_per_step)
        algorithm = replace(algorithm, loss=replace(method.loss, bounds=bounds))
        run = tiny_run(tmp_path, algorithm, learning_rate=3e-3, prompts_per_step=4)
        trainer = make_trainer(run)
        row = stepped(trainer)
        assert row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"] > 0
        found.append(weights(trainer))
        trainer.close()
    assert not any(same_bits(a, b) for a, b in combinations(found, 2))


def alarms(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a whole run says."""
    said: list[str] = []
    monkeypatch.setattr(trainer.progress, "alarm", said.append)
    trainer.train()
    return said


@pytest.mark.parametrize("updates", [1, 2])
def test_a_loss_whose_bounds_can_never_act_is_said_once(
    updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = replace(tiny(ttrl(), votes=4), updates_per_step=updates)
    write_questions(tmp_path / "questions.jsonl", 4, [None] * 4)  # nothing to score
    run = tiny_run(tmp_path, algorithm, steps=2)
    never = [said for said in alarms(make_trainer(run), monkeypatch) if "can never act" in said]
    assert len(never) == (updates == 1)
    assert all(said.startswith("loss.bounds and loss.dual can never act: one") for said in never)


@pytest.mark.parametrize(
    ("name", "how", "never"),
    [
        ("dapo", {}, ["loss.bounds"]),
        ("gmpo", {}, ["loss.ratio.pre_clip"]),
        ("reinforce", {}, []),
        ("kl_cov", {}, ["loss.penalties"]),
        ("dapo", {"dtype": "bfloat16"}, ["loss.bounds"]),
        ("dapo", {"dtype": "bfloat16", "old_logprobs": "engine"}, []),
        ("hispo", {}, ["loss.bounds", "loss.dual"]),
        ("hispo", {"dtype": "bfloat16"}, []),
        ("minirl", {"dtype": "bfloat16"}, ["loss.bounds"]),
    ],
)
def test_what_can_never_act_depends_on_where_a_ratio_could_come_from(
    name: str, how: dict[str, Any], never: list[str], tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, with_loss(PRESETS[name]()), **how)
    assert make_trainer(run).learner.never_acts == never


# -- what outlives a step --


def test_a_resumed_loss_goes_on_with_its_history_and_its_anchor(tmp_path: Path) -> None:
    """The first level of the nucleus entropy, and the entropies of the steps before."""
    loss = replace(
        PRESETS["dcpo"](), entropy=0.001, penalties=(NucleusAnchor(), EntropySmoothing(1.0))
    )
    algorithm = with_loss(loss, updates_per_step=2)
    run = tiny_run(tmp_path, algorithm, learning_rate=1e-4, resume=True)
    claim(run)
    whole = make_trainer(run)
    for _ in range(2):
        stepped(whole)
    whole.save()
    whole.lock.release()
    again = make_trainer(run)
    assert again.step == 2
    assert again.learner.memory == whole.learner.memory
    assert whole.learner.memory.nucleus_entropy is not None
    rows = [stepped(trainer) for trainer in (whole, again)]
    assert rows[0]["loss"] == rows[1]["loss"]
    assert same_bits(weights(whole), weights(again))
    again.learner.memory = Memory()
    whole_row, forgetful_row = (stepped(trainer) for trainer in (whole, again))
    assert whole_row["loss"] != forgetful_row["loss"]


def test_the_band_of_epo_follows_the_history(tmp_path: Path, terms: list[Terms]) -> None:
    """In the first step every token is outside; then those beyond a band about the mean."""
    loss = replace(PRESETS["epo"](), penalties=(EntropySmoothing(1.0, low=0.0, high=1e9),))
    trainer = make_trainer(tiny_run(tmp_path, with_loss(loss)))
    found = []
    for _ in range(2):
        stepped(trainer)
        addend_T = only_terms(terms).addend_T
        assert addend_T is not None
        found.append(addend_T.unique().tolist())
    assert found == [[1.0], [0.0]]


# -- the columns of the pass, slow and obvious --


def test_the_columns_of_the_pass_are_those_of_a_plain_forward() -> None:
    batch = replace(off_policy(), reward_N=np.array([1.0, 0, 1, 0, np.nan, 1]))
    penalties = (Penalty(1.0, "k3", "proxy", kept_share=0.3), NucleusAnchor(mass=0.7))
    loss = replace(PLAIN, reshape=(Blend(target=9.0),), keep=(ClipV(),), penalties=penalties)
    learned = Learner(demo_model(), None, settings(loss, tokens_per_pass=30))
    state = learned.memory.state(batch, seed=0, progress=0.0)
    looked, cost = learned._look(replace(batch, group_N=GROUP_N), state, 1, None)
    assert cost["old_logprobs/tokens"] == len(batch.input_I)
    model, rows = demo_model(), []
    for leaf in range(len(batch)):
        inputs = torch.from_numpy(batch.input_I[slice(*batch.input_offset_N1[leaf : leaf + 2])])
        with torch.no_grad():
            logits = model(input_ids=inputs[None], use_cache=False).logits[0]
        rows.append(logits[PROMPT_N[leaf] - 1 : -1])
    logits_TV, label_T = torch.cat(rows), torch.from_numpy(batch.label_T)[:, None]
    logp_TV = (logits_TV / 0.6).log_softmax(-1)
    p_TV = logp_TV.exp()
    kept_TV = p_TV >= 0.3 * p_TV.amax(-1, keepdim=True)
    proxy_TV = logp_TV - (p_TV * kept_TV).sum(-1, keepdim=True).log()
    expected = {
        "old_logprob_T": logp_TV.gather(1, label_T)[:, 0],
        "entropy_T": -(p_TV * logp_TV).sum(-1),
        "sum_p2_T": p_TV.square().sum(-1),
        "sum_p2_logp_T": (p_TV.square() * logp_TV).sum(-1),
        "proxy_logprob_T": proxy_TV.where(kept_TV, -torch.inf).gather(1, label_T)[:, 0],
        "second_logprob_T": (logits_TV / 0.72).log_softmax(-1).gather(1, label_T)[:, 0],
    }
    for name, column_T in expected.items():
        np.testing.assert_allclose(looked.columns[name], column_T, atol=1e-9, err_msg=name)
    assert np.isinf(looked.columns["proxy_logprob_T"]).any()
    assert (looked.columns["nucleus_entropy_T"] < looked.columns["entropy_T"] + 1e-9).all()


def test_an_expert_is_read_at_the_same_position_and_not_after_its_end() -> None:
    batch = replace(off_policy(), group_N=GROUP_N)
    lengths = [3, 20, 5]
    responses = [np.full(n, 4, np.int64) for n in lengths]
    experts = pack_given([np.array([2, 3], np.int32)] * 3, responses)
    theirs_T = np.arange(sum(lengths), dtype=np.float64)
    found_T = expert_column(batch, experts, theirs_T)
    for leaf, group in enumerate(GROUP_N):
        span = slice(*batch.token_offset_N1[leaf : leaf + 2])
        start = sum(lengths[:group])
        row = [start + t if t < lengths[group] else np.nan for t in range(RESPONSE_N[leaf])]
        np.testing.assert_array_equal(found_T[span], row)


def test_a_response_whose_reward_is_unknown_takes_no_part_where_rewards_count() -> None:
    """NaN is not 0: the terms are those of the batch without it."""
    reward_N = np.array([1.0, 0.0, 1.0, 0.0, np.nan, 1.0])
    batch = replace(off_policy(), reward_N=reward_N, group_N=GROUP_N)
    rest = batch.take(np.array([0, 1, 2, 3, 5]))
    run = settings(replace(PLAIN, reshape=(TokenGroup(),)))
    whole, without = (Learner(demo_model(), None, run)._terms(b, None) for b in (batch, rest))
    kept_T = torch.from_numpy(batch.leaf_T != 4)
    torch.testing.assert_close(whole.advantage_T[kept_T], without.advantage_T, rtol=0, atol=0)
    assert float(whole.weight_T[~kept_T].abs().sum()) == 0
    torch.testing.assert_close(whole.weight_T[kept_T], without.weight_T, rtol=0, atol=0)
