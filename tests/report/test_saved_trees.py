"""Saved trees: they hold all that grew, change nothing, and are refused where they are damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_rules import FORKS, PRUNES
from safetensors import safe_open
from safetensors.numpy import save_file
from saved_runs import write_trees
from tiny_run import make_trainer, stepped, tiny, tiny_run
from toy_rollout import TREES, prompts, random_toy, rollout

from pyrl.budget import Allowance
from pyrl.demo.run import echo, ttrl_unique
from pyrl.forest import REFUSED
from pyrl.fork import Fork, WithoutReplacement
from pyrl.prune import Keep, Prune
from pyrl.report.growth import grow_again
from pyrl.report.page.trees import questions
from pyrl.report.saved_trees import read_trees, saved_steps
from pyrl.rollout import Rollout
from pyrl.texts import Texts


def check_grown_again(run: Rollout) -> None:
    """Every token that was sampled is there once, in leaves as they were and in pruned branches."""
    forest, new = grow_again(run, len(run.prompts))
    forest.check()
    assert forest.stats()["tokens"] == run.counts.sampled_tokens
    old_N = np.array([old for old in new if old not in run.pruned])
    new_N = np.array([new[old] for old in old_N.tolist()])
    assert sorted(new_N.tolist()) == sorted(forest.leaves().tolist())
    assert sorted(old_N.tolist()) == sorted(run.forest.leaves().tolist())
    before, after = run.forest.leaf_table(old_N), forest.leaf_table(new_N)
    for column in ("tree_N", "length_N", "finish_N", "weight_N", "log_mass_N", "mean_entropy_N"):
        np.testing.assert_array_equal(vars_of(before, column), vars_of(after, column))
    for old, branch in new.items():
        was = run.pruned[old].path if old in run.pruned else run.forest.path(old)
        path = forest.path(branch)
        for column in ("tokens", "logprob", "entropy", "confidence", "forced", "version"):
            np.testing.assert_array_equal(vars_of(path, column), vars_of(was, column))
    assert len(forest.open()) == len(run.pruned) == sum(run.forest.pruned())


def vars_of(record: Any, column: str) -> Any:
    return getattr(record, column)


@given(fork=FORKS, prune=PRUNES, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_all_that_grew_is_grown_again(fork: Fork, prune: Prune, seed: int) -> None:
    run = rollout(
        random_toy(seed), prompts(2, 1, 3), fork=fork, prune=prune, seed=seed, remembered=3
    )
    run.run()
    check_grown_again(run)


@pytest.mark.parametrize("seed", range(5))
def test_branches_that_were_drawn_without_replacement_are_too(seed: int) -> None:
    run = rollout(
        random_toy(seed), prompts(2, 1), fork=WithoutReplacement(), prune=Keep(), remembered=2
    )
    run.run()
    check_grown_again(run)
    assert {pruned.reason for pruned in run.pruned.values()} == {REFUSED}
    # Without the memory nothing is kept.
    other = rollout(random_toy(seed), prompts(2, 1), fork=WithoutReplacement(), prune=Keep())
    other.run()
    assert other.pruned == {}


@pytest.mark.parametrize("fork", TREES)
def test_branches_that_a_budget_has_ended_are_too(fork: Fork) -> None:
    for tokens in range(20, 60):
        allowance = Allowance(tokens=tokens)
        run = rollout(
            random_toy(3), prompts(2, 1), fork=fork, allowance=allowance, remembered=2, limit=12
        )
        run.run()
        check_grown_again(run)


@pytest.mark.parametrize("method", [echo, ttrl_unique])
def test_saving_trees_changes_no_number_of_a_run(method: Any, tmp_path: Path) -> None:
    """A file a step; metrics and weights are those of the run that saves none."""
    run = tiny_run(tmp_path, tiny(method(), votes=8), learning_rate=1e-4)
    rows: dict[int, list[dict[str, Any]]] = {}
    for count in (0, 5):  # more than the two questions of a step
        trainer = make_trainer(replace(run, save_trees=count, output=tmp_path / str(count)))
        rows[count] = [stepped(trainer) for _ in range(2)]
    for row, other in zip(*rows.values(), strict=True):
        same = {
            n for n in row if not n.startswith("timing/") and n not in ("step_time", "cpu_time")
        }
        assert {n: row[n] for n in same} == {n: other[n] for n in same}
    assert saved_steps(tmp_path / "0") == []
    assert [step for step, _ in saved_steps(tmp_path / "5")] == [1, 2]


def test_a_file_has_texts_votes_rewards_advantages_and_what_the_update_did(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(ttrl_unique(), votes=4), save_trees=2, learning_rate=1e-3)
    trainer = make_trainer(run)
    step = trainer.train_step()
    trainer.observe(step)
    saved = read_trees(run.output / "trees" / "1.safetensors")
    leaves = step.leaves
    branches = saved.record["branches"]
    told = [b for b in branches if "pruned" not in b]
    assert sorted(b["text"] for b in told) == sorted(leaves.text_N)
    assert {b["pruned"] for b in branches[len(told) :]} == {"less probable than those kept"}
    assert [q["text"] for q in saved.record["questions"]] == [p.text for p in step.prompts]
    assert [q["label"] for q in saved.record["questions"]] == list(step.votes.label_G)
    row_of = {text: n for n, text in enumerate(leaves.text_N)}
    row_N = [row_of[b["text"]] for b in told]
    assert [b["reward"] for b in told] == step.reward_N[row_N].tolist()
    assert [b["answer"] for b in told] == [step.answers.answer_N[n] for n in row_N]
    token_N = [saved.forest.path(b).tokens for b in saved.branch_N.tolist()]
    texts = Texts(tuple(b["text"] for b in branches), tuple(token_N), leaves.decode)
    np.testing.assert_array_equal(saved.end_T, texts.span_T2[:, 1])
    # The model after the update, by the engine that has its weights now.
    sampled_T = np.concatenate([saved.forest.path(b).logprob for b in saved.branch_N.tolist()])
    known_T = np.isfinite(saved.after_T)
    assert known_T.sum() == sum(len(leaves.token_N[n]) for n in row_N)
    reward_T = np.concatenate(
        [np.full(len(leaves.token_N[n]), step.reward_N[n]) for n in row_N]
        + [np.full((~known_T).sum(), np.nan)]
    )
    gain_T = saved.after_T - sampled_T
    assert gain_T[reward_T == 1].mean() > gain_T[reward_T == 0].mean()
    order = np.argsort(row_N)
    kept = np.split(saved.advantage_T[known_T], np.cumsum([len(leaves.token_N[n]) for n in row_N]))
    np.testing.assert_allclose(
        np.concatenate([kept[n] for n in order]), step.advantage_T, rtol=1e-6
    )


def test_the_page_has_each_token_once_with_means_over_the_leaves_through_it(tmp_path: Path) -> None:
    words = ["a", "bc", "", "\n", "é"]
    saved = read_trees(write_trees(tmp_path, 3, words, trunks=2, leaves=3, length=9))
    (tree,) = questions(saved, most=1000)
    assert tree["step"] == 3
    segments, of_branch = tree["segments"], {b["segment"]: b for b in tree["branches"]}
    assert sum(length for *_, length in segments) == len(tree["word"])
    assert len(tree["word"]) == saved.forest.stats()["tokens"]
    first = np.cumsum([0, *(length for *_, length in segments)])
    texts = []
    for s in of_branch:
        path = []
        while s >= 0:
            path.insert(0, s)
            s = segments[s][0]
        ids = [u for s in path for u in range(first[s], first[s + 1])]
        texts.append("".join(tree["words"][tree["word"][u]] for u in ids))
    assert sorted(texts) == sorted(b["text"] for b in saved.record["branches"])
    trunk = next(s for s, (parent, *_) in enumerate(segments) if parent < 0)
    # Leaves 0, 1 and 2 of a trunk have advantages of -1, 0 and 1: their mean is 0.
    assert tree["advantage"][first[trunk]] == 0
    assert {b["advantage"] for b in of_branch.values() if "pruned" not in b} == {-1, 0, 1}
    assert {b["advantage"] for b in of_branch.values() if "pruned" in b} == {None}


def test_a_tree_that_is_too_large_is_shown_as_far_as_it_fits(tmp_path: Path) -> None:
    """Its other leaves are told of, for the vote."""
    saved = read_trees(write_trees(tmp_path, 3, ["a", "b"], trunks=2, leaves=3, length=9))
    (whole,), (part,) = (list(questions(saved, most=most)) for most in (1000, 20))
    assert [b["segment"] is None for b in part["branches"]] == [False] * 2 + [True] * 6
    for name in ("answer", "pruned", "reward"):
        assert [b.get(name) for b in part["branches"]] == [b.get(name) for b in whole["branches"]]
    assert len(part["word"]) == 4 + 5 + 5
    (least,) = questions(saved, most=1)
    assert len(least["word"]) == 9
    assert least["segments"] == [[-1, 0, 9]]


def test_damaged_trees_are_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = write_trees(tmp_path, 1, ["a", "b"], trunks=1, leaves=2, length=4)
    whole = path.read_bytes()
    with safe_open(path, "numpy") as file:
        record = json.loads(file.metadata()["record"])
        columns = {name: file.get_tensor(name) for name in sorted(file.keys())}
    for cut in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"1\.safetensors: expected saved trees, got Safetens"):
            read_trees(path)
    save_file(columns, path, {"record": json.dumps(record | {"format": 99})})
    with pytest.raises(ValueError, match=r"1\.safetensors: .* format 1, got format 99: another"):
        read_trees(path)
    save_file(
        columns | {"forest": columns["forest"][:-1].copy()}, path, {"record": json.dumps(record)}
    )
    with pytest.raises(ValueError, match=r"1\.safetensors: .* forest bytes"):
        read_trees(path)
    save_file(columns, path)
    with pytest.raises(ValueError, match=r"1\.safetensors: expected saved trees, got KeyError"):
        read_trees(path)
