"""Every method and every option of a method trains the demo model for a few steps."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from acting import ACTS
from tiny_run import make_trainer, stepped, tiny, tiny_run, weights

from pyrl import advantage
from pyrl.advantage import AdvantageClip, EntropyReshape, Hybrid, TreeRLReleased, WhitenTokens
from pyrl.algorithm import Algorithm, Sample
from pyrl.demo import run as demo
from pyrl.fork import EPTree, Flat, OnlineEntropy, TopEntropy
from pyrl.loss import KL, Clip, ConfidenceClip
from pyrl.loss.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm
from pyrl.methods import METHODS
from pyrl.report.metrics import MEANING
from pyrl.reward import FunctionReward, RandomReward, TrueReward, VoteReward
from pyrl.select import First, Stratified
from pyrl.vote import Majority, Weighted

Make = Callable[[], Algorithm]

ALWAYS = [
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "loss",
    "grad_norm",
    "learning_rate",
    "step_time",
    "timing/sampling",
    "timing/scoring",
    "timing/updating",
    "timing/syncing",
    "pack/tokens",
    "pack/unique",
    "pack/repeated",
    "pack/disagreeing",
    "pack/chunked_head",
    "num_tokens",
    "completions/mean_length",
    "completions/clipped_ratio",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "vote/majority_ratio",
    "vote/majority_ratio_min",
    "vote/answered",
    "vote/distinct_labels",
    "vote/label_flips",
    "vote/icc",
    "vote/label_accuracy",
    "vote/reward_accuracy",
    "vote/ground_truth_reward",
    "vote/pass_any",
    "tree/leaves",
    "tree/depth",
    "tree/forks",
    "tree/tokens_saved_ratio",
]
"""Metrics of every step whose questions have answers, whatever the method."""


def train(algorithm: Algorithm, folder: Path, steps: int = 3, **settings: Any) -> list[dict]:
    """Metrics of the steps, in all of which all parameters change and nothing is infinite."""
    rows = []
    trainer = make_trainer(tiny_run(folder, algorithm, **settings))
    for _ in range(steps):
        before = weights(trainer)
        rows.append(stepped(trainer))
        after = weights(trainer)
        assert [name for name in before if torch.equal(before[name], after[name])] == []
        assert all(bool(torch.isfinite(value).all()) for value in after.values())
    for row in rows:
        unknown = {name for name, value in row.items() if value is None}
        assert unknown <= {"vote/icc", "vote/label_flips"}  # cannot be estimated
    return rows


def forking(algorithm: Algorithm) -> Algorithm:
    """With the trees of the demo, whose answers are short."""
    return replace(algorithm, fork=TopEntropy(mask_tail=1), select=Stratified())


# -- methods --


def test_every_metric_that_all_methods_have_is_explained() -> None:
    assert set(ALWAYS) <= MEANING.keys()


def explained(row: Mapping[str, Any]) -> bool:
    """Of the metrics over all leaves and over those that train the meaning is the same."""
    names = (n.replace("vote/post_", "vote/") for n in row if not n.startswith(("eval/", "step")))
    return set(names) <= MEANING.keys() | {"step_time"}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ACTS])
def test_each_method_trains(name: str, tmp_path: Path) -> None:
    algorithm = tiny(METHODS[name](), votes=10, train=8)
    rows = train(algorithm, tmp_path)
    for row in rows:
        assert row.keys() >= set(ALWAYS)
        assert explained(row), row.keys() - MEANING.keys()
        assert ("kl" in row) == (algorithm.loss.kl.coef > 0)
    if algorithm.loss.kl.coef:
        assert rows[0]["kl"] == 0.0
        assert rows[-1]["kl"] > 0


@pytest.mark.parametrize("name", demo.METHODS)
def test_each_method_of_the_demo_trains(name: str, tmp_path: Path) -> None:
    algorithm = demo.METHODS[name]()
    updates = algorithm.updates_per_step
    rows = train(tiny(algorithm, votes=16, train=8, updates=updates), tmp_path)
    grows_trees = name in ("ettrl", "echo", "ttrl_unique")
    assert (sum(row["tree/forks"] for row in rows) > 0) == grows_trees
    for row in rows:
        assert row.keys() >= set(ALWAYS)
        assert explained(row), row.keys() - MEANING.keys()
        assert ("tree/pruned" in row) == (name == "echo")
        assert ("tree/branch_rate" in row) == grows_trees
        assert ("advantage/clamp_rate" in row) == (name == "ettrl")


def test_the_demo_s_run_is_a_run_of_its_method(tmp_path: Path) -> None:
    for name, make in demo.METHODS.items():
        run = demo.demo_run(name, output=tmp_path, seed=3)
        assert run.algorithm == make()
        assert (run.method, run.seed, run.output) == (name, 3, tmp_path)


def parts(choice: Any) -> Iterator[type]:
    """The classes of a choice and of those that it is made of."""
    if isinstance(choice, tuple):
        for stage in choice:
            yield from parts(stage)
    elif is_dataclass(choice):
        yield type(choice)
        for name in fields(choice):
            yield from parts(getattr(choice, name.name))


@pytest.mark.parametrize("make", [*METHODS.values(), *demo.METHODS.values()])
def test_algorithms_are_values_that_repr_records_and_pickle_keeps(make: Make) -> None:
    algorithm = make()
    assert algorithm == make()
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm
    names = {part.__name__: part for part in parts(algorithm)} | {"inf": math.inf}
    assert eval(repr(algorithm), names) == algorithm


def test_methods_differ_and_replace_derives_the_next_one() -> None:
    made = [make() for make in METHODS.values()]
    assert all(a != b for i, a in enumerate(made) for b in made[:i])
    parent = METHODS["ttrl"]()
    child = replace(parent, select=Stratified())
    assert child != parent
    assert replace(child, select=First()) == parent == METHODS["ttrl"]()
    with pytest.raises(AttributeError):
        parent.select = Stratified()


def test_the_group_baselines_are_those_of_their_papers() -> None:
    grpo, dr_grpo, rloo = (METHODS[name]() for name in ("grpo", "dr_grpo", "rloo"))
    assert grpo.advantage == advantage.grpo()
    assert dr_grpo.advantage == advantage.dr_grpo()
    assert dr_grpo.loss.aggregate == SeqMeanTokenSumNorm(dr_grpo.sample.max_tokens)
    assert rloo == replace(grpo, advantage=advantage.rloo())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"votes": 4, "train": 5}, "expected 1 <= train <= votes, got train=5, votes=4"),
        ({"train": 0}, "expected 1 <= train <= votes, got train=0"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected > 0, got nan"),
        ({"temperature": math.inf}, "sample.temperature: expected a number >= 0, got inf"),
        ({"top_p": 1.5}, "sample.top_p: expected 0 < top_p <= 1, got 1.5"),
        ({"top_k": -1}, "sample.top_k: expected a whole number >= 0"),
        ({"min_p": 1.0}, "sample.min_p: expected 0 <= min_p < 1, got 1.0"),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Sample(**wrong)


# -- options --


def ttrl() -> Algorithm:
    return tiny(demo.ttrl(), votes=10, train=8)


def echo() -> Algorithm:
    return tiny(demo.echo(), votes=10, train=8)


def with_loss(**changes: Any) -> Algorithm:
    return replace(ttrl(), loss=replace(ttrl().loss, **changes))


OPTIONS: dict[str, Algorithm] = {
    "a tie elects none": replace(ttrl(), vote=Majority(tie="skip")),
    "votes by inverse width": replace(forking(ttrl()), vote=Weighted("inverse_width")),
    "votes by confidence": replace(ttrl(), vote=Weighted("confidence", tie="skip")),
    "no answer is unknown": replace(ttrl(), reward=VoteReward(no_answer=None)),
    "no answer is punished": replace(ttrl(), reward=VoteReward(no_answer=-1.0)),
    "random reward": replace(ttrl(), reward=RandomReward(p=0.4, seed=3)),
    "true reward": replace(ttrl(), reward=TrueReward()),
    "first leaves of trees": replace(forking(ttrl()), select=First()),
    "top-k, top-p and min-p": replace(
        ttrl(), sample=replace(ttrl().sample, top_k=20, top_p=0.95, min_p=0.001, temperature=1.0)
    ),
    "reshaping as printed": replace(
        forking(ttrl()), advantage=(*advantage.grpo(), EntropyReshape(y_min=-math.inf))
    ),
    "clipped advantages": replace(ttrl(), advantage=(*advantage.grpo(), AdvantageClip(beta=0.5))),
    "whitened advantages": replace(ttrl(), advantage=(*advantage.grpo(), WhitenTokens())),
    "raw hybrid with its second term": replace(
        echo(), advantage=(*advantage.grpo(), Hybrid(whiten=False, lam=0.1))
    ),
    "TreePO by mean": replace(forking(ttrl()), advantage=advantage.tree_po()),
    "TreePO by leaves": replace(forking(ttrl()), advantage=advantage.tree_po("leaves")),
    "Tree-GRPO": replace(forking(ttrl()), advantage=advantage.tree_grpo()),
    "TreeRL": replace(forking(ttrl()), advantage=advantage.tree_rl()),
    "TreeRL as released": replace(forking(ttrl()), advantage=advantage.tree_rl_released()),
    "TreeRL centred by step": replace(forking(ttrl()), advantage=(TreeRLReleased("step"),)),
    "Dr. GRPO": replace(ttrl(), advantage=advantage.dr_grpo()),
    "RLOO": replace(ttrl(), advantage=advantage.rloo()),
    "online forks": replace(
        forking(ttrl()), fork=OnlineEntropy(quantile=0.7, cooldown=2, warmup_traces=8)
    ),
    "forks with a gap": replace(ttrl(), fork=TopEntropy(mask_tail=1, min_gap=4)),
    "two rounds of forks": replace(
        forking(ttrl()), fork=EPTree(rounds=2, forks=2, siblings=1, mask_tail=1)
    ),
    "wide trees": replace(echo(), fork=replace(echo().fork, max_width=6, trunk_cap=10)),
    "centred confidence clip": with_loss(bounds=ConfidenceClip(centre=1.0, tail=4)),
    "a higher upper bound": with_loss(bounds=Clip(0.2, 0.28)),
    "no dual clip": with_loss(dual=None),
    "k1": with_loss(kl=KL(0.01, "k1")),
    "k2": with_loss(kl=KL(0.01, "k2")),
    "entropy bonus": with_loss(entropy=0.01),
    "leaf means": with_loss(aggregate=SeqMeanTokenMean()),
    "leaf sums": with_loss(aggregate=SeqMeanTokenSum()),
    "constant length": with_loss(aggregate=SeqMeanTokenSumNorm(21)),
}


@pytest.mark.parametrize("algorithm", OPTIONS.values(), ids=list(OPTIONS))
def test_each_option_trains(algorithm: Algorithm, tmp_path: Path) -> None:
    rows = train(algorithm, tmp_path, steps=2, prompts_per_step=4)
    for row in rows:
        assert row.keys() >= set(ALWAYS)
        assert explained(row), row.keys() - MEANING.keys()
        assert row["tree/leaves"] == 40
    # Answers of the demo are short and its doubts rare: not every step has a fork.
    assert (sum(row["tree/forks"] for row in rows) > 0) == (type(algorithm.fork) is not Flat)
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm


@pytest.mark.parametrize(("share", "replaced"), [(0.0, False), (1.0, True)])
def test_pruned_branches_are_replaced_and_only_those(
    share: float, replaced: bool, tmp_path: Path
) -> None:
    prune = replace(echo().prune, confidence_low=0.5, respawn_share=share)
    rows = train(replace(echo(), prune=prune), tmp_path, steps=2, prompts_per_step=4)
    assert all(row["tree/leaves"] == 40 for row in rows)
    assert [row.get("tree/pruned", 0) > 0 for row in rows] == [replaced, replaced]


def test_a_reward_function_of_trl_trains_and_sees_what_it_should(tmp_path: Path) -> None:
    source = tmp_path / "scores.py"
    source.write_text(
        "seen = []\n"
        "def share_of_ones(prompts, completions, **columns):\n"
        "    assert list(columns) == ['completion_ids'], columns\n"
        "    assert all(prompt.endswith('=') for prompt in prompts)\n"
        "    return [text.count('1') / max(1, len(text)) if text else None"
        " for text in completions]\n"
        "def right(prompts, completions, answer, **columns):\n"
        "    return [float(a == b) for a, b in zip(completions, answer)]\n"
    )
    for function, passed in (("share_of_ones", False), ("right", True)):
        folder = tmp_path / function
        folder.mkdir()
        reward = FunctionReward(f"{source}:{function}", pass_answers=passed)
        rows = train(replace(ttrl(), reward=reward), folder, steps=2, prompts_per_step=4)
        if passed:
            # The same leaves are right to the function and to the metric, which sees 10, not 8.
            assert rows[0]["vote/post_ground_truth_reward"] == pytest.approx(rows[0]["reward"])
        else:
            assert 0 < rows[0]["reward"] < 0.5


def test_a_method_of_an_outsider_needs_no_registration(tmp_path: Path) -> None:
    algorithm = replace(
        ttrl(), advantage=(*advantage.grpo(), Halved()), loss=replace(ttrl().loss, bounds=Wide())
    )
    assert train(algorithm, tmp_path, steps=1)[0]["loss"] != 0


@dataclass(frozen=True)
class Halved:
    def __call__(self, scored: Any, advantage_T: Any) -> Any:
        return advantage_T / 2

    def metrics(self, scored: Any, advantage_T: Any) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Wide:
    def __call__(self, batch: Any) -> Any:
        return Clip(0.9, 9.0)(batch)
