"""Needs: what a run asks for and the Tinker protocol lacks, said before a server is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyrl._core.tree import Forest
from pyrl.loss.loss import LEARNED

if TYPE_CHECKING:
    from pyrl.run.config import Run

OWN = {
    "optimizer": "adamw",
    "weights": "float32",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "pack": "tree",
    "processes": 1,
    "shard": False,
    "ahead": False,
    "engine": "hf",
}
"""Settings of a model in this process, and what they are where nobody sets them."""


def check_remote(run: Run) -> None:
    """ValueError names the method and the first thing that it needs and the protocol lacks."""
    for lacking in (*_of_settings(run), *_of_samples(run), *_of_loss(run)):
        raise ValueError(f"{run.method}: --tinker: {lacking}")


def _of_settings(run: Run) -> Iterator[str]:
    lora = run.lora
    if lora.rank is None:
        yield (
            "lora.rank: expected a rank (--lora.rank 32), got none: the protocol trains low-rank "
            "adapters, not all weights"
        )
    elif lora.alpha not in (None, 2 * lora.rank) or lora.targets != ("all-linear",):
        yield (
            f"lora: expected no alpha and no targets, which the server chooses, got {lora.alpha} "
            f"and {', '.join(lora.targets)}"
        )
    if lora.merge:
        yield "lora.merge: expected False, got True: the weights stay on the server"
    settings = vars(run)
    for name, default in OWN.items():
        if settings[name] != default:
            yield (
                f"{name}: expected {default!r}, got {settings[name]!r}: the server says how it "
                f"samples and trains"
            )
    if "attention_entropy" in run.diagnostics:
        yield "diagnostics: expected none that reads attention, got attention_entropy"


def _of_samples(run: Run) -> Iterator[str]:
    sample, fork = run.algorithm.sample, run.algorithm.fork
    if sample.temperature != 1:
        yield (
            f"sample.temperature: expected 1 (--sample.temperature 1), got {sample.temperature}: "
            f"the protocol trains log-probs at a temperature of 1 alone"
        )
    for name, default in (("min_p", 0.0), ("top_h", 1.0)):
        if vars(sample)[name] != default:
            value = vars(sample)[name]
            yield f"sample.{name}: expected {default:g}, which no request has, got {value:g}"
    if fork.law(Forest(), sample.votes) is not None:
        yield (
            f"fork: expected one that samples with replacement, got {type(fork).__name__}, which "
            f"needs the whole distribution of each token, and tokens that are not drawn"
        )


def _of_loss(run: Run) -> Iterator[str]:
    loss = run.algorithm.loss
    if loss.entropy:
        yield (
            f"loss.entropy: expected 0, got {loss.entropy:g}, which needs the gradient of the "
            f"entropy; the protocol has that of log-probs alone"
        )
    for need in loss.learner_needs:
        if need.name in LEARNED - {"expert_logprob_T"}:
            yield f"{need}, which needs the whole distribution of each token by the learner"
