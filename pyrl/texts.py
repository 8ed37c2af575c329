"""Texts: which characters of a response its tokens spell, and which steps they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Decode = Callable[[Sequence[NDArray[np.int32]]], list[str]]
"""Turns the tokens of responses into their texts."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""A decoder's sign for a character of which bytes are missing."""


@dataclass(frozen=True)
class Texts:
    """The texts of N responses with T tokens in all; nothing is computed before it is read."""

    text_N: tuple[str, ...]
    """Decoded, without special tokens."""
    token_N: tuple[NDArray[np.int32], ...]
    """Token ids of each response."""
    decode: Decode

    @cached_property
    def span_T2(self) -> NDArray[np.int64]:
        """The characters of each token in the text of its response: the first, and one past the
        last.

        Spans of a response follow each other without a gap. A character belongs to the token that
        completes it; the bytes before, and special tokens, have none. ValueError if the tokens do
        not spell the text one after the other.
        """
        vocabulary = np.unique(np.concatenate([*self.token_N, np.zeros(0, np.int32)]))
        alone = dict(
            zip(vocabulary.tolist(), self.decode([*vocabulary.reshape(-1, 1)]), strict=True)
        )
        spans = []
        for text, tokens in zip(self.text_N, self.token_N, strict=True):
            parts = [alone[token] for token in tokens.tolist()]
            if BROKEN in text or "".join(parts) != text:
                parts = self._spelled(tokens, text)
            end_T = np.cumsum([len(part) for part in parts], dtype=np.int64)
            spans.append(np.stack([np.append(0, end_T[:-1])[: len(end_T)], end_T], axis=1))
        return np.concatenate([*spans, np.zeros((0, 2), np.int64)])

    def steps(self, separator: str = "\n\n") -> NDArray[np.int64]:
        """The ordinal [T] of each token's step in its response, from 0.

        A step ends with the separator, unless that ends the response. A token belongs to the step
        in which it begins; steps in which no token begins are not counted. ValueError as `span_T2`,
        and for an empty separator.
        """
        if not separator:
            raise ValueError("separator: expected a text, got an empty one")
        begin_T, step_T, start = self.span_T2[:, 0], np.zeros(len(self.span_T2), np.int64), 0
        for text, tokens in zip(self.text_N, self.token_N, strict=True):
            lengths = [len(part) + len(separator) for part in text.split(separator)]
            end = np.cumsum(lengths)[:-1]
            stop = start + len(tokens)
            passed = np.searchsorted(end[end < len(text)], begin_T[start:stop], side="right")
            step_T[start:stop] = np.unique(passed, return_inverse=True)[1]
            start = stop
        return step_T

    def _spelled(self, tokens: NDArray[np.int32], text: str) -> list[str]:
        """What each token adds to the text, where some of them read otherwise when alone.

        Each is decoded after those since the last complete character but one: a tokenizer may
        leave out the space of the first.
        """
        parts, begin, read = [], 0, 0
        for stop in range(1, len(tokens) + 1):
            before, after = self.decode([tokens[begin:read], tokens[begin:stop]])
            new = after[len(before) :]
            if new.endswith(BROKEN) or not new:
                parts.append("")
                continue
            parts.append(new)
            begin, read = read, stop
        spelled = "".join(parts)
        if parts and text.startswith(spelled):
            parts[-1] += text[len(spelled) :]  # bytes that no token completed
        elif spelled != text:
            raise ValueError(
                f"span_T2: expected tokens that spell their response one after the other, "
                f"got {spelled[-40:]!r} for {text[-40:]!r}"
            )
        return parts
