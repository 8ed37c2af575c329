"""Admission: the requests that every engine refuses, checked once and in the same words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pyrl.engine import Branches, check_seeds
from pyrl.models import Room

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Admission:
    """What the model of an engine can take. Each check is made before anything has changed."""

    vocabulary: int
    """Token ids are below it."""
    room: Room | None = None
    """Tokens of prompt and response at most; None: no limit."""

    def submit(self, branches: Branches, known: Collection[int]) -> list[NDArray[np.int32]]:
        """The prompts; ValueError unless all branches can be sampled.

        `known`: identifiers that are in use.
        """
        prompts = [np.asarray(prompt, np.int32) for prompt in branches.prompts]
        for p, prompt in enumerate(prompts):
            if not prompt.size or prompt.min() < 0 or prompt.max() >= self.vocabulary:
                raise ValueError(
                    f"submit: prompt {p}: expected at least one token, and ids below "
                    f"{self.vocabulary}, got {prompt}"
                )
        prompt_B = branches.prompt_B
        if ((prompt_B < 0) | (prompt_B >= len(prompts))).any():
            raise ValueError(f"submit: expected prompt_B in 0..{len(prompts) - 1}, got {prompt_B}")
        self._limits(branches, np.array([prompts[p].size for p in prompt_B.tolist()], np.int64))
        _unused(branches.branch_B, known)
        return prompts

    def _limits(self, branches: Branches, size_B: NDArray[np.int64]) -> None:
        limit_B = branches.limit_B
        refused_B = limit_B < 1
        if self.room is not None:
            refused_B = refused_B | (limit_B > self.room.tokens - size_B)
        for b in np.flatnonzero(refused_B)[:1].tolist():
            expected = "a limit >= 1"
            if self.room is not None:
                expected = (
                    f"a limit of at least 1 that with its prompt of {size_B[b]} tokens fits "
                    f"{self.room.limit}"
                )
            raise ValueError(
                f"submit: branch {branches.branch_B[b]}: expected {expected}, got {limit_B[b]}"
            )

    def fork(
        self,
        keep: int,
        length: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32],
        *,
        finished: bool,
        known: Collection[int],
    ) -> None:
        """ValueError unless siblings may open after `keep` response tokens of a parent.

        `length`: the parent's response tokens; `finished`: it has ended, so that nothing follows
        its last token; `known`: identifiers that are in use.
        """
        check_seeds(seed_B)
        last = length - finished
        if not 0 <= keep <= last:
            state = "finished" if finished else "running"
            raise ValueError(f"fork: expected keep in 0..{last} ({state} parent), got {keep}")
        if exclude.dtype != np.int32 or exclude.ndim != 1:
            raise ValueError(
                "fork: exclude: expected int32 with one axis, "
                f"got {exclude.dtype}{list(exclude.shape)}"
            )
        if exclude.size and not 0 <= exclude.min() <= exclude.max() < self.vocabulary:
            raise ValueError(
                f"fork: exclude: expected ids in 0..{self.vocabulary - 1}, got {exclude}"
            )
        _unused(branch_B, known)


def find(branch: int, known: Mapping[int, _Row]) -> _Row:
    """What an engine knows of a branch; ValueError if it knows none of that identifier."""
    if branch not in known:
        raise ValueError(f"branch {branch} is unknown: never submitted, finished or aborted")
    return known[branch]


def _unused(branch_B: NDArray[np.int64], known: Collection[int]) -> None:
    branches = branch_B.tolist()
    if len({*branches}) < len(branches) or any(branch in known for branch in branches):
        raise ValueError("expected branch identifiers that are not in use, each once")
