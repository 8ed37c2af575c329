"""Body: what a JSON request says, read field by field; what is wrong is one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


class RequestError(ValueError):
    """A request that cannot be served as it is; the message says what was expected and what came.

    `status` is that of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Body:
    """The fields of a JSON object; `where` is the object's place, for messages."""

    def __init__(self, fields: Any, where: str = "") -> None:
        """RequestError: `fields` is no object."""
        if not isinstance(fields, Mapping):
            raise RequestError(
                f"{where.rstrip('.') or 'body'}: expected a JSON object, got {_said(fields)}"
            )
        self._fields, self._where = fields, where

    @classmethod
    def read(cls, data: bytes) -> Body:
        """RequestError: the bytes are no JSON object."""
        try:
            return cls(json.loads(data))
        except (ValueError, RecursionError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"body: expected a JSON object: {error}") from error

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def text(self, name: str) -> str:
        value = self._fields.get(name)
        if not isinstance(value, str) or not value:
            raise self._unlike(name, "a text")
        return value

    def whole(self, name: str, default: int | None = None, *, least: int, most: int) -> int:
        """A whole number in least..most; without a default the field must be there."""
        value = self._fields.get(name)
        value = default if value is None else value
        if type(value) is not int or not least <= value <= most:
            raise self._unlike(name, f"a whole number in {least}..{most}")
        return value

    def number(self, name: str, default: float, *, least: float = -math.inf) -> float:
        """A finite number of at least `least`."""
        value = self._fields.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value) or value < least:
            raise self._unlike(name, "a number" if least == -math.inf else f"a number >= {least:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._fields.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._unlike(name, "true or false")
        return value

    def inner(self, name: str) -> Body:
        """The object in a field."""
        return Body(self._fields.get(name), f"{self._where}{name}.")

    def tokens(self, name: str) -> list[int]:
        """The token ids of a prompt, whose chunks are all text."""
        inner, tokens = self.inner(name), []
        chunks = inner._fields.get("chunks")
        if not isinstance(chunks, list):
            raise inner._unlike("chunks", "a list")
        for n, fields in enumerate(chunks):
            chunk = Body(fields, f"{inner._where}chunks[{n}].")
            if chunk._fields.get("type") != "encoded_text":
                raise chunk._unlike("type", "'encoded_text'")
            found = chunk._fields.get("tokens")
            if not isinstance(found, list) or not all(type(token) is int for token in found):
                raise chunk._unlike("tokens", "a list of token ids")
            tokens += found
        return tokens

    def stops(self, name: str) -> tuple[list[int] | None, list[str]]:
        """Tokens and texts that end a sample; None for the tokens: those of the model."""
        value = self._fields.get(name)
        if value is None:
            return None, []
        found = [value] if isinstance(value, str) else value
        if isinstance(found, list) and all(type(stop) is int for stop in found):
            return found, []
        if isinstance(found, list) and all(isinstance(stop, str) and stop for stop in found):
            return [], found
        raise self._unlike(name, "a text, a list of texts or a list of token ids")

    def _unlike(self, name: str, expected: str) -> RequestError:
        got = _said(self._fields.get(name))
        return RequestError(f"{self._where}{name}: expected {expected}, got {got}")


def _said(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
