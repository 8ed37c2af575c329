from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leaf_records import Question, leaves_of

from pyrl.answers import Exact, MathEquivalence, Whole, classify
from pyrl.vote import FlipCounter, Majority, Vote, Votes, Weighted


def elect(vote: Vote, text_N: list[str], **columns: object) -> Votes:
    leaves = leaves_of(text_N, **columns)
    return vote(leaves, classify(leaves, Whole(), Exact()))


def test_one_half_wins_two_of_four() -> None:
    leaves = leaves_of(["1/2", "0.5", "", "2"])
    with MathEquivalence() as equivalence:
        votes = Majority()(leaves, classify(leaves, Whole(), equivalence))
    assert votes.class_G.tolist() == [0]
    assert votes.label_G == ("1/2",)
    assert votes.ratio_G.tolist() == [0.5]
    assert votes.margin_G.tolist() == [0.25]
    assert votes.answered_G.tolist() == [3]
    assert votes.entropy_G[0] == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_no_answers_and_no_leaves_elect_no_label() -> None:
    votes = elect(Majority(), ["", "", "a"], group_N=[0, 0, 2], groups=4)
    assert votes.class_G.tolist() == [-1, -1, 0, -1]
    assert votes.label_G == (None, None, "a", None)
    assert votes.ratio_G.tolist() == [0, 0, 1, 0]
    assert votes.margin_G.tolist() == [0, 0, 1, 0]
    assert votes.answered_G.tolist() == [0, 0, 1, 0]
    assert votes.entropy_G.tolist() == [0, 0, 0, 0]


def test_a_tie_goes_to_the_answer_seen_first() -> None:
    votes = elect(Majority(), ["", "c", "b", "a", "b", "a"])
    assert votes.label_G == ("b",)
    assert votes.ratio_G.tolist() == [2 / 6]
    assert votes.margin_G.tolist() == [0]


def test_first_is_by_leaf_order_also_when_classes_were_numbered_on_other_leaves() -> None:
    leaves = leaves_of(["a", "b", "a"])
    answers = classify(leaves, Whole(), Exact())
    index_N = np.array([1, 2], np.int64)
    votes = Majority()(leaves.take(index_N), answers.take(index_N))
    assert votes.label_G == ("b",)
    assert votes.class_G.tolist() == [1]


def test_a_tie_can_be_skipped() -> None:
    votes = elect(Majority(tie="skip"), ["a", "b", "a", "b", "c", "a"], group_N=[0] * 5 + [1])
    assert votes.label_G == (None, "a")
    assert votes.class_G.tolist() == [-1, 0]
    assert votes.ratio_G.tolist() == [0, 1]
    assert votes.entropy_G[0] > 0


def test_inverse_width_gives_each_trunk_one_vote() -> None:
    text_N = ["a", "a", "a", "b", "b"]
    columns = {"trunk_N": [0, 0, 0, 1, 2], "weight_N": [1 / 3] * 3 + [1.0, 1.0]}
    assert elect(Majority(), text_N, **columns).label_G == ("a",)
    votes = elect(Weighted("inverse_width"), text_N, **columns)
    assert votes.label_G == ("b",)
    assert votes.ratio_G[0] == pytest.approx(2 / 3)
    assert votes.margin_G[0] == pytest.approx(1 / 3)


def test_thirds_that_sum_to_one_tie_with_one() -> None:
    columns = {"weight_N": [1.0, 0.1, 0.2, 0.7]}
    assert elect(Weighted(tie="skip"), ["b", "a", "a", "a"], **columns).label_G == (None,)
    votes = elect(Weighted(), ["b", "a", "a", "a"], **columns)
    assert votes.label_G == ("b",)
    assert votes.margin_G.tolist() == [0]


def test_confidence_can_outvote_numbers() -> None:
    votes = elect(Weighted("confidence"), ["a", "a", "b", ""], confidence_N=[0.1, 0.2, 0.5, 0.2])
    assert votes.label_G == ("b",)
    assert votes.ratio_G[0] == pytest.approx(0.5)
    assert votes.margin_G[0] == pytest.approx(0.2)


def test_votes_without_any_weight_elect_nobody() -> None:
    votes = elect(Weighted("confidence"), ["a", "b"], confidence_N=[0.0, 0.0])
    assert votes.label_G == (None,)
    assert votes.ratio_G.tolist() == [0]
    assert votes.answered_G.tolist() == [2]


def test_bad_settings_and_weights_are_errors() -> None:
    with pytest.raises(ValueError, match="tie: expected 'first' or 'skip', got 'last'"):
        Majority(tie="last")
    with pytest.raises(ValueError, match="by: expected 'inverse_width' or 'confidence'"):
        Weighted(by="length")
    with pytest.raises(ValueError, match="expected finite and >= 0"):
        elect(Weighted("confidence"), ["a"], confidence_N=[math.nan])


