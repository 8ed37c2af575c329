"""Graph: the functions that torch.compile leaves to Python, where its graph breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Untraced(Protocol):
    def __call__(self, function: _Function) -> _Function: ...


untraced: _Untraced = torch.compiler.disable
"""A decorator: numpy computes in this function, on values that a graph does not have."""
