"""Rules distilled into trees: the fit against a slow one, the file, the command and its use."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from short_run import ECHO
from tiny_run import make_trainer, stepped, tiny, tiny_run, write_questions
from toy_rollout import prompts, random_toy, rollout

from pyrl import cli
from pyrl.distilled import FEATURES, WINDOWS, Distilled, Node, Rule
from pyrl.fork import Flat
from pyrl.methods import METHODS

Captured = pytest.CaptureFixture[str]


def slow(feature_BK: np.ndarray, acts_B: np.ndarray, least: int, balance: float) -> float:
    """The least weighted Gini impurity of one cut."""

    def impurity(acts: np.ndarray) -> float:
        acting, rest = balance * acts.sum(), (~acts).sum()
        return float(2 * acting * rest / (acting + rest))

    found = []
    for value_B in feature_BK.T:
        for low, high in pairwise(np.unique(value_B)):
            below_B = value_B <= (low + high) / 2
            if min(below_B.sum(), (~below_B).sum()) >= least:
                found.append(impurity(acts_B[below_B]) + impurity(acts_B[~below_B]))
    return min(found)


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_is_the_best_one_there_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    feature_BK = rng.integers(0, 9, (80, 5)).astype(np.float64)
    acts_B = (feature_BK[:, 1] > 6) ^ (rng.random(80) < 0.1)
    tree = Node.grow(feature_BK, acts_B, depth=1, least=6, balance=3.0)
    assert tree.below is not None
    assert tree.above is not None
    below_B = feature_BK[:, tree.feature] <= tree.at
    chosen = feature_BK[:, [tree.feature]] * 0 + below_B[:, None]
    assert slow(chosen, acts_B, 6, 3.0) == pytest.approx(slow(feature_BK, acts_B, 6, 3.0))
    assert (tree.below.seen, tree.above.seen) == (below_B.sum(), (~below_B).sum())
    assert tree.above.share == pytest.approx(acts_B[~below_B].mean())


def test_a_tree_finds_a_box_and_reads_as_text() -> None:
    rng = np.random.default_rng(0)
    feature_BK = rng.random((4000, 5))
    acts_B = (feature_BK[:, 0] > 0.9) & (feature_BK[:, 2] < 0.3)
    tree = Node.grow(feature_BK, acts_B, depth=2, least=5, balance=30.0)
    other_BK = rng.random((4000, 5))
    truth_B = (other_BK[:, 0] > 0.9) & (other_BK[:, 2] < 0.3)
    assert (tree.acts(other_BK, 30.0) == truth_B).mean() > 0.995
    lines = [*tree.lines(30.0)]
    assert sum("act  (100.0%" in line for line in lines) == 1
    assert any(line.strip().startswith("smooth_entropy >  0.9") for line in lines)
    none = Node.grow(feature_BK, np.zeros(4000, bool), depth=2, least=5, balance=1.0)
    assert none == Node(0.0, 4000)
    assert not none.acts(other_BK, 1.0).any()


def rule(at: float = 0.5) -> Rule:
    """Forks where the rise of entropy is above a number."""
    tree = Node(0.5, 8, 1, at, Node(0.0, 4), Node(1.0, 4))
    return Rule(tree, dict(zip(WINDOWS, (2, 2, 2, 1, 2, 1 << 30), strict=True)), 1.0)


def test_a_rule_is_the_same_from_its_file_and_forks_in_a_run(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    rule(0.05).save(file, {"run": "here"})
    assert Rule.load(file) == rule(0.05)
    fork = Distilled(str(file))
    row = stepped(make_trainer(tiny_run(tmp_path, replace(tiny(METHODS["ttrl"]()), fork=fork))))
    assert row["tree/forks"] > 0
    flat, off = (
        rollout(random_toy(), prompts(1, 4), fork=fork, votes=6)
        for fork in (Flat(), Distilled(str(file), siblings=0))
    )
    for run in (flat, off):
        run.run()
    assert flat.forest.save() == off.forest.save()


def test_files_of_other_versions_and_none_are_refused_before_a_run(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    rule().save(file, {})
    other = json.loads(file.read_text()) | {"features": [*FEATURES, "luck"]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for name, says in (
        ("", r"fork\.file: expected the JSON of pyrl distil-rules, got none"),
        (str(tmp_path / "none.json"), "none.json: expected a rule, cannot be read"),
        (str(tmp_path / "other.json"), "other.json: expected a rule of format 1 with its 5 feat"),
    ):
        algorithm = replace(tiny(METHODS["ttrl"]()), fork=Distilled(name))
        with pytest.raises(ValueError, match=says):
            make_trainer(tiny_run(tmp_path, algorithm))


def test_the_rules_of_a_run_are_printed_tested_and_written(
    tmp_path: Path, capsys: Captured
) -> None:
    data = write_questions(tmp_path / "questions.jsonl", 12)
    words = shlex.split(
        "--model demo --device cpu --threads 1 --chat False --extractor whole --equivalence exact "
        "--prompts-per-step 4 --sample.votes 12 --sample.train 4 --sample.max-tokens 21 --steps 1 "
        "--no-eval-before --no-eval-after --loggers"
    )
    output = ["--data", str(data), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        cli.main(["train", "echo", *words, *ECHO, *output])
    capsys.readouterr()
    file = tmp_path / "rules" / "echo.json"
    distil = ["distil-rules", "--run", str(tmp_path / "run"), "--output", str(file)]
    with pytest.raises(SystemExit) as end:
        cli.main([*distil, "--steps", "3", "--least", "3"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for line in ("decisions were to fork", "decisions were to prune", "held out", str(file)):
        assert line in said
    assert set(Rule.load(file).windows.values()) >= {2, 1}
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as end:
        cli.main([*distil, "--steps", "1"])
    assert end.value.code == 2
    assert "steps: expected at least 2, got 1" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
