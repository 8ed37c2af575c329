"""Saved trees as the page takes them: segments with the texts and numbers of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import PackedRows, pack_flat
from pyrl.report.page.thinning import digits
from pyrl.report.saved_trees import SavedTrees

Column = list[float | None]


@dataclass(frozen=True)
class Shape:
    """The segments of a step's trees; a root, the question, has no tokens here."""

    parent_S: NDArray[np.int64]
    tree_S: NDArray[np.int64]
    begin_S: NDArray[np.int64]
    """Position of the first token in its response."""
    length_S: NDArray[np.int64]
    end_N: NDArray[np.int64]
    """The segment in which each branch ends."""

    @property
    def first_S(self) -> NDArray[np.int64]:
        """The first token of each among those of all segments, one after the other."""
        return np.cumsum(self.length_S) - self.length_S


def questions(saved: SavedTrees, most: int) -> Iterator[dict[str, Any]]:
    """The trees of a step, one a question, each as far as its first branches have together at most
    `most` tokens.

    `segments` are [parent, position of its first token, tokens], parents first; columns hold the
    tokens of one segment after the other: `word` is an index into `words`, numbers are None where
    they are not known. An advantage is the mean over the leaves that the token is a part of.
    `branches` are leaves and pruned branches, with their segment (None where they do not fit) and
    the mean advantage of their tokens.
    """
    tree_N = [saved.forest.tree_of(branch) for branch in saved.branch_N.tolist()]
    fits_N = _fitting(np.array(tree_N), saved.length_N, most)
    rest = [
        (tree_N[n], {**saved.record["branches"][n], "segment": None, "advantage": None})
        for n in np.flatnonzero(~fits_N).tolist()
    ]
    saved = saved.take(np.flatnonzero(fits_N))
    shape, rows = _shape(saved), pack_flat(saved.forest, saved.branch_N)
    words, columns = _tokens(saved, shape, rows)
    advantage_N = _numbers(_means(rows.leaf_T, saved.advantage_T, len(saved.branch_N)))
    for tree, question in enumerate(saved.record["questions"]):
        here_S = np.flatnonzero(shape.tree_S == tree)
        kept, parent_of = _without_empty(here_S, shape)
        ordinal = {s: n for n, s in enumerate(kept)}
        start = int(shape.first_S[here_S[0]])
        stop = start + int(shape.length_S[here_S].sum())
        number = {word: n for n, word in enumerate(dict.fromkeys(words[start:stop]))}
        yield {
            "step": saved.step,
            **question,
            "spelled": saved.record["spelled"],
            "segments": [
                [ordinal.get(parent_of[s], -1), int(shape.begin_S[s]), int(shape.length_S[s])]
                for s in kept
            ],
            "words": list(number),
            "word": [number[word] for word in words[start:stop]],
            **{name: column[start:stop] for name, column in columns.items()},
            "branches": [
                _without_text(about | {"segment": ordinal[segment], "advantage": advantage})
                for about, segment, advantage in zip(
                    saved.record["branches"], shape.end_N.tolist(), advantage_N, strict=True
                )
                if segment in ordinal
            ]
            + [_without_text(about) for of, about in rest if of == tree],
        }


def _without_text(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name != "text"}


def _fitting(
    tree_N: NDArray[np.int64], length_N: NDArray[np.int64], most: int
) -> NDArray[np.bool_]:
    """Which branches fit: the first of each tree, and more as long as their paths do."""
    fits_N = np.zeros(len(tree_N), bool)
    for tree in np.unique(tree_N):
        here_N = np.flatnonzero(tree_N == tree)
        fits_N[here_N] = np.cumsum(length_N[here_N]) <= most
        fits_N[here_N[0]] = True
    return fits_N


def _shape(saved: SavedTrees) -> Shape:
    segments = saved.forest.segments(saved.branch_N)
    length_S = np.where(segments.parent_S < 0, 0, segments.length_S)
    begin_S = np.zeros(len(length_S), np.int64)
    for s, parent in enumerate(segments.parent_S.tolist()):
        if parent >= 0:
            begin_S[s] = begin_S[parent] + length_S[parent]
    return Shape(segments.parent_S, segments.tree_S, begin_S, length_S, segments.leaf_segment_N)


def _tokens(
    saved: SavedTrees, shape: Shape, rows: PackedRows
) -> tuple[list[str], dict[str, list[Any]]]:
    """Texts and numbers of the tokens of all segments, once each."""
    position_T = _positions(rows.leaf_T)
    unique_T = shape.first_S[rows.segment_T] + position_T - shape.begin_S[rows.segment_T]
    # Where they are on the first path that has them.
    at_U = np.unique(unique_T, return_index=True)[1]
    begin_T = np.where(position_T == 0, 0, np.append(0, saved.end_T)[:-1])
    text_N = [branch["text"] for branch in saved.record["branches"]]
    words = [text_N[rows.leaf_T[t]][begin_T[t] : saved.end_T[t]] for t in at_U.tolist()]
    return words, {
        "id": rows.label_T[at_U].tolist(),
        "logprob": _numbers(rows.logprob_T[at_U]),
        "entropy": _numbers(rows.entropy_T[at_U]),
        "confidence": _numbers(rows.confidence_T[at_U]),
        "advantage": _numbers(_means(unique_T, saved.advantage_T)),
        "ratio": _numbers(_means(unique_T, saved.after_T - rows.logprob_T)),
    }


def _positions(leaf_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each token in its response; the tokens come leaf after leaf."""
    first_T = np.searchsorted(leaf_T, leaf_T)
    return np.arange(len(leaf_T)) - first_T


def _means(
    of_T: NDArray[np.int64], value_T: NDArray[np.floating], count: int = 0
) -> NDArray[np.float64]:
    """Means over the tokens of which the value is known, by what they are of; NaN without any."""
    known_T = np.isfinite(value_T)
    count = max(count, int(of_T.max(initial=-1)) + 1)
    weight = np.bincount(of_T[known_T], minlength=count)
    total = np.bincount(of_T[known_T], value_T[known_T], minlength=count)
    return np.where(weight > 0, total / np.maximum(weight, 1), np.nan)


def _numbers(value_U: NDArray[np.floating]) -> Column:
    return [digits(value, 3) if np.isfinite(value) else None for value in value_U.tolist()]


def _without_empty(here_S: NDArray[np.int64], shape: Shape) -> tuple[list[int], dict[int, int]]:
    """Segments that have tokens or end a branch, and the one above each: a fork at the end of a
    branch, or several at one place, leave segments of length 0."""
    ends, parent_of = set(shape.end_N.tolist()), {}
    kept = [s for s in here_S.tolist() if shape.length_S[s] or s in ends]
    for s in kept:
        parent = int(shape.parent_S[s])
        while parent >= 0 and not shape.length_S[parent] and parent not in ends:
            parent = int(shape.parent_S[parent])
        parent_of[s] = parent
    return kept, parent_of
