"""Below: the frozen model that an adapter trains on, as the reference of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from transformers import PreTrainedModel

from pyrl.models.lora import without_adapter
from pyrl.ranks.sharded import Held

Found = TypeVar("Found")


class Below(Held):
    """The policy's model without its adapter, in the same parts."""

    def __init__(self, policy: Held) -> None:
        super().__init__(policy.model)
        self._policy, self.sharded = policy, policy.sharded

    def __call__(self, use: Callable[[PreTrainedModel], Found]) -> Found:
        with without_adapter(self.model):
            return self._policy(use)
