"""Answers: what each leaf says, and which leaves of a prompt say the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyrl.answers.equivalence import EQUIVALENCES, Equivalence, Exact, MathEquivalence
from pyrl.answers.extraction import (
    EXTRACTORS,
    After,
    Boxed,
    Extractor,
    LastNumber,
    Pattern,
    Until,
    Whole,
    extractor_named,
)
from pyrl.answers.pool import Outcome, Status, VerifierError, VerifierPool
from pyrl.engine import TRUNCATED

if TYPE_CHECKING:
    from pyrl.leaves import Leaves

__all__ = [
    "EQUIVALENCES",
    "EXTRACTORS",
    "After",
    "Answers",
    "Boxed",
    "Equivalence",
    "Exact",
    "Extractor",
    "LastNumber",
    "MathEquivalence",
    "Outcome",
    "Pattern",
    "Status",
    "Until",
    "VerifierError",
    "VerifierPool",
    "Whole",
    "classify",
    "extractor_named",
    "read_answer",
]


@dataclass(frozen=True)
class Answers:
    """The answers of the leaves of a step."""

    answer_N: tuple[str | None, ...]
    """The extracted answer of each leaf; None where the leaf gave none."""
    class_N: NDArray[np.int64]
    """Equal answers to one prompt share a class, numbered from 0 in each group; -1: no answer."""
    unknown: int
    """Comparisons that ran into a limit; the answers were taken for different."""
    equivalence: Equivalence
    """That sorted them: rewards and metrics compare answers by the same relation."""

    def take(self, index_N: NDArray[np.int64]) -> Answers:
        """The answers at these ordinals, classes as they were numbered before."""
        answer_N = tuple(self.answer_N[i] for i in index_N)
        return Answers(answer_N, self.class_N[index_N], self.unknown, self.equivalence)


def read_answer(text: str, finish: int, extractor: Extractor) -> str | None:
    """The answer of a response that ended with `finish` (engine.STOPPED or TRUNCATED)."""
    return None if finish == TRUNCATED and extractor.needs_end else extractor(text)


def classify(leaves: Leaves, extractor: Extractor, equivalence: Equivalence) -> Answers:
    """Extract the answers and sort those of each prompt into classes, in leaf order."""
    answer_N = tuple(
        read_answer(text, finish, extractor)
        for text, finish in zip(leaves.text_N, leaves.finish_N.tolist(), strict=True)
    )
    unknown = equivalence.unknown
    class_N = np.full(len(answer_N), -1, np.int64)
    for group in np.unique(leaves.group_N):
        member_N = np.flatnonzero(leaves.group_N == group)
        class_N[member_N] = equivalence.classes([answer_N[i] for i in member_N])
    return Answers(answer_N, class_N, equivalence.unknown - unknown, equivalence)
