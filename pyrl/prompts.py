"""Prompts: the questions of a source as token ids, where the data path begins."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pyrl.sources import DataError, Row, open_source

__all__ = ["DataError", "Prompt", "load_prompts"]

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth")


@dataclass(frozen=True)
class Prompt:
    """One question."""

    index: int
    """Position in its source, from 0."""
    text: str
    """The question alone: no prefix, suffix or chat template."""
    tokens: NDArray[np.int32]
    """What the model reads, at least one token."""
    answer: str | None
    """For metrics; no other reward than `TrueReward`, or a function that asks for it, sees it."""
    columns: Mapping[str, Any]
    """All other columns of the row, for reward functions."""


def step_prompts(prompts: Sequence[Prompt], step: int, count: int, seed: int) -> list[Prompt]:
    """The `count` questions of a step (from 0): one random order of all of them after the other."""
    size = len(prompts)
    places = range(step * count, (step + 1) * count)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(size)
        for epoch in {place // size for place in places}
    }
    return [prompts[orders[place // size][place % size]] for place in places]


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    space: str = "the model's positions",
    chat: bool | None = None,
    prefix: str = "",
    suffix: str = "",
    limit: int | None = None,
) -> list[Prompt]:
    """Read and tokenize the first `limit` questions of a source.

    `source`: a .jsonl, .json, .csv or .parquet file; "demo:train", "demo:heldout" or
    "demo:length18"; "reasoning_gym:TASK?size=50&seed=0&shots=6&OPTION=VALUE"; else a Hugging Face
    data set "ID[/CONFIG][:SPLIT]". A row's question is its column prompt (a string or chat
    messages), question or problem; its answer is answer, solution, ground_truth or
    reward_model.ground_truth. `chat`: use the tokenizer's chat template (None: if there is one and
    no worked examples). `max_tokens`: of a prompt, at most; `space` says of what that is left by
    the responses. `prefix` and `suffix` are put around the question, as they are.
    Raises DataError.
    """
    if max_tokens < 1:
        raise DataError(
            f"{source}: no room for a question: the responses may take all of {space} "
            f"and {-max_tokens} more; lower their limit (max_tokens)"
        )
    opened = open_source(source)
    if chat is None:
        chat = bool(tokenizer.chat_template) and not opened.prefix
    if chat and not tokenizer.chat_template:
        raise DataError(f"{source}: chat is on, but the tokenizer has no chat template")
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit: expected at least 1, got {limit}")
    encode = Encoder(tokenizer, max_tokens, space, chat, opened.prefix + prefix, suffix)
    try:
        prompts = [encode(i, row) for i, row in enumerate(islice(opened.rows, limit))]
    finally:
        if isinstance(opened.rows, Generator):
            opened.rows.close()  # its file too, though a row was refused or the limit met
    if not prompts:
        raise DataError(f"{source}: the data set is empty")
    return prompts


@dataclass(frozen=True)
class Encoder:
    """Turns a row into a prompt."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    space: str
    chat: bool
    prefix: str
    suffix: str

    def __call__(self, index: int, row: Row) -> Prompt:
        columns = dict(row.columns)
        value = _take_prompt(columns, row.where)
        text, rendered = self._render(value, row.where)
        try:
            rendered.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{row.where}: the prompt is no valid Unicode: {error}") from error
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=not self.chat)["input_ids"]
        if not ids:
            raise DataError(f"{row.where}: the prompt is empty")
        if len(ids) > self.max_tokens:
            raise DataError(
                f"{row.where}: prompt {index} has {len(ids)} tokens, the limit is "
                f"{self.max_tokens}: what the responses leave of {self.space}"
            )
        unknown = self.tokenizer.unk_token_id
        if unknown in ids and self.tokenizer.unk_token not in rendered:
            raise DataError(f"{row.where}: the tokenizer has no token for a part of {rendered!r}")
        answer = _take_answer(columns)
        return Prompt(index, text, np.array(ids, dtype=np.int32), answer, columns)

    def _render(self, value: Any, where: str) -> tuple[str, str]:
        """The question, and the whole text that the model reads."""
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else list(value)
        text: str = messages[-1]["content"]
        wrapped = f"{self.prefix}{text}{self.suffix}"
        if self.chat:
            messages[-1] = {**messages[-1], "content": wrapped}
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            return text, str(rendered)
        if not isinstance(value, str):
            raise DataError(f"{where}: the prompt is chat messages, but no chat template is in use")
        return text, wrapped


def _take_prompt(columns: dict[str, Any], where: str) -> str | list[dict[str, Any]]:
    """Remove the prompt column from `columns` and return its value."""
    name = next((name for name in PROMPT_COLUMNS if columns.get(name) is not None), None)
    if name is None:
        expected, found = ", ".join(PROMPT_COLUMNS), ", ".join(columns) or "none"
        raise DataError(f"{where}: no prompt: expected one of {expected}; the columns are: {found}")
    value = columns.pop(name)
    if isinstance(value, str):
        return value
    messages = list(value) if isinstance(value, Sequence) else []
    if not messages or not all(_is_message(message) for message in messages):
        raise DataError(
            f"{where}: {name}: expected a string or a list of chat messages "
            f'{{"role": ..., "content": ...}}, got {value!r}'
        )
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _take_answer(columns: dict[str, Any]) -> str | None:
    """Remove whatever column holds an answer from `columns`; the first one's value, as text."""
    given = [columns.pop(name, None) for name in ANSWER_COLUMNS]
    match columns.pop("reward_model", None):
        case {"ground_truth": str() | int() | float() as answer}:
            given.append(answer)
    texts = [str(value) for value in given if value is not None]
    return next((text for text in texts if text.strip()), None)  # an empty cell is no answer
