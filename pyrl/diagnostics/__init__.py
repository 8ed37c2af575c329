"""Diagnostics: what a step can be asked beside its metrics, at the cost of passes (--diagnostics).

None of them changes what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyrl.advantage import Stage
from pyrl.diagnostics.attention import attention_entropy
from pyrl.diagnostics.cliff import advantage_flips
from pyrl.diagnostics.off_policy import updated_policy
from pyrl.learner import Learner
from pyrl.leaves import Scored
from pyrl.pack import TokenBatch


@dataclass(frozen=True)
class Updated:
    """A step after its update."""

    stages: Sequence[Stage]
    states: Sequence[Any]
    """What each stage remembers."""
    scored: Scored
    batch: TokenBatch
    learner: Learner


def _flips(step: Updated) -> dict[str, float]:
    return advantage_flips(step.stages, step.states, step.scored)


def _attention(step: Updated) -> dict[str, float]:
    step.learner.gather()
    return attention_entropy(step.learner.model, step.batch)


def _updated(step: Updated) -> dict[str, float]:
    logprob_T = step.learner.logprobs(step.batch)
    step.learner.reader.metrics()  # this pass is none of the next update's
    return updated_policy(step.batch, step.scored, logprob_T)


DIAGNOSTICS: dict[str, Callable[[Updated], dict[str, float]]] = {
    "advantage_flips": _flips,
    "attention_entropy": _attention,
    "off_policy": _updated,
}


def diagnose(names: Sequence[str], step: Updated) -> dict[str, float]:
    """The metrics of the diagnostics of these names."""
    found: dict[str, float] = {}
    for name in names:
        found |= DIAGNOSTICS[name](step)
    return found
