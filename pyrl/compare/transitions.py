"""Transitions: what training did to the label of each question, the majority of the samples.

A method can gain by saying more surely what it knew, or by learning; arXiv:2605.19444 counts both,
and what is lost: there 0.7 % of questions went from no right sample to right, 21.6 % of solvable
ones were corrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyrl.compare.scores import check_same
from pyrl.report.question_scores import QuestionScore

KINDS = {
    "learned": "the label was wrong before and is right after",
    "from nothing": "of these, no sample was right before",
    "sharpened": "it was right and is, by more samples",
    "corrupted": "it was right before and is wrong after",
}


def transitions(
    before: Sequence[QuestionScore], after: Sequence[QuestionScore]
) -> dict[str, float | None]:
    """How many questions there are of each of `KINDS`, and learned / corrupted; None: none was
    corrupted. ValueError: they are not the same questions."""
    check_same([before], [after], "a model before and after training")
    counts: dict[str, float | None] = dict.fromkeys(KINDS, 0.0)
    for old, new in zip(before, after, strict=True):
        for kind in _kinds(old, new):
            counts[kind] = (counts[kind] or 0.0) + 1
    return with_ratio(counts)


def _kinds(old: QuestionScore, new: QuestionScore) -> list[str]:
    if old.label_right:
        if not new.label_right:
            return ["corrupted"]
        return ["sharpened"] if sum(new.right) > sum(old.right) else []
    if not new.label_right:
        return []
    return ["learned"] if any(old.right) else ["learned", "from nothing"]


def with_ratio(counts: Mapping[str, float | None]) -> dict[str, float | None]:
    """The counts with learned / corrupted."""
    learned, corrupted = counts["learned"], counts["corrupted"]
    ratio = None if learned is None or not corrupted else learned / corrupted
    return {**counts, "learned / corrupted": ratio}
