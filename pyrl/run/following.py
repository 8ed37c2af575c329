"""Following: what a process of a run does that does not lead it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pyrl.engine.dealt import serve
from pyrl.learner.guard import NonFiniteError, SamplerMismatchError
from pyrl.ranks import Ranks
from pyrl.run.config import Run
from pyrl.run.setup import Questions, assemble


def follow(run: Run, ranks: Ranks, eval_sets: Mapping[str, Questions] | None = None) -> None:
    """Load what the leader loads, then make the calls that it tells of until it says "end"."""
    parts = assemble(run, eval_sets, ranks=ranks)
    calls: dict[str, Callable[..., Any]] = {
        "step": partial(serve, parts.engine, ranks),
        "read": parts.learner.read,
        "update": parts.learner.update,
        "sync": parts.sync,
        "gather": parts.learner.gather,
        "weights": parts.learner.weights,
        "state": parts.learner.state,
    }
    while True:
        call, arguments = ranks.hear()
        if call == "end":
            break
        try:
            calls[call](*arguments)
        except (NonFiniteError, SamplerMismatchError):
            continue  # the leader has found the same, and says it
    parts.engine.close()
