"""pyrl: tree-rollout test-time RL. Fork where the model is unsure, vote, learn.

What needs torch is imported at its first use, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyrl import _core

if _core.__file__:
    from pyrl._core import StaleHandleError, build_info
    from pyrl._core.tree import Forest
else:  # a folder of type stubs; the extension module would be found before it
    raise ImportError(
        f"pyrl: the source tree {_core.__path__[0].removesuffix('/pyrl/_core')} has no compiled "
        "part: run Python in another directory to use the installed package, or run "
        "`pip install -e .` in the source tree"
    )

if TYPE_CHECKING:
    from pyrl import loss, methods, presets
    from pyrl.logits.linear_token_stats import linear_token_stats
    from pyrl.logits.sample_tokens import sample_tokens
    from pyrl.logits.token_stats import token_stats
    from pyrl.loss.fused import fused_policy_loss, linear_policy_loss
    from pyrl.loss.policy_loss import policy_loss
    from pyrl.run.parsing import settings
    from pyrl.train import Trainer

__version__: str = build_info()["version"]

__all__ = [
    "Forest",
    "StaleHandleError",
    "Trainer",
    "build_info",
    "fused_policy_loss",
    "linear_policy_loss",
    "linear_token_stats",
    "loss",
    "methods",
    "policy_loss",
    "presets",
    "sample_tokens",
    "settings",
    "token_stats",
]

_AT_FIRST_USE = {
    "Trainer": "pyrl.train",
    "fused_policy_loss": "pyrl.loss.fused",
    "linear_policy_loss": "pyrl.loss.fused",
    "linear_token_stats": "pyrl.logits.linear_token_stats",
    "policy_loss": "pyrl.loss.policy_loss",
    "sample_tokens": "pyrl.logits.sample_tokens",
    "settings": "pyrl.run.parsing",
    "token_stats": "pyrl.logits.token_stats",
}
"""Functions and their modules."""


def __getattr__(name: str) -> Any:
    if name in _AT_FIRST_USE:
        value = globals()[name] = vars(import_module(_AT_FIRST_USE[name]))[name]
        return value
    if name in __all__:
        return import_module(f"pyrl.{name}")
    raise AttributeError(f"module 'pyrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
