"""Reading: from tokens to text, what ends a response, and how the answer is read from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.answers.extraction import (
    After,
    Extractor,
    LastNumber,
    Until,
    Whole,
    extractor_named,
)
from pyrl.leaves import Decode
from pyrl.sources import Rows, open_source

CONTEXT = 4
"""Tokens that are decoded before those that can hold a stop text: a tokenizer may spell the first
one otherwise, such as without its space."""


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Text of responses without special tokens."""
    return lambda rows: [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows]


class StopText:
    """A text that ends a response where its tokens, each alone or several together, spell it."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        if not text:
            raise ValueError("stop: expected a text, got an empty one")
        self.text, self._tokenizer = text, tokenizer
        self._reach = len(text.encode()) + CONTEXT
        spelled = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        self.alone = {token for token, spelling in enumerate(spelled) if text in spelling}
        """Tokens that contain the whole text."""
        # A token that is decoded alone may lose its space, and shows a part of a character as
        # U+FFFD: it may be the last one too.
        last, broken = text[-1], "\N{REPLACEMENT CHARACTER}"
        self._may_end_V = np.array(
            [last == " " or last in part or broken in part for part in spelled]
        )

    def may_end(self, token_B: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of these tokens could be the last one of the text; ids beyond it could not."""
        known_B = token_B < len(self._may_end_V)
        may_B: NDArray[np.bool_] = known_B & self._may_end_V[np.where(known_B, token_B, 0)]
        return may_B

    def __call__(self, token_T: NDArray[np.int32]) -> bool:
        """Whether a response that did not hold the text before its last token holds it now."""
        return self.text in self._tokenizer.decode(token_T[-self._reach :].tolist())


@dataclass(frozen=True)
class AnswerFormat:
    """What ends a response, and how its answer is read."""

    extractor: Extractor
    eos: set[int]
    """Token ids that end a response."""
    stop: StopText | None
    """Text that ends it as well; None: none is given."""


def answer_format(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Rows,
    extractor: str | None,
    stop: str | None,
    answer_after: str = "",
) -> AnswerFormat:
    """How the responses to these questions end and are read; None: as the questions ask for.

    ValueError if there is nothing at all to end a response with, or if no decoded response can
    contain `answer_after`.
    """
    source = open_source(data)
    text = source.stop if stop is None else stop
    stops = StopText(text, tokenizer) if text else None
    ids = end_tokens(model, tokenizer) | (stops.alone if stops else set())
    if not ids and stops is None:
        raise ValueError("the model has no end-of-sequence token; give a text to --stop at")
    read = extractor_named(source.extractor if extractor is None else extractor)
    if stops is not None and isinstance(read, Whole | LastNumber):
        read = Until(text, read)
    if answer_after:
        _check_shown(answer_after, tokenizer)
        read = After(answer_after, read)
    return AnswerFormat(read, ids, stops)


def _check_shown(answer_after: str, tokenizer: PreTrainedTokenizerBase) -> None:
    seen = tokenizer.decode(
        tokenizer(answer_after, add_special_tokens=False)["input_ids"], skip_special_tokens=True
    )
    if answer_after.strip() not in seen:
        raise ValueError(
            f"answer_after: expected a text that responses can show, got {answer_after!r}, of "
            f"which this tokenizer leaves {seen!r} (a special token is not shown)"
        )


def check_formats(
    data: str | Rows, others: Iterable[str | Rows], extractor: str | None, stop: str | None
) -> None:
    """ValueError if questions of others want answers that end, or are read, otherwise."""
    ours = open_source(data)
    for other in others:
        theirs = open_source(other)
        for name, given, mine, wanted in (
            ("extractor", extractor, ours.extractor, theirs.extractor),
            ("stop", stop, ours.stop, theirs.stop),
        ):
            if given is None and mine != wanted:
                raise ValueError(
                    f"{other}: expected the {name} of {data}, {mine!r}, got {wanted!r}: give one "
                    f"that fits both by --{name}, or score the model by pyrl eval afterwards"
                )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The model's own ids that end a response."""
    own = model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    ids.discard(None)
    return ids
