"""A reward function that a user wrote, called as TRL or as verl calls it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyrl.answers import Answers
from pyrl.foreign import TIME_LIMIT, Foreign
from pyrl.vote import Votes

if TYPE_CHECKING:
    from pyrl.leaves import Leaves
    from pyrl.reward import Question

RESERVED = ("prompts", "completions", "completion_ids")
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
LARGEST = float(np.finfo(np.float32).max)


def function_at(path: str, what: str, foreign: Foreign) -> Callable[..., Any]:
    """The function of `module:function` or `file.py:function`, imported within `foreign`.

    ValueError says of `what` that there is none; ForeignError: its file failed.
    """
    source, colon, name = path.rpartition(":")
    if not (colon and source and name):
        raise ValueError(f"{what}: expected module:function or file.py:function, got {path!r}")
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise ValueError(f"{what} {path!r}: there is no file {source}")
    with foreign:
        names = runpy.run_path(source) if is_file else vars(importlib.import_module(source))
    if not callable(names.get(name)):
        raise ValueError(f"{what} {path!r}: {source} has no function {name}")
    function: Callable[..., Any] = names[name]
    return function


@dataclass(frozen=True)
class FunctionReward:
    """A user's function, as TRL or as verl calls it.

    TRL: f(prompts, completions, completion_ids, **columns) -> list[float | None], lists of one
    entry per leaf: its prompt and its response (text, or chat messages where the data has those),
    the token ids of the response, and each further column of the data (None where a prompt lacks
    it). A function without **columns gets what it has parameters for. None or NaN is unknown.

    verl: f(data_source, solution_str, ground_truth, extra_info) -> a number, or {"score": a
    number}, once per leaf; for functions with parameters solution_str and ground_truth.

    Raises ValueError if the function cannot be found, asks for what it is not given, or returns
    something else; ForeignError for whatever it raises, and if it takes longer than `time_limit`.
    """

    path: str | Callable[..., Any]
    """The function, or where it is: `module:function` or `file.py:function`."""
    pass_answers: bool = False
    """Also pass the true answers, as the column `answer` and as the data's own columns: supervised
    training. verl's functions need it."""
    time_limit: float = TIME_LIMIT
    """Seconds that it may take for the responses of a step, and that its file may take to load."""

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise ValueError(f"time_limit: expected seconds > 0, got {self.time_limit}")
        _ = self.function

    def __reduce__(self) -> tuple[type[FunctionReward], tuple[Any, bool, float]]:
        # The path finds the function.
        return FunctionReward, (self.path, self.pass_answers, self.time_limit)

    @cached_property
    def name(self) -> str:
        """Of the function alone."""
        if isinstance(self.path, str):
            return self.path.rpartition(":")[2]
        named = self.path if inspect.isroutine(self.path) else type(self.path)
        return named.__name__

    @cached_property
    def function(self) -> Callable[..., Any]:
        if not isinstance(self.path, str):
            if not callable(self.path):
                raise ValueError(
                    f"reward: expected a function, module:function or file.py:function, got "
                    f"{self.path!r}"
                )
            return self.path
        return function_at(self.path, "reward", self._foreign())

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the function can be called with; none where Python cannot tell."""
        try:
            return inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            return MappingProxyType({})

    @property
    def _required(self) -> list[str]:
        """Parameters that must be given, by their names."""
        return [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]

    @property
    def _is_verl(self) -> bool:
        return {"solution_str", "ground_truth"} <= self.parameters.keys()

    def check(self, prompts: Sequence[Question], data: str) -> None:
        """ValueError if the function needs something that these questions do not have."""
        if self._is_verl and not self.pass_answers:
            raise ValueError(
                f"reward {self._label}: its parameter ground_truth is the true answer, which is "
                f"passed with --reward-answers"
            )
        given = VERL if self._is_verl else (*RESERVED, *self._columns(prompts))
        unknown = [name for name in self._required if name not in given]
        by_place = [n for n, p in self.parameters.items() if p.kind is p.POSITIONAL_ONLY]
        if unknown or by_place or not self._wants({"completions", "completion_ids", *VERL[1:3]}):
            got = ", ".join(map(str, self.parameters.values()))
            hint = "" if self.pass_answers else "; true answers are passed with --reward-answers"
            raise ValueError(
                f"reward {self._label}: expected parameters by name among {', '.join(given)}, "
                f"which is what {data} gives, got ({got}){hint}"
            )

    def __call__(
        self, leaves: Leaves, answers: Answers, votes: Votes, prompts: Sequence[Question]
    ) -> NDArray[np.float64]:
        asked = [prompts[group] for group in leaves.group_N]
        columns = {
            name: [_cell(prompt, name, self.pass_answers) for prompt in asked]
            for name in dict.fromkeys([*self._columns(prompts), *self._required])
            if name not in RESERVED
        }
        with self._foreign():
            if self._is_verl:
                value_N: Any = [
                    self._verl(prompt, text)
                    for prompt, text in zip(asked, leaves.text_N, strict=True)
                ]
            else:
                value_N = self._trl(asked, leaves, columns)
        return self._checked(value_N, len(asked))

    def usable(self, answers: Answers, votes: Votes, reward_N: NDArray[np.float64]) -> bool:
        """Whether anything is known."""
        return bool(np.isfinite(reward_N).any())

    def _foreign(self) -> Foreign:
        file = self.path.rpartition(":")[0] if isinstance(self.path, str) else ""
        if inspect.isfunction(self.path):
            file = self.path.__code__.co_filename
        return Foreign(f"reward {self._label}", self.time_limit, file)

    @property
    def _label(self) -> str:
        """For messages."""
        return self.path if isinstance(self.path, str) else self.name

    def _wants(self, names: set[str]) -> set[str]:
        """Those of these names that the function takes."""
        takes_all = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        named = {n for n, p in self.parameters.items() if p.kind is not p.VAR_POSITIONAL}
        return names if takes_all else names & named

    def _columns(self, prompts: Sequence[Question]) -> list[str]:
        """Names of the columns that these questions have for the function."""
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        if self.pass_answers:
            names["answer"] = None
            names |= dict.fromkeys(name for prompt in prompts for name in prompt.truth)
        for reserved in RESERVED:
            if reserved in names:
                raise ValueError(
                    f"reward {self._label}: the data set's column {reserved} is reserved"
                )
        return list(names)

    def _trl(
        self, asked: Sequence[Question], leaves: Leaves, columns: Mapping[str, list[Any]]
    ) -> Any:
        given = {
            "prompts": [
                prompt.text if prompt.messages is None else [{**m} for m in prompt.messages]
                for prompt in asked
            ],
            "completions": [
                text if prompt.messages is None else [{"role": "assistant", "content": text}]
                for prompt, text in zip(asked, leaves.text_N, strict=True)
            ],
            "completion_ids": [token_T.tolist() for token_T in leaves.token_N],
            **columns,
        }
        wanted = self._wants(set(given))
        value_N = self.function(**{name: given[name] for name in given if name in wanted})
        return asyncio.run(value_N) if inspect.iscoroutine(value_N) else value_N

    def _verl(self, prompt: Question, text: str) -> Any:
        given = {
            "data_source": prompt.columns.get("data_source", ""),
            "solution_str": text,
            "ground_truth": prompt.truth.get("ground_truth", prompt.answer),
            "extra_info": prompt.columns.get("extra_info") or {},
        }
        wanted = self._wants(set(given))
        value = self.function(**{name: given[name] for name in given if name in wanted})
        return value["score"] if isinstance(value, Mapping) else value

    def _checked(self, value_N: Any, expected: int) -> NDArray[np.float64]:
        if isinstance(value_N, np.ndarray | torch.Tensor):
            if value_N.ndim != 1:
                raise ValueError(
                    f"reward {self._label}: expected {expected} values, one per completion, got an "
                    f"array of shape {tuple(value_N.shape)}"
                )
            value_N = value_N.tolist()
        if not isinstance(value_N, Sequence) or isinstance(value_N, str | bytes):
            kind = type(value_N).__name__
            raise ValueError(f"reward {self._label}: expected a list of numbers, got {kind}")
        if len(value_N) != expected:
            raise ValueError(
                f"reward {self._label}: expected {expected} values, one per completion, "
                f"got {len(value_N)}"
            )
        return np.array([self._number(value, i) for i, value in enumerate(value_N)])

    def _number(self, value: Any, place: int) -> float:
        """NaN for None; ValueError for what is no single number in the range of float32."""
        if value is None:
            return math.nan
        number = math.inf
        if hasattr(value, "__float__") and not isinstance(value, str) and np.ndim(value) == 0:
            try:
                number = float(value)
            except (OverflowError, TypeError, ValueError):
                number = math.inf
        if abs(number) > LARGEST:
            shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
            raise ValueError(
                f"reward {self._label}: expected a finite number or None, got {shown} "
                f"for completion {place}"
            )
        return number


def _cell(prompt: Question, name: str, pass_answers: bool) -> Any:
    """The value of a column for a question, None if it has none."""
    if pass_answers and name in prompt.truth:
        return prompt.truth[name]
    if pass_answers and name == "answer":
        return prompt.answer
    return prompt.columns.get(name)
