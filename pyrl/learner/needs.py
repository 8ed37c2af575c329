"""Needs: the columns that a loss and the choices of a method read, and a run may lack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyrl.loss.axis import check_needs
from pyrl.loss.loss import LEARNED, Loss
from pyrl.loss.terms import slots

if TYPE_CHECKING:
    from pyrl.run.config import Run

KNOWN = LEARNED | {
    *("advantage_T", "logprob_T", "entropy_T", "old_logprob_T", "rollout_logprob_T"),
    *("ref_logprob_T", "reward_T", "clip_low_T", "clip_high_T", "offset_N1", "group_N"),
    *("state.entropy", "state.mean_entropy", "state.nucleus_entropy"),
}
"""What a run has for the axes of a loss."""


def check_columns(loss: Loss, run: Run) -> None:
    """ValueError names what the loss needs and the run does not have."""
    try:
        check_needs(loss.needs, KNOWN)
        slots(loss)
    except ValueError as error:
        raise ValueError(f"loss: a run cannot train with it: {error}") from error
    if run.old_logprobs == "engine" and loss.learner_needs:
        raise ValueError(
            f"old_logprobs: expected 'auto' or 'learner' for this loss, got 'engine': "
            f"{loss.learner_needs[0]}, beside what the engine reports"
        )
    for name in ("old_logprob_T", "prompt_logprob_T"):
        if run.old_logprobs == "engine" and name in run.algorithm.reads:
            raise ValueError(no_pass(name, run.algorithm.reads[name]))
    check_ahead(run)


def check_ahead(run: Run) -> None:
    """ValueError unless the method of a run that samples ahead learns rightly from the samples of
    an older policy; it names what does not."""
    if not run.ahead:
        return
    algorithm = run.algorithm
    loss = algorithm.loss
    if algorithm.temper.share:
        raise ValueError(
            f"ahead: expected temper.share 0, got {algorithm.temper.share}: answers at another "
            f"temperature are sampled while the engine grows the trees of the next step"
        )
    if loss.compares_sampler:
        return
    if loss.ratio.of == "one":
        raise ValueError(
            "ahead: expected a loss that weighs a token by how much more probable it has become "
            "since it was sampled (a ratio of policies, or a factor such as TIS), got "
            "loss.ratio.of 'one' without such a factor"
        )
    if run.old_logprobs == "learner":
        raise ValueError(
            "ahead: expected old_logprobs 'auto' with this loss, got 'learner': its ratio would be "
            "to the policy before the update, and not to the older one that sampled"
        )


def no_pass(name: str, choice: str) -> str:
    """Why a run that makes no pass of the learner cannot have what this choice reads."""
    return (
        f"old_logprobs: expected 'auto' or 'learner' (--old-logprobs auto), got 'engine': {choice} "
        f"needs {name}, which a pass of the learner gives"
    )
