"""Who samples: the contract between a rollout and the engine that runs the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl.logits.sampling import Sampling

RUNNING, STOPPED, TRUNCATED = 0, 1, 2
"""Values of `Sampled.finish_B`: open, ended by an end-of-sequence token (or, by a
rollout, where a stop text ends it), ended by its limit."""

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
"""What an engine computes in."""


NO_TOKENS: NDArray[np.int32] = np.empty(0, np.int32)
"""No token ids; nobody writes to it."""
NO_TOKENS.flags.writeable = False


class EngineError(RuntimeError):
    """The engine cannot do what it is asked for; the message says what to install or change."""


class EngineFailure(RuntimeError):
    """The engine died, hung, or gave an impossible answer."""


@dataclass(frozen=True)
class Branches:
    """New independent samples of some prompts. A prompt is computed once for all its branches."""

    prompts: Sequence[NDArray[np.int32]]
    """Token ids of each distinct prompt, each at least one token long."""
    prompt_B: NDArray[np.int64]
    """Index into `prompts`."""
    branch_B: NDArray[np.int64]
    """Identifiers chosen by the caller (forest handles), each used once."""
    seed_B: NDArray[np.uint64]
    limit_B: NDArray[np.int64]
    """Response tokens at most; the token that reaches the limit is `TRUNCATED` unless it stops."""
    retain: bool = False
    """Keep the cache of a finished branch, so that it can still be forked, until it is aborted."""

    def __post_init__(self) -> None:
        for p, prompt in enumerate(map(np.asarray, self.prompts)):
            whole = prompt.dtype.kind in "iu" and prompt.ndim == 1
            if not whole or (prompt.size and abs(prompt).max() >= 1 << 31):
                raise ValueError(
                    f"submit: prompt {p}: expected token ids, whole numbers with one axis, got "
                    f"{prompt.dtype}{list(prompt.shape)}: {prompt}"
                )
        check_seeds(self.seed_B)


def check_seeds(seed_B: NDArray[np.uint64]) -> None:
    """ValueError unless the seeds are uint64: other types could hold numbers that are no seeds."""
    if seed_B.dtype != np.uint64:
        raise ValueError(f"seed_B: expected uint64, got {seed_B.dtype}")


@dataclass(frozen=True)
class Sampled:
    """One token of every running branch, in the order in which branches entered."""

    branch_B: NDArray[np.int64]
    token_B: NDArray[np.int32]
    logprob_B: NDArray[np.float32]
    """Log-prob of the drawn token in the untruncated distribution at the sampling temperature."""
    entropy_B: NDArray[np.float32]
    """Entropy of that distribution over the whole vocabulary (nats)."""
    confidence_B: NDArray[np.float32]
    """Mass of its five most probable tokens, in (0, 1]."""
    finish_B: NDArray[np.uint8]
    """RUNNING, STOPPED or TRUNCATED after this token."""
    truncated_logprob_B: NDArray[np.float32]
    """Log-prob of the drawn token in what top-k, top-p and min-p leave of that distribution; 0 when
    greedy."""
    rest_logprob_B: NDArray[np.float32]
    """Log of the mass in that distribution of all tokens that could have been drawn in its place:
    neither it nor any that a fork excludes. -inf if there are none, and when greedy."""


@dataclass(frozen=True)
class Work:
    """Tokens that went through an engine's model since it was made."""

    prompt_tokens: int
    decode_tokens: int
    copied_tokens: int
    """Tokens that branches took from the cache instead of computing them."""
    recomputed_tokens: int = 0
    """Computed tokens that another branch had computed before: they did not fill a block of the
    cache, or were evicted from it."""


class Engine(Protocol):
    """Samples branches step by step; branches enter, fork and leave while it runs.

    `pyrl.engine.admission` has the checks of requests that every engine makes.
    """

    @property
    def dtype(self) -> Dtype:
        """What it computes in; how closely its log-probs must match the learner's follows."""

    def start(self, sampling: Sampling) -> None:
        """Set the sampling distribution; a RuntimeError while branches are running."""

    def submit(self, branches: Branches) -> None:
        """Queue new branches; they join the running batch as rows become free."""

    def step(self) -> Sampled:
        """Sample one token for each running branch; empty arrays when nothing is left to run."""

    def fork(
        self,
        parent: int,
        keep: int,
        branch_B: NDArray[np.int64],
        seed_B: NDArray[np.uint64],
        exclude: NDArray[np.int32] = NO_TOKENS,
    ) -> None:
        """Open siblings that share the first `keep` response tokens of `parent`.

        Each draws its own token at position `keep` in the next step, with its own seed; none of the
        tokens in `exclude`, while later positions may have any (`pyrl.sample_tokens`). The parent
        may be running (keep <= its length) or finished and retained; it is not changed. Nothing
        that it has computed is computed again. A sibling inherits the parent's limit and `retain`.
        """

    def finish(self, branch_B: NDArray[np.int64]) -> None:
        """End running branches with the tokens that they have, as an end token would have.

        A retained one can still be forked before its last token; the others are forgotten.
        """

    def abort(self, branch_B: NDArray[np.int64]) -> None:
        """Forget branches, running or finished, and free their cache."""

    def load_weights(self, weights: Iterable[tuple[str, Any]] | None, version: int) -> None:
        """Take new weights and their version; None: the learner has changed shared ones in place.

        RuntimeError while the engine knows a branch, whose cache would be stale.
        """

    def weight_version(self) -> int:
        """The version of the weights that it samples with."""

    def work(self) -> Work:
        """What it has computed so far."""

    def close(self) -> None:
        """Free what it holds, caches and processes; it cannot be used afterwards."""
