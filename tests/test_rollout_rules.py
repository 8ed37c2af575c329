"""Rules that never fork, rules written in Python, and where answers open."""

from dataclasses import dataclass

import numpy as np
import pytest
from demo_rollout import demo_engine, demo_prompts
from toy_rollout import ForkRecorder, answers, check_budgets, prompts, random_toy, rollout

from pyrl._core.tree import Observed, SignalSpec
from pyrl.fork import (
    EntropyConfidence,
    EPTree,
    Finished,
    Flat,
    Fork,
    OnlineEntropy,
    Site,
    TopEntropy,
)
from pyrl.rollout import Rollout, answer_start

FLAT_FORKS = [
    TopEntropy(forks=0),
    TopEntropy(siblings=0),
    EPTree(forks=0),
    EPTree(rounds=0),
    OnlineEntropy(forks=0),
    OnlineEntropy(siblings=0),
    EntropyConfidence(max_width=1),
]


# ---- where nothing forks


@pytest.mark.parametrize("fork", FLAT_FORKS, ids=repr)
def test_a_rule_that_never_forks_samples_what_flat_samples(fork: Fork) -> None:
    questions = prompts(3, 1, 2)
    flat = rollout(random_toy(), questions).run()
    assert answers(rollout(random_toy(), questions, fork=fork).run()) == answers(flat)


@pytest.mark.parametrize("fork", [FLAT_FORKS[0], FLAT_FORKS[4], FLAT_FORKS[6]], ids=repr)
def test_a_rule_that_never_forks_samples_what_flat_samples_from_the_demo_model(fork: Fork) -> None:
    flat = rollout(demo_engine(), demo_prompts(2), votes=6).run()
    assert answers(rollout(demo_engine(), demo_prompts(2), votes=6, fork=fork).run()) == answers(
        flat
    )


def test_signals_that_decide_nothing_change_no_sample() -> None:
    questions = prompts(3, 1, 2)
    run = rollout(random_toy(), questions, fork=OnlineEntropy(min_tokens=1000))
    assert answers(run.run()) == answers(rollout(random_toy(), questions).run())
    assert run.counts.trunks == 24


# ---- rules in Python


@dataclass(frozen=True)
class ForkAfterFalls(Flat):
    """Forks where entropy has fallen: a rule that no C++ knows."""

    def trunks(self, votes: int) -> int:
        return 2

    def cap(self, votes: int) -> int:
        return 5

    def lower(self, spec: SignalSpec) -> bool:
        spec.smooth_window, spec.min_tokens, spec.cooldown = 1, 2, 3
        spec.warmup_traces = 0
        return True

    def width(self, observed: Observed) -> np.ndarray:
        return np.where(observed.entropy_rise_B < 0, 2, 1).astype(np.int32)


def test_a_fork_rule_can_be_written_in_python() -> None:
    engine = ForkRecorder(random_toy(end=0.02))
    run = rollout(engine, prompts(1, 2), fork=ForkAfterFalls(), votes=10)
    forest = run.run()
    check_budgets(run)
    assert len(engine.forks) > 6
    last: dict[int, int] = {}
    for parent, at, children in engine.forks:
        entropy = forest.path(parent).entropy
        assert entropy[at] < entropy[at - 1]
        assert at >= 2  # min_tokens
        assert at > last.get(parent, -9) + 3  # cool-down, which siblings inherit
        last |= dict.fromkeys([parent, *children], at)


def test_fork_sites_at_the_end_may_repeat_and_exceed_the_budget() -> None:
    @dataclass(frozen=True)
    class Greedy(Flat):
        def trunks(self, votes: int) -> int:
            return 1

        def at_end(self, trunk: Finished) -> list[Site]:
            return [Site(leaf, 0, 3) for leaf in trunk.leaves]

    run = rollout(random_toy(end=0.02), prompts(1), fork=Greedy(), votes=20)
    forest = run.run()
    check_budgets(run)
    assert run.counts.trunks == 1
    assert len(set(answers(forest))) == 20


# ---- where answers open


@pytest.mark.parametrize(
    ("text", "opening"),
    [("12", None), ("\\boxed{12}", 0), ("1 \\boxed{2} 3 \\boxed{4}", 14), ("\\box \\boxed", 5)],
)
def test_answer_start_is_where_the_last_box_is_opened(text: str, opening: int | None) -> None:
    class Characters:
        def decode(self, tokens: list[int]) -> str:
            return "".join(map(chr, tokens))

    tokens = np.array([ord(c) for c in text], np.int32)
    expected = len(text) if opening is None else opening + len("\\boxed") - 1
    assert answer_start(tokens, Characters()) == expected
    assert answer_start(tokens[:0], Characters()) == 0


# ---- trunks that end early


def test_what_the_open_trunks_cannot_come_to_is_opened_before_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Responses of a token have no place to fork; their leaves must not wait to run alone."""
    beside = []
    replace = Rollout._replace

    def watched(run: Rollout, tree: int) -> None:
        before = run.budgets[tree].trunks
        replace(run, tree)
        if run.budgets[tree].trunks > before:
            beside.append(run.budgets[tree].running - (run.budgets[tree].trunks - before))

    monkeypatch.setattr(Rollout, "_replace", watched)
    run = rollout(random_toy(end=0.5), prompts(3), votes=60, fork=TopEntropy())
    run.run()
    check_budgets(run)
    assert run.counts.trunks > TopEntropy().trunks(60)
    assert max(beside) > 0
