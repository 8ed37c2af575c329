"""Question scores: how a model answered each question of an evaluation, and the file of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 2
"""What a file of these scores has in it."""


@dataclass(frozen=True)
class QuestionScore:
    """One question: a greedy response, samples at the temperature of the scores, and their vote."""

    question: int
    """Its place in the data."""
    text: str
    greedy: bool
    """The greedy response is right."""
    right: tuple[bool, ...]
    """Which samples are right; one whose comparison ran out of time is not."""
    answers: tuple[str | None, ...]
    """What was read from each sample; None if nothing could be."""
    classes: tuple[int, ...]
    """Of each sample: answers that say the same have the same number, -1 is none."""
    distinct: int
    """How many different answers these are."""
    label: str | None
    """The majority of the samples."""
    label_right: bool
    entropy: float
    """Mean token entropy of the samples (nats)."""
    length: float
    """Their mean length (tokens)."""


def save_question_scores(path: Path, scores: Mapping[str, Sequence[QuestionScore]]) -> None:
    """Write the scores of each set of questions as JSON, whole or not at all."""
    sets = {name: [asdict(score) for score in of] for name, of in scores.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = json.dumps({"format": FORMAT, "sets": sets}, ensure_ascii=False)
    part.write_text(text + "\n", "utf-8")
    os.replace(part, path)


def read_question_scores(path: Path) -> dict[str, list[QuestionScore]]:
    """What was written; ValueError names a file of another version, and a damaged one."""
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        written = record["format"]
        if written == FORMAT:
            return {name: [*map(_score, of)] for name, of in record["sets"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected the scores of questions, got {type(error).__name__}: {error}"
        ) from error
    raise ValueError(
        f"{path}: expected scores of format {FORMAT}, got format {written}: another version of "
        f"pyrl wrote them"
    )


def _score(fields: Mapping[str, Any]) -> QuestionScore:
    lists = {name: tuple(fields[name]) for name in ("right", "answers", "classes")}
    return QuestionScore(**{**fields, **lists})
