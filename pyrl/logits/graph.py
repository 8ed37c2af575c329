"""Graph: who traces a call, and the functions that torch.compile leaves to Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Untraced(Protocol):
    def __call__(self, function: _Function) -> _Function: ...


def traced(tensor: Tensor) -> bool:
    """Whether somebody records a call with this tensor, and is to see an op of torch.library.

    Otherwise its dispatch, which takes as long as 100,000 tokens of a policy loss, can be left out.
    """
    recorded = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return recorded or type(tensor) not in (Tensor, Parameter)


untraced: _Untraced = torch.compiler.disable
"""A decorator: numpy computes in this function, on values that a graph does not have."""
