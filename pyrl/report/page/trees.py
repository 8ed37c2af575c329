"""Saved trees as the page takes them: segments with the texts and numbers of their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import pack_flat
from pyrl.report.page.thinning import digits
from pyrl.report.saved_trees import SavedTrees

Column = list[float | None]


def questions(saved: SavedTrees) -> Iterator[dict[str, Any]]:
    """The trees of a step, one a question.

    `segments` are [parent, position of its first token, tokens, leaves and pruned branches below],
    parents first; columns hold the tokens of one segment after the other: `word` is an index into
    `words`, numbers are None where they are not known. An advantage is the mean over the leaves
    that the token is a part of. `branches` are leaves and pruned branches with their segment.
    """
    forest, branch_N = saved.forest, saved.branch_N
    segments, rows = forest.segments(branch_N), pack_flat(forest, branch_N)
    length_S = np.where(segments.parent_S < 0, 0, segments.length_S)
    begin_S = np.zeros(len(length_S), np.int64)
    for s, parent in enumerate(segments.parent_S.tolist()):
        if parent >= 0:
            begin_S[s] = begin_S[parent] + length_S[parent]
    first_S = np.cumsum(length_S) - length_S
    position_T = _positions(rows.leaf_T)
    unique_T = first_S[rows.segment_T] + position_T - begin_S[rows.segment_T]
    # Tokens of the segments, once each: where they are on the first path that has them.
    at_U = np.unique(unique_T, return_index=True)[1]
    begin_T = np.where(position_T == 0, 0, np.append(0, saved.end_T[:-1])[: len(position_T)])
    text_N = [branch["text"] for branch in saved.record["branches"]]
    word_U = [text_N[rows.leaf_T[t]][begin_T[t] : saved.end_T[t]] for t in at_U.tolist()]
    columns = {
        "id": rows.label_T[at_U].tolist(),
        "logprob": _numbers(rows.logprob_T[at_U]),
        "entropy": _numbers(rows.entropy_T[at_U]),
        "confidence": _numbers(rows.confidence_T[at_U]),
        "advantage": _numbers(_means(unique_T, saved.advantage_T)),
        "ratio": _numbers(_means(unique_T, saved.after_T - rows.logprob_T)),
    }
    of_N = segments.leaf_segment_N
    for tree, question in enumerate(saved.record["questions"]):
        here_S = np.flatnonzero(segments.tree_S == tree)
        kept_S, parent_S = _without_empty(here_S, segments.parent_S, length_S, set(of_N.tolist()))
        start, stop = int(first_S[here_S[0]]), int(first_S[here_S[-1]] + length_S[here_S[-1]])
        words = dict.fromkeys(word_U[start:stop])
        number = {word: n for n, word in enumerate(words)}
        ordinal = {s: n for n, s in enumerate(kept_S)}
        yield {
            "step": saved.step,
            **question,
            "spelled": saved.record["spelled"],
            "prompt": len(forest.prompt(tree)),
            "segments": [
                [ordinal.get(parent_S[s], -1), int(begin_S[s]), int(length_S[s])] for s in kept_S
            ],
            "words": list(words),
            "word": [number[word] for word in word_U[start:stop]],
            **{name: column[start:stop] for name, column in columns.items()},
            "branches": [
                {name: value for name, value in about.items() if name != "text"}
                | {"segment": ordinal[int(of_N[n])]}
                for n, about in enumerate(saved.record["branches"])
                if int(of_N[n]) in ordinal
            ],
        }


def _positions(leaf_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each token in its response; the tokens come leaf after leaf."""
    first_T = np.searchsorted(leaf_T, leaf_T)
    return np.arange(len(leaf_T)) - first_T


def _means(unique_T: NDArray[np.int64], value_T: NDArray[np.floating]) -> NDArray[np.float64]:
    """Means [U] over the paths on which the value of a token is known; NaN where on none."""
    known_T = np.isfinite(value_T)
    count = int(unique_T.max(initial=-1)) + 1
    weight_U = np.bincount(unique_T[known_T], minlength=count)
    sum_U = np.bincount(unique_T[known_T], value_T[known_T], minlength=count)
    return np.where(weight_U > 0, sum_U / np.maximum(weight_U, 1), np.nan)


def _numbers(value_U: NDArray[np.floating]) -> Column:
    return [digits(value, 3) if np.isfinite(value) else None for value in value_U.tolist()]


def _without_empty(
    here_S: NDArray[np.int64],
    parent_S: NDArray[np.int64],
    length_S: NDArray[np.int64],
    ends: set[int],
) -> tuple[list[int], dict[int, int]]:
    """Segments that have tokens or end a branch, and the one above each: a fork at the end of a
    branch, or several at one place, leave segments of length 0. The root, the question, has none.
    """
    above: dict[int, int] = {}
    kept = []
    for s in here_S.tolist():
        parent = int(parent_S[s])
        while parent >= 0 and not length_S[parent] and parent not in ends:
            parent = int(parent_S[parent])
        if length_S[s] or s in ends:
            kept.append(s)
            above[s] = parent
    return kept, above
