"""Arguments of wrong types: TypeError names the argument and what came for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import pyrl
from pyrl.logits.sampling import Sampling
from pyrl.loss.terms import loss_terms
from pyrl.methods import METHODS

LOGITS_TV = torch.zeros(3, 5)
LABEL_T = torch.arange(3)
COLUMN_T = torch.zeros(3)
LOSS = pyrl.presets.PRESETS["dapo"]()
SEED_B, POSITION_B = np.arange(3, dtype=np.uint64), np.arange(3)


def policy_loss(**other: Any) -> Any:
    given: dict[str, Any] = {"logprob_T": COLUMN_T, "entropy_T": COLUMN_T, "loss": LOSS}
    given |= {"advantage_T": COLUMN_T, "old_logprob_T": COLUMN_T}
    return pyrl.policy_loss(**given | other)


def token_stats(**other: Any) -> Any:
    return pyrl.token_stats(**{"logits_TV": LOGITS_TV, "label_T": LABEL_T} | other)


def linear_token_stats(**other: Any) -> Any:
    given = {"hidden_TH": LOGITS_TV, "weight_VH": torch.zeros(7, 5), "label_T": LABEL_T}
    return pyrl.linear_token_stats(**given | other)


def fused_policy_loss(**other: Any) -> Any:
    given: dict[str, Any] = {"logits_TV": LOGITS_TV, "label_T": LABEL_T, "loss": LOSS}
    given |= {"advantage_T": COLUMN_T, "old_logprob_T": COLUMN_T}
    return pyrl.fused_policy_loss(**given | other)


def linear_policy_loss(**other: Any) -> Any:
    given: dict[str, Any] = {"hidden_TH": LOGITS_TV, "weight_VH": torch.zeros(7, 5)}
    given |= {"label_T": LABEL_T, "loss": LOSS}
    given |= {"advantage_T": COLUMN_T, "old_logprob_T": COLUMN_T}
    return pyrl.linear_policy_loss(**given | other)


def sample_tokens(**other: Any) -> Any:
    given: dict[str, Any] = {"logits_BV": LOGITS_TV, "seed_B": SEED_B, "position_B": POSITION_B}
    return pyrl.sample_tokens(**given | {"sampling": Sampling()} | other)


def terms(**other: Any) -> Any:
    given: dict[str, Any] = {"loss": LOSS, "columns": {"advantage_T": COLUMN_T}}
    return loss_terms(**given | other)


def method(**other: Any) -> Any:
    return replace(METHODS["ttrl"](), **other)


NONE, NUMPY = (None, "None"), (COLUMN_T.numpy(), "a numpy array float32[3]")
LIST, NAME = ([1.0], "list [1.0]"), ("dapo", "'dapo'")
UNCALLED = (pyrl.presets.dapo, "the function dapo")
CASES: list[tuple[Callable[..., Any], str, tuple[Any, str]]] = [
    *((f, "loss", got) for f in (policy_loss, fused_policy_loss, terms, method)
      for got in (UNCALLED, NAME, NONE)),
    *((policy_loss, n, got) for n in ("logprob_T", "entropy_T") for got in (NONE, NUMPY, LIST)),
    *((f, "advantage_T", NUMPY) for f in (policy_loss, fused_policy_loss, linear_policy_loss)),
    *((policy_loss, n, got) for n in ("mask_T", "offset_N1", "group_N") for got in (NUMPY, LIST)),
    *((fused_policy_loss, n, LIST) for n in ("mask_T", "offset_N1", "terms")),
    *((f, n, got) for f in (token_stats, fused_policy_loss) for n in ("logits_TV", "label_T")
      for got in (NONE, NUMPY, LIST)),
    *((f, n, got) for f in (linear_token_stats, linear_policy_loss)
      for n in ("hidden_TH", "weight_VH", "label_T") for got in (NONE, NUMPY)),
    (linear_token_stats, "bias", LIST),
    (linear_policy_loss, "loss", UNCALLED),
    (policy_loss, "terms", NUMPY),
    (policy_loss, "state", LIST),
    *((token_stats, "temperature", got) for got in (NONE, ("1", "'1'"))),
    *((sample_tokens, "logits_BV", got) for got in (NONE, NUMPY)),
    *((sample_tokens, n, got) for n in ("seed_B", "position_B")
      for got in (NONE, LIST, (LABEL_T, "Tensor tensor([0, 1, 2])"))),
    *((sample_tokens, "sampling", got) for got in (NONE, (Sampling, "the class Sampling"))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "name", "got"), CASES, ids=[f"{f.__name__} {n} {g[1]}" for f, n, g in CASES]
)
def test_the_argument_and_what_came_are_named(
    function: Callable[..., Any], name: str, got: tuple[Any, str]
) -> None:
    function()
    with pytest.raises(TypeError, match=rf"^{name}: expected .*got {re.escape(got[1])}$"):
        function(**{name: got[0]})
