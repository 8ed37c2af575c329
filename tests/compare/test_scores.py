"""What is counted of the answers to each question, and of the course of a run."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest

from pyrl.compare.history import collapse
from pyrl.compare.scores import check_same, majority_at, metrics, pass_at, shown
from pyrl.compare.transitions import transitions
from pyrl.report.question_scores import QuestionScore


def answered(question: int, right: str, label_right: bool | None = None) -> QuestionScore:
    """`right`: a digit for each sample."""
    flags = tuple(digit == "1" for digit in right)
    label = sum(flags) * 2 > len(flags) if label_right is None else label_right
    return QuestionScore(
        question, f"{question}=", flags[0], flags, tuple(right), tuple(map(int, right)), 2,
        "1" if label else "0", label, 0.5, 8.0,
    )  # fmt: skip


def test_pass_at_k_is_that_of_all_draws_of_k_samples() -> None:
    for n, k in ((1, 1), (5, 2), (6, 6)):
        for c in range(n + 1):
            flags = [1] * c + [0] * (n - c)
            draws = [max(drawn) for drawn in combinations(flags, k)]
            assert pass_at(k, n)[c] == pytest.approx(np.mean(draws))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "classes", [(1, 1, 0, 2, 2, -1), (1, 0, 2, 3, -1, -1), (0, 0, 0, 2, 2, 2), (1, 1, 0, 0, 2, 2)]
)
def test_maj_at_k_is_that_of_all_draws_of_k_samples(k: int, classes: tuple[int, ...]) -> None:
    score = replace(
        answered(0, "000000"), right=tuple(kind == 1 for kind in classes), classes=classes
    )
    labels = []
    for drawn in permutations(classes, k):
        read = [kind for kind in drawn if kind >= 0]
        labels.append(max(read, key=read.count) if read else None)  # of a tie the first
    assert majority_at(k, score) == pytest.approx(np.mean([label == 1 for label in labels]))


def test_metrics_are_arrays_of_seeds_and_questions() -> None:
    by_seed = [
        [answered(0, "1101"), answered(1, "0001")],
        [answered(0, "0111"), answered(1, "0000")],
    ]
    found = metrics(by_seed)
    assert list(found) == ["greedy", "pass@1", "maj@4", "pass@2", "pass@4"]
    assert found["greedy"].tolist() == [[1, 0], [0, 0]]
    assert found["pass@1"].tolist() == [[0.75, 0.25], [0.75, 0]]
    assert found["maj@4"].tolist() == [[1, 0], [1, 0]]
    assert found["pass@4"].tolist() == [[1, 1], [1, 0]]
    several = [f"{name}@{k}" for name in ("maj", "pass") for k in (2, 4, 8, 16)]
    some = ["greedy", "pass@1", "maj@16", "pass@4", "pass@16"]
    assert shown(["greedy", "pass@1", *several]) == some
    assert shown(list(metrics([[answered(0, "1")]]))) == ["greedy", "pass@1", "maj@1"]


def test_other_questions_are_refused() -> None:
    one, other = [answered(0, "1")], [answered(3, "1")]
    with pytest.raises(ValueError, match=r"same questions of a and b, got 1 and 1, of which \(0"):
        check_same([one], [other], "a and b")
    with pytest.raises(ValueError, match="same questions of two seeds, got 1 and 2"):
        metrics([[*one, *other], one])


def test_labels_are_learned_sharpened_and_corrupted() -> None:
    before = ["0000", "0001", "1101", "1101", "1111", "1100", "0000"]
    after = ["1110", "0111", "1111", "1101", "0000", "0100", "0001"]
    right = [[False, False, True, True, True, True, False],
             [True, True, True, True, False, False, False]]  # fmt: skip
    old, new = (
        [answered(q, text, label) for q, (text, label) in enumerate(zip(texts, of, strict=True))]
        for texts, of in zip((before, after), right, strict=True)
    )
    assert transitions(old, new) == {
        "learned": 2, "from nothing": 1, "sharpened": 1, "corrupted": 2, "learned / corrupted": 1.0
    }  # fmt: skip
    kept = transitions(old, old)
    assert set(kept.values()) == {0, None}
    assert kept["learned / corrupted"] is None
    with pytest.raises(ValueError, match="same questions of a model before and after training"):
        transitions(old, new[1:])
    with pytest.raises(ValueError, match="of which"):
        transitions(old, [replace(new[0], text="?"), *new[1:]])


def test_a_collapse_is_a_fall_below_half_of_the_best_for_good() -> None:
    level, low = [0.8] * 20, [0.1] * 20
    assert collapse(level) is None
    assert collapse([*level, *low]) == 23
    assert collapse([*level, *low, *level]) is None  # it has recovered
    assert collapse([*level, 0.0, *level]) is None
    assert collapse([0.1, 0.9] * 10) is None
    assert collapse([0.0] * 20) is None
    assert collapse([1.0, 0.0]) is None  # too short to tell