@given(st.lists(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=9), min_size=1, max_size=4))
def test_the_majority_is_what_counting_by_hand_gives(groups: list[list[str]]) -> None:
    text_N = [text for group in groups for text in group]
    group_N = [g for g, group in enumerate(groups) for _ in group]
    votes = elect(Majority(), text_N, group_N=group_N, groups=len(groups))
    for g, group in enumerate(groups):
        given_answers = [text for text in group if text]
        counts = {text: given_answers.count(text) for text in given_answers}
        label = max(counts, key=lambda text: counts[text]) if counts else None
        ranked = [*sorted(counts.values(), reverse=True), 0, 0]
        assert votes.label_G[g] == label
        assert votes.ratio_G[g] == pytest.approx(ranked[0] / max(len(group), 1))
        assert votes.margin_G[g] == pytest.approx((ranked[0] - ranked[1]) / max(len(group), 1))
        assert votes.answered_G[g] == len(given_answers)


def by_hand(hits: list[list[list[int]]]) -> float:
    """One-way analysis of variance of trunks within prompts, from the definition."""
    between = within = free_between = free_within = width = 0.0
    for prompt in hits:
        flat = [hit for trunk in prompt for hit in trunk]
        mean = sum(flat) / len(flat)
        for trunk in prompt:
            center = sum(trunk) / len(trunk)
            between += len(trunk) * (center - mean) ** 2
            within += sum((hit - center) ** 2 for hit in trunk)
        free_between += len(prompt) - 1
        free_within += len(flat) - len(prompt)
        width += len(flat) - sum(len(trunk) ** 2 for trunk in prompt) / len(flat)
    between, within, width = between / free_between, within / free_within, width / free_between
    return (between - within) / (between + (width - 1) * within)


@pytest.mark.parametrize(
    "hits",
    [
        [[[1, 1, 1], [0, 0, 0], [1, 1, 1]]],
        [[[1, 0, 1], [0, 1, 0], [1, 1, 1]]],
        [[[1, 0], [0, 1], [1, 0], [1, 1]], [[1, 1, 1, 0], [1], [0, 0]]],
    ],
)
def test_trunk_correlation_is_the_anova_estimate(hits: list[list[list[int]]]) -> None:
    rows = [
        (g, t, "label" if hit else "other")
        for g, prompt in enumerate(hits)
        for t, trunk in enumerate(prompt)
        for hit in trunk
    ]
    group_N, trunk_N, text_N = (list(column) for column in zip(*rows, strict=True))
    votes = elect(Majority(), text_N, group_N=group_N, trunk_N=trunk_N)
    assert votes.label_G == ("label",) * len(hits)
    assert votes.icc == pytest.approx(by_hand(hits))


def test_trunk_correlation_is_one_if_trunks_agree_and_near_zero_if_leaves_are_independent() -> None:
    trunk_N = [t for t in range(400) for _ in range(5)]
    random = np.random.default_rng(0)
    hit_trunk = random.random(400) < 0.6
    agreed = ["a" if hit_trunk[t] else "b" for t in trunk_N]
    independent = ["a" if hit else "b" for hit in random.random(2000) < 0.6]
    assert elect(Majority(), agreed, trunk_N=trunk_N).icc == pytest.approx(1)
    assert abs(elect(Majority(), independent, trunk_N=trunk_N).icc) < 0.04


@pytest.mark.parametrize(
    ("text_N", "trunk_N"),
    [
        (["a", "b", "a"], [0, 1, 2]),
        (["a", "b", "a"], [0, 0, 0]),
        (["a", "a", "a", "a"], [0, 0, 1, 1]),
        (["", "", "", ""], [0, 0, 1, 1]),
    ],
)
def test_trunk_correlation_is_unknown_where_nothing_shows_it(
    text_N: list[str], trunk_N: list[int]
) -> None:
    assert math.isnan(elect(Majority(), text_N, trunk_N=trunk_N).icc)


def test_flips_are_counted_between_visits_and_survive_a_checkpoint() -> None:
    counter = FlipCounter()
    prompts = [Question(index=7), Question(index=3)]

    def visit(counter: FlipCounter, *texts: str) -> float:
        return counter.update(elect(Majority(), list(texts), group_N=[0, 1]), prompts, Exact())

    assert math.isnan(visit(counter, "a", "b"))
    assert visit(counter, "a", "c") == 0.5
    restored = FlipCounter()
    restored.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    assert visit(restored, "x", "") == 1
    assert visit(restored, "x", "c") == 0
