"""The judger: its features, its fit against a slow one, and votes that it weighs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
from tiny_run import make_trainer, tiny, tiny_run

from pyrl import cli
from pyrl.demo.run import ttrl
from pyrl.judger import FEATURES, Judger, Scorer, features, shape
from pyrl.run.judging import auc
from pyrl.train import Step
from pyrl.vote import Majority


def test_the_features_of_a_response_are_those_of_the_page() -> None:
    found = dict(zip(FEATURES, shape(np.array([0.1, 0.2, 0.25, 0.4, 1.5])), strict=False))
    assert found == pytest.approx(
        {
            "mean": 0.49,
            "deviation": 0.514198,
            "least": 0.1,
            "quarter": 0.2,
            "median": 0.25,
            "three_quarters": 0.4,
            "largest": 1.5,
            "bowley": 0.5,
            "variation": 1.049385,
            "tail_weight": 2.244898,
        },
        abs=1e-6,
    )
    assert shape(np.zeros(3)).tolist() == [0] * 10


def test_the_fit_is_the_least_of_the_ridged_loss() -> None:
    rng = np.random.default_rng(0)
    feature_NK = rng.normal(3, 2, (60, 4))
    feature_NK[:, 2] = 7  # tells nothing
    right_N = feature_NK[:, 0] + rng.normal(0, 2, 60) > 3
    scorer = Scorer.fit(feature_NK, right_N)
    x_NK = (feature_NK - feature_NK.mean(0)) / feature_NK.std(0).clip(1e-3)

    def loss(w_K: np.ndarray) -> float:
        z_N = np.where(right_N, 1, -1) * (x_NK @ w_K[:-1] + w_K[-1])
        return float(np.logaddexp(0, -z_N).sum() + 0.5 * 0.01 * 60 * (w_K[:-1] ** 2).sum())

    least = scipy.optimize.minimize(loss, np.zeros(5), tol=1e-12).x
    np.testing.assert_allclose([*scorer.weight, scorer.bias], least, atol=1e-4)
    assert scorer.weight[2] == 0 == scorer.deviation[2]
    chance_N = 1 / (1 + np.exp(-(x_NK @ least[:-1] + least[-1])))
    np.testing.assert_allclose(scorer(feature_NK), chance_N, atol=1e-4)
    assert auc(scorer(feature_NK), right_N) > 0.7
    assert auc(np.array([0.1, 0.5, 0.5]), np.array([False, True, False])) == 0.75
    with pytest.raises(ValueError, match="got 60 right ones of 60"):
        Scorer.fit(feature_NK, np.ones(60, bool))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the command line, on a few questions that the demo model knows well and others."""
    path = tmp_path_factory.mktemp("judger") / "judger.json"
    words = ["fit-judger", "--model", "demo", "--data", "demo:train", "--limit", "20"]
    words += ["--samples", "6", "--temperature", "1.2", "--max-tokens", "21", "--device", "cpu"]
    words += ["--extractor", "whole", "--equivalence", "exact", "--chat", "False"]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--output", str(path)])
    assert end.value.code == 0
    return str(path)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    run = tiny_run(tmp_path_factory.mktemp("run"), tiny(ttrl(), votes=8), prompts_per_step=4)
    return make_trainer(run).train_step()


def test_a_judger_counts_votes_at_a_power_of_0_and_asks_the_best_leaf_at_inf(
    file: str, step: Step
) -> None:
    leaves, answers = step.leaves, step.answers
    plain = Majority()(leaves, answers)
    none = Judger(power=0)(leaves, answers)
    assert none.class_G.tolist() == plain.class_G.tolist()
    assert none.ratio_G.tolist() == plain.ratio_G.tolist()
    assert Judger(power=0).metrics(leaves, answers, none) == {"vote/judged_other": 0}
    chance_N = Scorer.load(Path(file))(features(leaves))
    best = Judger(file, power=np.inf)
    for group, winner in enumerate(best(leaves, answers).class_G):
        member = np.flatnonzero(leaves.group_N == group)
        assert winner == answers.class_N[member[chance_N[member].argmax()]]
    votes = Judger(file)(leaves, answers)
    for group, ratio in enumerate(votes.ratio_G):
        member_N = leaves.group_N == group
        won_N = member_N & (answers.class_N == votes.class_G[group])
        assert ratio == pytest.approx(chance_N[won_N].sum() / chance_N[member_N].sum())
    told = Judger(file).metrics(leaves, answers, votes)
    assert told["vote/judged_right"] == pytest.approx(chance_N.mean())
    assert told["vote/judged_other"] == (plain.class_G != votes.class_G).mean()


def test_a_run_with_a_judger_tells_what_it_did(file: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, replace(tiny(ttrl()), vote=Judger(file)))
    trainer = make_trainer(run)
    assert 0 < trainer.observe(trainer.train_step())["vote/judged_right"] < 1


def test_files_of_other_versions_and_none_are_refused_before_a_run(
    file: str, tmp_path: Path
) -> None:
    def refused(name: str, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            make_trainer(tiny_run(tmp_path, replace(tiny(ttrl()), vote=Judger(name))))

    refused("", r"vote\.file: expected the JSON of pyrl fit-judger, got none")
    refused(str(tmp_path / "none.json"), "none.json: expected a judger, cannot be read")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(Path(file).read_text()) | {"format": 0}))
    refused(
        str(other), r"other\.json: expected a judger of format 1 with its 14 features, got \(0,"
    )
    other.with_name("list.json").write_text("[]")
    refused(str(other.with_name("list.json")), "expected a judger of format 1 .* got list")
    with pytest.raises(ValueError, match=r"Judger\.power: expected >= 0, got -1"):
        Judger(power=-1)
    with pytest.raises(SystemExit) as end:
        cli.main(["fit-judger", "--model", "demo", "--data", "demo:train", "--held-out", "1"])
    assert end.value.code == 2
