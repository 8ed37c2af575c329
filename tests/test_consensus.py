"""Rewards by consensus: numbers by hand, and definitions written out slowly on ragged groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from leaf_records import Question, leaves_of

from pyrl.answers import Answers, Exact, Whole, classify
from pyrl.leaves import Leaves
from pyrl.reward import Reward, VoteReward, metrics_of, rewards
from pyrl.reward.consensus import BalancedReward, FrequencyReward, NoveltyReward, SelectiveReward
from pyrl.reward.guard import GuardedReward
from pyrl.vote import Majority, Votes

NAN = math.nan


class SomeAnswer(Whole):
    """The whole response, none of "-"."""

    def __call__(self, text: str) -> str | None:
        return None if text == "-" else text


def voted(
    *groups: Sequence[str], entropy_N: Sequence[float] | None = None
) -> tuple[Leaves, Answers, Votes]:
    texts = [text for group in groups for text in group]
    group_N = [g for g, group in enumerate(groups) for _ in group]
    leaves = leaves_of(texts, group_N=group_N, groups=len(groups))
    if entropy_N is not None:
        leaves = replace(leaves, entropy_N=np.array(entropy_N))
    answers = classify(leaves, SomeAnswer(), Exact())
    return leaves, answers, Majority()(leaves, answers)


def rewarded(
    reward: Reward, asked: tuple[Leaves, Answers, Votes], state: Any = None
) -> list[float]:
    prompts = [Question(g, f"What is {g}?") for g in range(asked[0].groups)]
    return rewards(reward, *asked, prompts, state).tolist()


# -- numbers --


def test_empo_rewards_the_share_of_a_class_as_on_its_page() -> None:
    asked = voted("aaabbcaa", ["x", "y", "-"], ["-", "-"])
    first = [0.625] * 3 + [0.25, 0.25, 0.125, 0.625, 0.625]
    assert rewarded(FrequencyReward(), asked) == first + [0.0] * 5
    told = metrics_of(FrequencyReward(), *asked)
    assert told["reward/closed"] == pytest.approx(2 / 3)  # all different, and no answer
    third = pytest.approx(1 / 3)
    assert rewarded(FrequencyReward("open"), asked)[8:] == [third, third, 0.0, 0.0, 0.0]
    few = FrequencyReward("frequency", 0.7)
    assert rewarded(few, asked) == [0.0] * 13


def test_empo_takes_a_relation_of_the_user_s(tmp_path: Path) -> None:
    file = tmp_path / "relation.py"
    file.write_text(
        "def near(a, b):\n    return abs(int(a) - int(b)) <= 1\n"
        "def odd(a, b):\n    return None\n"
        "def failing(a, b):\n    return 1 / 0\n"
    )
    asked = voted(["1", "2", "3", "-"], ["4", "4", "9"])
    # 3 is near 2, but not near 1, the first of their class.
    expected = [0.5, 0.5, 0.25, 0.0, 2 / 3, 2 / 3, 1 / 3]
    assert rewarded(FrequencyReward(relation=f"{file}:near"), asked) == pytest.approx(expected)
    for name, message in (
        ("odd", "FrequencyReward.relation .*: expected True or False, got None"),
        ("failing", "raised ZeroDivisionError in line 6"),
        ("none", "FrequencyReward.relation .*: .*relation.py has no function none"),
    ):
        with pytest.raises(ValueError, match=message):
            rewarded(FrequencyReward(relation=f"{file}:{name}"), asked)


def test_empo_of_two_answers_is_the_vote() -> None:
    """Any affine change of rewards is none to a baseline with a deviation."""
    asked = voted("aaab", "bbbaa")
    share, vote = (np.array(rewarded(r, asked)) for r in (FrequencyReward(), VoteReward()))
    for group in (slice(0, 4), slice(4, 9)):
        a, b = share[group], vote[group]
        np.testing.assert_allclose((a - a.mean()) / a.std(), (b - b.mean()) / b.std(), atol=1e-12)


def test_scrl_takes_clear_labels_for_right_and_rare_unsure_answers_for_wrong() -> None:
    """16 leaves: nine say a, five b, one c (unsure), one nothing."""
    entropy_N = [0.5] * 14 + [1.5, 0.5]
    asked = voted("a" * 9 + "b" * 5 + "c-", entropy_N=entropy_N)
    mean = fmean(entropy_N)
    calm = -0.1 * (0.5 - mean)
    expected = [9 / 16 + calm] * 9 + [calm] * 5 + [1 / 16 - 0.125 - 0.1 * (1.5 - mean), -1.0]
    assert rewarded(SelectiveReward(), asked) == pytest.approx(expected)
    told = metrics_of(SelectiveReward(), *asked)
    assert told == {"reward/taken_right": 9 / 16, "reward/taken_wrong": 1 / 16}
    sure = voted("a" * 9 + "b" * 5 + "c-", entropy_N=[0.5] * 14 + [0.1, 0.5])
    assert metrics_of(SelectiveReward(), *sure)["reward/taken_wrong"] == 0
    for close in ("aaaaabbbbb", "aabbccddee", "--"):
        assert metrics_of(SelectiveReward(), *voted(close))["reward/taken_right"] == 0


def test_scrl_without_gates_and_prices_is_the_share_of_the_label() -> None:
    open_ = SelectiveReward(0.0, 0.0, 0.0, 0.0, no_answer=0.0)
    assert rewarded(open_, voted("aaab-")) == pytest.approx([0.6] * 3 + [0.0] * 2)


def test_ddrl_keeps_the_label_and_the_rarest() -> None:
    asked = voted("aaaaabbbcc-d", "--")
    assert rewarded(BalancedReward(keep=6), asked)[:12] == pytest.approx(
        [1, 1, 1, NAN, NAN, NAN, NAN, NAN, NAN, -1, -1, -1], nan_ok=True
    )
    assert all(math.isnan(r) for r in rewarded(BalancedReward(), asked)[12:])
    told = metrics_of(BalancedReward(keep=6), *asked)
    assert told["reward/dropped"] == pytest.approx(8 / 14)
    everything = rewarded(BalancedReward(keep=99), voted("aaab"))
    assert everything == rewarded(VoteReward(wrong=-1.0), voted("aaab"))


def test_evol_rl_pays_novelty_within_the_sign_of_the_vote() -> None:
    """Texts of the same answer: their first character."""
    texts = ["axyz", "axyz", "aqrs", "bxyz", "cqqq", "-"]
    leaves = leaves_of(texts)
    answers = classify(leaves, SomeAnswer(), Exact())
    class_N = np.array([0, 0, 0, 1, 2, -1])
    answers = replace(answers, class_N=class_N)
    asked = leaves, answers, Majority()(leaves, answers)
    reward_N = rewarded(NoveltyReward(), asked)
    assert reward_N[:3] == [0.5, 0.5, 1.0]
    assert reward_N[3:] == [-1.0, -0.5, -1.0]
    flat = rewarded(NoveltyReward(spread=0.0), asked)
    assert flat == [0.75] * 3 + [-0.75, -0.75, -1.0]
    assert metrics_of(NoveltyReward(), *asked)["reward/novelty_std"] > 0.3


def test_a_lone_leaf_of_its_sign_gets_the_most() -> None:
    assert rewarded(NoveltyReward(), voted(["ab", "ab", "cd"])) == [0.75, 0.75, -0.5]


# -- definitions --


def slow_novelty(tokens: list[str], right: list[bool]) -> list[float]:
    def likeness(a: str, b: str) -> float:
        x, y = (Counter(t[i : i + 2] for i in range(max(1, len(t) - 1))) for t in (a, b))
        dot = sum(x[gram] * y[gram] for gram in x)
        return dot / math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))

    raw = []
    for i, text in enumerate(tokens):
        others = [j for j in range(len(tokens)) if j != i]
        same = [j for j in others if right[j] == right[i]] or others
        among = fmean(likeness(text, tokens[j]) for j in same)
        raw.append(1 - (among + max(likeness(text, tokens[j]) for j in others)) / 2)
    result = []
    for i, value in enumerate(raw):
        own = [v for j, v in enumerate(raw) if right[j] == right[i]]
        low, high = min(own), max(own)
        part = 1.0 if len(own) == 1 else 0.5 if high - low < 1e-12 else (value - low) / (high - low)
        result.append((0.5 if right[i] else -1.0) + 0.5 * part)
    return result


def slow_scrl(group: list[str], label: str | None, entropy: list[float]) -> list[float]:
    share = {text: count / len(group) for text, count in Counter(group).items()}
    second = max([0.0, *(s for text, s in share.items() if text != label)])
    clear = label is not None and share[label] >= 0.375
    clear = clear and (second == 0 or share[label] - second > 0.125)
    result = []
    for text in group:
        over = fmean(h for t, h in zip(group, entropy, strict=True) if t == text) - fmean(entropy)
        value = -0.1 * over
        if clear and text == label:
            value += share[text]
        elif share[text] < 0.125 and over >= 0:
            value += share[text] - 0.125
        result.append(value)
    return result


@pytest.mark.parametrize("case", range(10))
def test_rewards_are_what_they_say_for_ragged_groups(case: int) -> None:
    random = np.random.default_rng(case)
    groups = [
        [
            "".join(random.choice([*"ab"], random.integers(1, 5)))
            for _ in range(random.integers(2, 14))
        ]
        for _ in range(3)
    ]
    entropy = random.uniform(0.1, 1.0, sum(map(len, groups))).tolist()
    asked = voted(*groups, entropy_N=entropy)
    labels = asked[2].label_G
    share = [Counter(group)[text] / len(group) for group in groups for text in group]
    assert rewarded(FrequencyReward("open"), asked) == pytest.approx(share)
    expected = []
    for group, label in zip(groups, labels, strict=True):
        expected += slow_novelty(group, [text == label for text in group])
    assert rewarded(NoveltyReward(), asked) == pytest.approx(expected)
    at, expected = 0, []
    for group, label in zip(groups, labels, strict=True):
        expected += slow_scrl(group, label, entropy[at : at + len(group)])
        at += len(group)
    assert rewarded(SelectiveReward(), asked) == pytest.approx(expected)
    balanced = rewarded(BalancedReward(keep=4), asked)
    at = 0
    for group, label in zip(groups, labels, strict=True):
        part, at = balanced[at : at + len(group)], at + len(group)
        keep, count = min(4, len(group)), Counter(group)
        kept = [i for i, r in enumerate(part) if not math.isnan(r)]
        assert len(kept) == keep
        assert all((part[i] == 1) == (group[i] == label) for i in kept)
        first = min(count[label], keep // 2)
        rare = sorted(count[text] for text in group)[: keep - first]
        assert sorted(count[group[i]] for i in kept) == sorted(rare + [count[label]] * first)


# -- what is remembered --


def visits(reward: GuardedReward, *groups: str) -> list[tuple[list[float], dict[str, float]]]:
    """Rewards and metrics of one question, visit after visit."""
    state, found = reward.initial(), []
    for group in groups:
        asked = voted(group)
        given = rewarded(reward, asked, state)
        found.append((given, metrics_of(reward, *asked, state)))
    return found


def test_a_question_whose_label_changes_learns_slower_and_its_minority_gains() -> None:
    first, second, third = visits(GuardedReward(), "aaab", "bbba", "bbba")
    assert first == (
        [1.0, 1.0, 1.0, 0.0],
        {"reward/guard_weight": 1.0, "reward/guard_flips": 0.0, "reward/guard_skipped": 0.0},
    )
    weight = 0.5 * 0.7  # three of four agree on the new label
    bonus = 0.3 * 2 * 0.75 * 0.25
    assert second[0] == pytest.approx([weight] * 3 + [weight * bonus])
    assert second[1]["reward/guard_flips"] == 1
    assert third[0] == [1.0, 1.0, 1.0, 0.0]


def test_a_question_that_never_changes_learns_slower_for_a_while() -> None:
    found = visits(GuardedReward(window=2), *["aaab"] * 5)
    assert [given[0] for given, _ in found] == pytest.approx([1, 0.85, 0.85, 1, 1])


def test_a_question_that_has_settled_is_skipped() -> None:
    always = GuardedReward(window=2, skip=1.0)
    found = visits(always, "aaab", "bbba", "bbbb", "bbbb")
    assert [math.isnan(given[0]) for given, _ in found] == [False, True, True, True]
    assert found[-1][1]["reward/guard_skipped"] == 1
    never = visits(replace(always, skip=0.0), "aaab", "bbba", "bbbb", "bbbb")
    assert [given[0] for given, _ in never][2:] == [1.0, 1.0]


def test_a_guard_that_is_switched_off_is_the_vote() -> None:
    off = GuardedReward(flip=0.0, sure=0.0, minority=0.0, skip=0.0, window=1)
    for (given, _), group in zip(visits(off, "aab-", "bba-"), ("aab-", "bba-"), strict=True):
        assert given == rewarded(VoteReward(), voted(group))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrequencyReward("some"), "there is no gate of FrequencyReward 'some'"),
        (lambda: FrequencyReward(least=2.0), "FrequencyReward.least: expected a number in"),
        (lambda: SelectiveReward(clear=-1.0), "SelectiveReward.clear: expected a number in"),
        (lambda: BalancedReward(keep=0), "BalancedReward.keep: expected >= 1, got 0"),
        (lambda: NoveltyReward(ngram=0), "NoveltyReward.ngram: expected >= 1, got 0"),
        (lambda: GuardedReward(window=0), "GuardedReward.window: expected >= 1, got 0"),
    ],
)
def test_a_wrong_number_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
