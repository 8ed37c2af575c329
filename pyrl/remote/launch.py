"""Launch: the engine of a run on a server, and how new weights reach it."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from pyrl.engine.admission import Admission
from pyrl.models import room
from pyrl.remote.engine import RemoteEngine
from pyrl.remote.learner import RemoteLearner
from pyrl.rollout import make_signals

if TYPE_CHECKING:
    from pyrl.run.config import Run

CHUNK = 16
"""Tokens that are asked for at a time where the run forks, prunes or ends branches as they grow."""


class Renewed:
    """The sync of an engine on the learner's server, which writes the weights and reads them."""

    def __init__(self, engine: RemoteEngine, learner: RemoteLearner) -> None:
        self._engine, self._learner = engine, learner

    def __call__(self, version: int) -> dict[str, float]:
        """Let the engine sample from the weights as they are now; the seconds that took.

        The learner compares the log-probs of samples with its own in each update
        (`Learner.check`), and so finds an engine with other weights.
        """
        started = time.monotonic()
        self._engine.load_weights([("sampler", self._learner.sampler())], version)
        return {"sync/seconds": time.monotonic() - started}


def launch(
    run: Run, learner: RemoteLearner, eos: Collection[int], *, stops: bool
) -> tuple[RemoteEngine, Renewed]:
    """The engine, and the sync that gives it its first weights as well.

    `stops`: a text ends responses, which the run looks for.
    """
    shape, chunk, algorithm = learner.model, run.remote.chunk, run.algorithm
    online = make_signals(algorithm.fork, algorithm.prune) is not None
    if chunk is None and (online or stops or algorithm.sample.ends_early):
        chunk = CHUNK
    engine = RemoteEngine(
        learner.service,
        eos,
        Admission(shape.get_input_embeddings().num_embeddings, room(shape)),
        max_rows=run.max_rows,
        chunk=chunk,
        top=run.remote.top,
    )
    return engine, Renewed(engine, learner)
