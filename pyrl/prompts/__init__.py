"""Prompts: the questions of a source as token ids, where the data path begins."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pyrl.answers.truth import final_answer, is_long_text
from pyrl.foreign import TIME_LIMIT
from pyrl.prompts.chat import ChatTemplate, Message, last_user, read_arguments, read_messages
from pyrl.sources import DataError, Row, Rows, Task, open_source

__all__ = ["DataError", "Prompt", "load_prompts", "step_prompts", "tokenized"]

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "question", "problem", "messages")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth")
"""In any case: `Question` is `question`."""


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
    messages: Sequence[Message] | None = None
    """The question as chat messages, where the data has it so."""
    truth: Mapping[str, Any] = field(default_factory=dict)
    """The columns that hold the answer, as they are in the data; who reads `answer` reads them."""
    task: Task | None = None
    """Whose scorer says which answers are right, in place of `answer`."""


def step_prompts(prompts: Sequence[Prompt], step: int, count: int, seed: int) -> list[Prompt]:
    """The `count` questions of a step (from 0): one random order of all of them after the other."""
    size = len(prompts)
    places = range(step * count, (step + 1) * count)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(size)
        for epoch in {place // size for place in places}
    }
    return [prompts[orders[place // size][place % size]] for place in places]


def other_prompts(
    prompts: Sequence[Prompt], taken: Sequence[Prompt], step: int, count: int, seed: int
) -> list[Prompt]:
    """Up to `count` questions at random that a step, which begins at 0, has not taken yet."""
    known = {prompt.index for prompt in taken}
    others = [prompt for prompt in prompts if prompt.index not in known]
    order = np.random.default_rng([seed, step, len(taken)]).permutation(len(others))
    return [others[place] for place in order[:count]]


def repeating_steps(prompts: Sequence[Prompt], steps: int, count: int, seed: int) -> int:
    """In how many of the first steps a question comes more than once: where two orders meet."""
    size = len(prompts)
    meeting = (n for n in range(steps) if n * count // size != ((n + 1) * count - 1) // size)
    return sum(
        len({prompt.index for prompt in step_prompts(prompts, step, count, seed)}) < count
        for step in meeting
    )


def load_prompts(
    source: str | Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    space: str = "the model's positions",
    chat: bool | None = None,
    prefix: str = "",
    suffix: str = "",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system: str | None = None,
    chat_arguments: Sequence[str] = (),
    time_limit: float = TIME_LIMIT,
    limit: int | None = None,
) -> list[Prompt]:
    """Read and tokenize the first `limit` questions of a source.

    `source`: a .jsonl, .json, .csv or .parquet file; "demo:train", "demo:heldout" or
    "demo:length18"; "reasoning_gym:TASK?size=50&seed=0&shots=6&OPTION=VALUE"; else a Hugging Face
    data set "ID[/CONFIG][:SPLIT]"; or rows in memory. A row's question, a string or chat messages,
    is in its column prompt, question, problem or messages, or in `prompt_column`; its answer is in
    answer, solution, ground_truth or reward_model.ground_truth, or in `answer_column`. `chat`: use
    the tokenizer's chat template (None: if there is one and no worked examples), with a message
    `system` first, and with `chat_arguments`, texts NAME=VALUE, as its variables; it may take
    `time_limit` seconds for a question. `max_tokens`: of a prompt, at most; `space` says of what
    that is left by the responses. `prefix` and `suffix` are put around the question, as they are.
    Raises DataError; ForeignError for a template that fails.
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
    if not chat and (system is not None or chat_arguments):
        name = "system" if system is not None else "chat_arguments"
        raise DataError(f"{source}: {name}: expected a chat template in use, there is none")
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit: expected at least 1, got {limit}")
    arguments = read_arguments(chat_arguments, tokenizer)
    template = ChatTemplate(tokenizer, system, arguments, time_limit) if chat else None
    wrap = (opened.prefix + prefix, suffix)
    names = (prompt_column, answer_column)
    encode = Encoder(tokenizer, max_tokens, space, template, *wrap, *names, opened.task)
    try:
        prompts = [encode(i, row) for i, row in enumerate(islice(opened.rows, limit))]
    finally:
        if isinstance(opened.rows, Generator):
            opened.rows.close()  # its file too, though a row was refused or the limit met
    encode.check(prompts, str(source))
    return prompts


def tokenized(row: Mapping[str, Any], tokens: NDArray[np.int32], index: int) -> Prompt:
    """A question that another program has tokenized: `row` has it in a column `prompt`, a string or
    chat messages, and answers and further columns as the rows of `load_prompts` do. DataError."""
    columns, where = dict(row), f"row {index}"
    value = _take_prompt(columns, "prompt", where)
    answer, truth = _take_answer(columns, None)
    if isinstance(value, str):
        return Prompt(index, value, tokens, answer, columns, truth=truth)
    text: str = value[last_user(value)]["content"]
    return Prompt(index, text, tokens, answer, columns, value, truth)


