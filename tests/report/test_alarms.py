"""Alarms: what a collapse looks like, in plain words."""

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from run_history import history

from pyrl.answers import Boxed, Pattern
from pyrl.report import (
    Alarms,
)
from pyrl.report.alarms import QUIET, RULES, Changed, Outside, no_update


def messages(rows: list[dict[str, Any]], total: int = 80) -> list[str]:
    alarms = Alarms(total)
    return [text for end in range(1, len(rows) + 1) for text in alarms.check(rows[:end])]


def test_a_run_that_learns_raises_no_alarm() -> None:
    rng = random.Random(0)
    rows = history(
        80,
        reward=lambda step: 0.6 + 0.003 * step + rng.gauss(0, 0.03),
        entropy=lambda step: 0.3 * math.exp(-step / 50),
        grad_norm=lambda step: rng.uniform(3, 10),
        frac_reward_zero_std=lambda step: 0.5 + 0.004 * step + 0.08 * (-1) ** step,
        vote__majority_ratio=lambda step: 0.7 + 0.003 * step,
        vote__majority_ratio_min=0.3,
        vote__answered=0.99,
        vote__distinct_labels=1.0,
        vote__label_accuracy=lambda step: 0.65 + 0.003 * step,
        vote__reward_accuracy=0.85,
        vote__icc=lambda step: 0.9 if step % 20 < 3 else -0.3,  # few prompts are contested
        completions__mean_length=lambda step: 17 + rng.gauss(0, 0.3),
        tree__branch_rate=0.02,
        tree__prune_rate=0.1,
        advantage__clamp_rate=0.01,
        sampling__sampling_logp_difference__mean=1e-6,
    )
    assert messages(rows) == []


def test_the_collapse_is_told_though_the_vote_share_stays_high() -> None:
    rows = history(
        10,
        reward=0.9,
        vote__majority_ratio=0.9,
        vote__label_accuracy=lambda step: 0.65 if step < 6 else 0.06,
        vote__distinct_labels=lambda step: 1.0 if step < 5 else 0.1,
    )
    rows.insert(0, {"step": 0, "eval/held-out/greedy": 0.65})
    rows.append({"step": 11, "eval/held-out/greedy": 0.0})
    said = messages(rows)
    assert len(said) == 3
    assert all("collapsing: lower the learning rate" in text for text in said)
    assert said[-1].startswith(
        "Step 11, held-out: greedy accuracy has fallen from 0.65 to 0. The run is collapsing"
    )


def test_a_high_vote_share_alone_is_no_alarm() -> None:
    assert messages(history(40, vote__majority_ratio=0.99, reward=0.99)) == []


def test_an_alarm_speaks_once_and_again_only_after_it_was_gone() -> None:
    rule = Outside("vote/icc", "the correlation", "above", 0.3, 1, "Do something.")

    def fired(icc: list[float]) -> list[int]:
        rows = history(len(icc), vote__icc=lambda step: icc[step - 1])
        alarms = Alarms(80, [rule])
        return [end for end in range(1, len(rows) + 1) if alarms.check(rows[:end])]

    assert fired([0.5, 0.0, 0.5, 0.0, 0.0, 0.0, 0.5]) == [1]  # about its bound
    assert fired([0.0, 0.5, *[0.0] * QUIET, 0.5]) == [2, 3 + QUIET]


def test_the_alarm_of_a_step_without_an_update_shows_what_was_read() -> None:
    long = "so we add them. " * 30 + "The answer is 5."
    said = no_update(["It is 7.", "in between", long], [None, "8", None], Boxed(), 0.25)
    assert "The extractor in effect is boxed;" in said
    assert "'It is 7.' (read: nothing)" in said
    assert "The answer is 5.' (read: nothing)" in said
    assert len(said) < 800
    assert r"by --suffix, such as ' Put the final answer in \boxed{}.', or choose" in said
    assert "--extractor (whole, number, regex:PATTERN)" in said
    assert "25% of the responses were cut at --sample.max-tokens." in said
    assert "The extractor in effect is Pattern(" in no_update(["a"], ["b"], Pattern("(a)"), 0.0)


def test_entropy_may_fall_late_but_not_in_the_first_tenth() -> None:
    def falls_at(when: int) -> list[str]:
        return messages(history(100, entropy=lambda step: 1.0 if step < when else 0.1), total=100)

    assert "from 1 to 0.1" in falls_at(5)[0]
    assert falls_at(50) == []


def trigger(rule: Any) -> Iterator[Mapping[str, Any]]:
    """A history on which the rule must speak."""
    name = rule.metric.replace("*", "held-out")
    for step in range(1, 13):
        if isinstance(rule, Outside):
            value = rule.bound + (0.04 if rule.than == "above" else -0.04)
        else:
            late = rule.times * (1.1 if rule.than == "above" else 0.5)
            value = late if step > rule.start else 1.0
        yield {"step": step, name: value}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.metric} {rule.than}")
def test_each_alarm_says_what_was_seen_against_what_and_what_to_try(rule: Any) -> None:
    rows = list(trigger(rule))
    alarms = Alarms(80, [rule])
    said = [text for end in range(1, 13) for text in alarms.check(rows[:end])]
    assert len(said) == 1
    assert rule.seen in said[0]
    assert said[0].endswith(rule.advice)
    assert (f"{rule.bound:g}" if isinstance(rule, Outside) else "from 1 to") in said[0]
    assert Alarms(80, [rule]).check([{"step": row["step"]} for row in rows]) == []


def test_missing_values_are_no_zeros() -> None:
    assert messages(history(20, entropy=lambda step: 1.0 if step < 8 else None)) == []
    assert isinstance(RULES[0], Changed)
