"""Sameness: what the processes of a run must have in common before they begin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pyrl import _core
from pyrl.engine.launch import Carry
from pyrl.prompts import Prompt
from pyrl.ranks import Ranks, RanksError
from pyrl.run.checkpoint import Checkpoint
from pyrl.run.config import Run
from pyrl.run.names import flatten
from pyrl.run.parsing import settings_of

OWN = frozenset({"device", "threads", "processes"})
"""Settings in which processes may differ."""


def check_ranks(run: Run, ranks: Ranks) -> None:
    """RanksError unless each process can have a question of each step, by the same settings."""
    if run.shard and ranks.size == 1:
        raise RanksError(
            "shard: expected several processes that weights are split over, by --processes or "
            "torchrun, got 1"
        )
    if run.shard and run.engine != "hf":
        raise RanksError(
            f"engine: expected 'hf' with --shard, which gathers the weights while it samples, "
            f"got {run.engine!r}"
        )
    if ranks.size > run.prompts_per_step:
        raise RanksError(
            f"prompts_per_step: expected at least a question for each of {ranks.size} processes, "
            f"got {run.prompts_per_step}"
        )
    if ranks.size > 1 and run.engine == "vllm":
        why = "ends the group of processes in which it runs and takes the first GPU in each"
        if run.vllm.sampler:
            why = "serves one process with all samplers"
        raise RanksError(
            f"engine: expected 'hf' for {ranks.size} processes, got 'vllm', which {why}"
        )
    if ranks.size > 1 and run.ahead:
        raise RanksError(
            f"ahead: expected one process, got {ranks.size}: they sample and learn together, in "
            f"turns"
        )
    settings = dict(flatten(settings_of(run)))
    own = {name: value for name, value in settings.items() if name not in OWN}
    ranks.check_same("settings", own | {"pyrl": _core.build_info()["version"]})


def check_loaded(
    ranks: Ranks, prompts: Sequence[Prompt], bits: int, start: Checkpoint | None
) -> None:
    """RanksError unless all processes train on the same questions, from weights whose bits have the
    same sum."""
    if ranks.size > 1:
        texts = hashlib.sha256()
        for prompt in prompts:
            texts.update(f"{prompt.text!r} {prompt.answer!r}".encode())
            texts.update(prompt.tokens.tobytes())
        loaded = {
            "questions": len(prompts),
            "digest of the questions": texts.hexdigest()[:12],
            "finished steps": start.step if start else 0,
            "sum of all bits of the weights": bits,
        }
        ranks.check_same("data and weights", loaded)


class Told:
    """A sync that the leader makes, and all other processes with it."""

    def __init__(self, sync: Carry, ranks: Ranks) -> None:
        self._sync, self._ranks = sync, ranks

    def __call__(self, version: int) -> dict[str, float]:
        """What `sync` tells of this process."""
        self._ranks.tell("sync", version)
        return self._sync(version)