@dataclass
class Encoder:
    """Turns a row into a prompt."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    space: str
    chat: ChatTemplate | None
    prefix: str
    suffix: str
    prompt_column: str | None
    answer_column: str | None
    task: Task | None
    cut: list[int] = field(default_factory=list)
    """Tokens that the tokenizer adds after a text, which are left out."""

    def __call__(self, index: int, row: Row) -> Prompt:
        columns = dict(row.columns)
        value = _take_prompt(columns, self.prompt_column, row.where)
        text, rendered = self._render(value, row.where)
        if not text.strip():
            raise DataError(f"{row.where}: the prompt is empty")
        try:
            rendered.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{row.where}: the prompt is no valid Unicode: {error}") from error
        ids = self._tokens(rendered)
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
        answer, truth = _take_answer(columns, self.answer_column)
        messages = None if isinstance(value, str) else value
        tokens = np.array(ids, dtype=np.int32)
        return Prompt(index, text, tokens, answer, columns, messages, truth, self.task)

    def check(self, prompts: Sequence[Prompt], source: str) -> None:
        """Say once what was left out of all prompts; DataError if none is there, or no answer."""
        if not prompts:
            raise DataError(f"{source}: the data set is empty")
        name = self.answer_column
        if name is not None and not any(name in prompt.truth for prompt in prompts):
            found = ", ".join(prompts[0].columns) or "none"
            raise DataError(
                f"{source}: expected answers in a column {name}; the columns beside the prompt "
                f"are: {found}"
            )
        if self.cut:
            logger.warning(
                "%s: the tokenizer ends each text with %s; the questions are read without, since "
                "the model would answer after its end",
                source,
                ", ".join(self.tokenizer.convert_ids_to_tokens(self.cut)),
            )
        _name_long_truths(source, prompts)

    def _tokens(self, rendered: str) -> list[int]:
        """Token ids, without those that the tokenizer adds after the text."""
        encoded = self.tokenizer(
            rendered, add_special_tokens=self.chat is None, return_special_tokens_mask=True
        )
        ids: list[int] = encoded["input_ids"]
        count = len(ids)
        while count and encoded["special_tokens_mask"][count - 1]:
            count -= 1
        if count < len(ids):
            self.cut = ids[count:]
        return ids[:count]

    def _render(self, value: str | list[Message], where: str) -> tuple[str, str]:
        """The question, and the whole text that the model reads."""
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else list(value)
        asked = last_user(messages)
        text: str = messages[asked]["content"]
        wrapped = f"{self.prefix}{text}{self.suffix}"
        if self.chat is not None:
            messages[asked] = {**messages[asked], "content": wrapped}
            return text, self.chat(messages, where)
        if not isinstance(value, str):
            raise DataError(f"{where}: the prompt is chat messages, but no chat template is in use")
        return text, wrapped


def _name_long_truths(source: str, prompts: Sequence[Prompt]) -> None:
    """Say which true answers no response will ever repeat."""
    long = [p for p in prompts if p.answer and not p.task and is_long_text(p.answer)]
    if long:
        logger.warning(
            "%s: %d of %d true answers can only be compared as a long text, such as that of "
            "question %d, %r: expected a short answer, one behind #### or one in \\boxed{}",
            *(source, len(long), len(prompts), long[0].index, (long[0].answer or "")[:80]),
        )


def _take_prompt(columns: dict[str, Any], chosen: str | None, where: str) -> str | list[Message]:
    """Remove the prompt column from `columns` and return its value."""
    names = _named(columns, PROMPT_COLUMNS) if chosen is None else [chosen]
    name = next((name for name in names if columns.get(name) is not None), None)
    if name is None:
        expected = f"one of {', '.join(PROMPT_COLUMNS)}" if chosen is None else f"a column {chosen}"
        found = ", ".join(columns) or "none"
        raise DataError(f"{where}: no prompt: expected {expected}; the columns are: {found}")
    value = columns.pop(name)
    return value if isinstance(value, str) else read_messages(value, name, where)


def _take_answer(columns: dict[str, Any], chosen: str | None) -> tuple[str | None, dict[str, Any]]:
    """Remove all columns that hold an answer from `columns`: the first one's value, as text (of a
    whole solution, its final answer), and all of them as they are."""
    names = [*([chosen] if chosen in columns else ()), *_named(columns, ANSWER_COLUMNS)]
    truth = {name: columns.pop(name) for name in dict.fromkeys(names)}
    given = list(truth.values()) if chosen is None else [truth.get(chosen)]
    for name in _named(columns, ("reward_model",)):
        match truth.setdefault(name, columns.pop(name)):
            case {"ground_truth": answer}:
                truth.setdefault("ground_truth", answer)
                if chosen is None and isinstance(answer, str | int | float):
                    given.append(answer)
    texts = [str(value) for value in given if value is not None]
    found = next((text for text in texts if text.strip()), None)  # an empty cell is none
    return None if found is None else final_answer(found), truth


def _named(columns: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The columns of these names, written in any case, in the order of the names."""
    return [column for name in names for column in columns if column.lower() == name]
