"""Release: the one file that imports TRL, in a release that the adapter knows."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from pyrl.hosts.versions import require

require("trl")

from accelerate.utils import is_peft_model
from trl import GRPOConfig, GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "base_model"]


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside, with the layers of an adapter if it has one."""
    base: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
    return base
