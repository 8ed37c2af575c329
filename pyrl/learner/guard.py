"""Guard: what keeps an update from the weights, by its numbers and by the policy that sampled."""

from __future__ import annotations

import math
from collections.abc import Collection

from pyrl.learner.tally import Tally

TOLERANCE = {"float64": 1e-2, "float32": 1e-2, "float16": 0.2, "bfloat16": 0.8}
"""Largest difference between log-probs (nats) of one policy in the sampler and in the learner, by
the coarser of the types that the two compute in."""

MEAN_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""The same for the mean over the tokens of an update. With SmolLM2-135M, 1,366 tokens at a
temperature of 1, a learner in bfloat16 is off by 0.027 in the mean and 0.28 at most, one in float32
by 1e-5 and 6e-5. Noise in one of the passes is off at every token."""


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; the update was not made."""


class SamplerMismatchError(ValueError):
    """The tokens were sampled by another policy than the one that is about to learn from them."""


def tolerances(dtypes: Collection[str], tokens: int) -> tuple[float, float]:
    """By how much the log-probs of one policy may differ between sampler and learner (nats), which
    compute in these types: of a token, and in the mean of so many."""
    largest = max(TOLERANCE[dtype] for dtype in dtypes)
    # One token at its limit is no reason to stop, also where there are few tokens.
    return largest, max(MEAN_TOLERANCE[dtype] for dtype in dtypes) + largest / max(1, tokens)


def check_update(tally: Tally, norm: float, allowed: tuple[float, float] | None) -> None:
    """Raise unless a gradient of this norm may change the weights.

    NonFiniteError: loss or norm is no number; SamplerMismatchError: the log-probs of the sampler
    and of the learner, which are the same policy until it has moved, differ by more than `allowed`,
    at a token or in the mean; None: it has moved.
    """
    if not (math.isfinite(tally.loss) and math.isfinite(norm)):
        raise NonFiniteError(
            f"expected a finite loss and gradient, got loss {tally.loss} and gradient norm "
            f"{norm}; this update was not made"
        )
    if allowed is None or not (tally.gap > allowed[0] or tally.mean_gap() > allowed[1]):
        return
    raise SamplerMismatchError(
        f"expected the log-prob of a sampled token to differ by at most {allowed[0]:g} between "
        f"sampler and learner before an update, and by {allowed[1]:.2g} in the mean of "
        f"{tally.tokens} tokens, got {tally.sampled:.6g} from the sampler and "
        f"{tally.learned:.6g} from the learner, and {tally.mean_gap():.2g} in the mean; this "
        f"update was not made. Check that the sampler has the learner's weights, temperature and "
        f"precision"
    )
