"""Release: the one file that imports TRL, in a release that the adapter knows."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers import PreTrainedModel

RELEASES = ("1.14", "1.15", "1.16")
"""Of TRL, that the tests of this folder have run with."""


def check_release() -> None:
    """ImportError unless such a release is installed."""
    wanted = f"pyrl.hosts.trl: expected TRL {RELEASES[0]} to {RELEASES[-1]}"
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ImportError(f"{wanted} (pip install 'pyrl[trl]'), it is not installed") from error
    if ".".join(found.split(".")[:2]) not in RELEASES:
        raise ImportError(f"{wanted} (pip install 'pyrl[trl]'), got {found}")


check_release()

from accelerate.utils import is_peft_model  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

__all__ = ["GRPOConfig", "GRPOTrainer", "base_model"]


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside, with the layers of an adapter if it has one."""
    base: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
    return base
