"""Rollouts replay from their seeds, and leave the engine empty when an exception ends them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from demo_rollout import demo, demo_engine, demo_prompts
from toy_rollout import TREES, answers, assert_forgotten, prompts, random_toy, rollout

from pyrl._core.tree import Observed, SignalSpec
from pyrl.fork import EPTree, Finished, Flat, Fork, Site, TopEntropy, WithoutReplacement
from pyrl.prune import Doubt, Keep, Prune
from pyrl.rollout import derive_seed, make_signals

# ---- replay


@pytest.mark.parametrize("fork", TREES, ids=repr)
@pytest.mark.parametrize("prune", [Keep(), Doubt(spike=0.5, tail_window=4)], ids=repr)
def test_a_rollout_replays_from_its_seed(fork: Fork, prune: Prune) -> None:
    def run(seed: int) -> Any:
        signals = make_signals(fork, prune)
        engine = random_toy(end=0.05)
        forests = [
            rollout(engine, prompts(3, 1), fork=fork, prune=prune, votes=12, signals=signals,
                    seed=derive_seed(seed, step)).run()
            for step in range(2)
        ]  # fmt: skip
        return [forest.save() for forest in forests]

    first = run(1)
    assert run(1) == first
    other = run(2)
    assert other[0] != first[0]
    assert other[1] != first[1]


@pytest.mark.parametrize("fork", [Flat(), TREES[0], TREES[3], WithoutReplacement()], ids=repr)
def test_prompts_that_come_later_grow_the_trees_of_a_rollout_of_all(fork: Fork) -> None:
    """But for online rules, whose prompts share thresholds: there only the first are the same."""
    asked = prompts(3, 1, 2)
    whole = answers(rollout(random_toy(), asked, fork=fork).run())
    run = rollout(random_toy(), asked[:2], fork=fork)
    before = answers(run.run())
    run.extend(asked[2:])
    after = answers(run.run())
    assert [row for row in after if row[0] < 2] == before
    assert len(after) == 3 * run.votes
    if run.signals is None:
        assert after == whole
    if run.law is not None:
        assert run.forest.leaf_table(run.forest.leaves(2)).weight_N.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "fork",
    [Flat(), TopEntropy(mask_tail=2), EPTree(mask_tail=2), WithoutReplacement()],
    ids=repr,
)
def test_answers_do_not_depend_on_the_rows_of_the_engine(fork: Fork) -> None:
    """Online rules of one prompt compete for its leaves, so with them the schedule has a say."""

    def tokens(max_rows: int) -> list[Any]:
        engine = demo_engine(max_rows, torch.float64)
        forest = rollout(engine, demo_prompts(3), fork=fork, votes=10).run()
        rows = [(forest.tree_of(leaf), forest.seed(leaf), forest.path(leaf).tokens.tobytes())
                for leaf in forest.leaves().tolist()]  # fmt: skip
        return sorted(rows)

    try:
        wide = tokens(64)
        assert tokens(3) == wide
    finally:
        demo()[0].to(torch.float32)


# ---- exceptions


class Interrupted(Exception):
    """Raised in the middle of a rollout."""


@dataclass
class Interrupt:
    """An `on_tokens` that gives up after some steps."""

    after: int

    def __call__(self, tokens: int) -> None:
        self.after -= 1
        if self.after == 0:
            raise Interrupted


@pytest.mark.parametrize("fork", [Flat(), *TREES, WithoutReplacement()], ids=repr)
def test_an_interrupted_rollout_leaves_the_engine_empty(fork: Fork) -> None:
    engine, questions = random_toy(end=0.05), prompts(2, 1)
    fresh = rollout(random_toy(end=0.05), questions, fork=fork).run()
    for steps in range(1, 12):
        with pytest.raises(Interrupted):
            rollout(engine, questions, fork=fork, on_tokens=Interrupt(steps)).run()
        assert_forgotten(engine)
    assert rollout(engine, questions, fork=fork).run().save() == fresh.save()


def test_an_interrupted_rollout_of_the_demo_model_leaves_the_engine_empty() -> None:
    engine, questions = demo_engine(max_rows=5), demo_prompts(2)
    fork = TopEntropy(mask_tail=2)
    for steps in (1, 20):
        with pytest.raises(Interrupted):
            rollout(engine, questions, fork=fork, on_tokens=Interrupt(steps)).run()
        assert_forgotten(engine)
    again = rollout(engine, questions, fork=fork).run()
    assert again == rollout(demo_engine(max_rows=5), questions, fork=fork).run()


@pytest.mark.parametrize("where", ["width", "at_end"])
def test_a_rule_that_raises_leaves_the_engine_empty(where: str) -> None:
    @dataclass(frozen=True)
    class Broken(TopEntropy):
        def lower(self, spec: SignalSpec) -> bool:
            return True

        def width(self, observed: Observed) -> np.ndarray:
            if where == "width":
                raise Interrupted
            return observed.width_B

        def at_end(self, trunk: Finished) -> list[Site]:
            raise Interrupted

    engine = random_toy(end=0.3)
    with pytest.raises(Interrupted):
        rollout(engine, prompts(1, 1), fork=Broken(), votes=20).run()
    assert_forgotten(engine)


def test_what_the_engine_refuses_is_what_the_caller_reads() -> None:
    engine = random_toy()
    with pytest.raises(ValueError, match="prompt 0: expected at least one token"):
        rollout(engine, [*prompts(1), np.array([99], np.int32)]).run()
    assert_forgotten(engine)
    with pytest.raises(ValueError, match="expected a limit >= 1, got 0"):
        rollout(engine, prompts(1), limit=0).run()
    assert_forgotten(engine)


@pytest.mark.parametrize(("questions", "votes"), [([], 4), (prompts(1), 0)])
def test_a_rollout_needs_prompts_and_votes(questions: list[np.ndarray], votes: int) -> None:
    with pytest.raises(ValueError, match="expected at least one prompt and one vote"):
        rollout(random_toy(), questions, votes=votes)
