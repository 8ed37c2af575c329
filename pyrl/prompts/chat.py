"""Chat: messages of a question, and the tokenizer's template that turns them into text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from pyrl.foreign import Foreign
from pyrl.sources import DataError

Message = dict[str, Any]
"""{"role": ..., "content": text}, and whatever else a template may read."""

RESERVED = ("messages", "add_generation_prompt")
"""What the question itself says to a template."""


def read_messages(value: Any, name: str, where: str) -> list[Message]:
    """The messages in a column; lists of text parts become text.

    DataError unless there is something for the assistant to answer: a message of the user's, and
    none of the assistant's after it.
    """
    messages = list(value) if isinstance(value, Sequence) else []
    if not messages or not all(map(_is_message, messages)):
        raise DataError(
            f"{where}: {name}: expected a string or a list of chat messages "
            f'{{"role": ..., "content": ...}}, got {value!r}'
        )
    read = [{**message, "content": _text(message["content"], name, where)} for message in messages]
    roles = [message["role"] for message in read]
    if roles[-1] == "assistant":
        raise DataError(
            f"{where}: {name}: expected a last message for the assistant to answer, got one by the "
            f"assistant: {read[-1]['content'][:80]!r}"
        )
    if "user" not in roles:
        raise DataError(
            f"{where}: {name}: expected a message by the user, got the roles {', '.join(roles)}"
        )
    return read


def last_user(messages: Sequence[Message]) -> int:
    """The place of the last message by the user: the question."""
    return max(i for i, message in enumerate(messages) if message["role"] == "user")


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str | list | tuple)
    )


def _text(content: Any, name: str, where: str) -> str:
    """Content as text, which may be given as a list of parts {"type": "text", "text": ...}."""
    if isinstance(content, str):
        return content
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: {name}: expected content as text, or as a list of parts "
                f'{{"type": "text", "text": ...}}, got a part of type {kind!r}'
            )
    return "".join(part["text"] for part in content)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template, with what each question adds to it."""

    tokenizer: PreTrainedTokenizerBase
    system: str | None
    """A system message before the others; None: no other than those of the data."""
    arguments: Mapping[str, Any]
    """Variables that the template reads, such as enable_thinking."""
    time_limit: float
    """Seconds for one question."""

    def __call__(self, messages: Sequence[Message], where: str) -> str:
        """The text that the model reads. DataError if the template fails or leaves out words."""
        if self.system is not None:
            if messages[0]["role"] == "system":
                raise DataError(
                    f"{where}: system: expected chat messages without a system message, got "
                    f"{messages[0]['content'][:80]!r}"
                )
            messages = [{"role": "system", "content": self.system}, *messages]
        with Foreign(f"{where}: the tokenizer's chat template", self.time_limit):
            rendered = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False, **self.arguments
            )
        text = str(rendered)
        needed = {"question": messages[last_user(messages)]["content"]}
        if self.system is not None:
            needed["system message"] = self.system
        for what, words in needed.items():
            if words.strip() not in text:
                raise DataError(
                    f"{where}: the tokenizer's chat template leaves out or changes the {what} "
                    f"{words[:80]!r}; it gives {text[:200]!r}"
                )
        return text


def read_arguments(given: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Variables of the template from texts NAME=VALUE, values as YAML has them.

    DataError for one that the template does not read: it would be ignored.
    """
    arguments: dict[str, Any] = {}
    if not given:
        return arguments
    template = tokenizer.get_chat_template()
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise DataError(f"chat_arguments: expected NAME=VALUE, got {text!r}")
        if name in RESERVED or not re.search(rf"\b{name}\b", template):
            raise DataError(
                f"chat_arguments: expected a variable that the tokenizer's chat template reads, "
                f"besides {' and '.join(RESERVED)}, got {name!r}"
            )
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise DataError(f"chat_arguments: {text!r}: no valid YAML: {error}") from error
    return arguments
