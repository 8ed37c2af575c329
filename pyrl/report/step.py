"""Step metrics: every number that a run tells of a step, from the record of the step alone.

The stations that train compute none of them: what is reported does not depend on which of their
choices run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import Answers, Equivalence
from pyrl.answers.truth import has_truth, right
from pyrl.engine import TRUNCATED
from pyrl.leaves import Leaves
from pyrl.report.metrics import Completion, Row, plain_row
from pyrl.report.tree import tree_metrics
from pyrl.reward import Question, grade
from pyrl.vote import FlipCounter, Votes

if TYPE_CHECKING:
    from pyrl.train import Step


@dataclass(frozen=True)
class Unlogged:
    """A finished step before its evaluation and its row in metrics.jsonl."""

    metrics: Row
    completions: tuple[Completion, ...]


class StepObserver:
    """Computes the metrics of each step, and keeps what they need of earlier steps."""

    def __init__(self, equivalence: Equivalence) -> None:
        self.equivalence = equivalence
        self.tokens = 0
        """Sampled in training since the run began, pruned ones included."""
        self.trained = 0
        """Response tokens with an advantage other than zero."""
        self.seconds = 0.0
        """Time that the steps took."""
        self.flips = FlipCounter()

    def __call__(self, step: Step) -> Unlogged:
        """The row of the step, and some of its completions."""
        self.tokens += step.rollout.counts.sampled_tokens
        self.tokens += int(step.shaping.get("temper/tokens", 0))
        self.trained += int((step.update or {}).get("pack/trained", 0))
        self.seconds += step.seconds
        group_N, reward_N = step.leaves.group_N[step.kept_N], step.reward_N[step.kept_N]
        metrics = (
            reward_metrics(group_N, reward_N)
            | dict(step.shaping)
            | dict(step.update or {})
            | dict(step.sync)
            | completion_metrics(step.leaves)
            | tree_metrics(step.rollout.forest, step.leaves, step.rollout)
            | self._votes(step)
            | dict(step.timing)
            | ({} if step.staleness is None else ahead_metrics(step.timing, step.staleness))
            | ({} if step.cpu_seconds is None else {"cpu_time": step.cpu_seconds})
            | {"step_time": step.seconds, "num_tokens": self.tokens}
        )
        return Unlogged(plain_row(metrics), first_completions(step))

    def _votes(self, step: Step) -> dict[str, float]:
        leaves, answers, votes, kept_N = step.leaves, step.answers, step.votes, step.kept_N
        kept = leaves.take(kept_N), answers.take(kept_N), votes, step.reward_N[kept_N], step.prompts
        everyone = leaves, answers, votes, step.reward_N, step.prompts
        return (
            vote_metrics(leaves, answers, votes)
            | {"vote/label_flips": self.flips.update(votes, step.prompts, self.equivalence)}
            | label_metrics(*everyone)
            | label_metrics(*kept, prefix="vote/post_")
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        return {
            "tokens": self.tokens,
            "trained": self.trained,
            "seconds": self.seconds,
            "labels": self.flips.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.tokens, self.trained = state["tokens"], state["trained"]
        self.seconds = state["seconds"]
        self.flips.load_state_dict(state["labels"])


def ahead_metrics(timing: Mapping[str, float], staleness: int) -> dict[str, float]:
    """Of a run that samples ahead: `idle`, the share of the step in which the learner waited for
    trees, and `staleness`, the steps between the weights that sampled and those that learn."""
    return {
        "ahead/idle": timing["timing/waiting"] / max(sum(timing.values()), 1e-9),
        "ahead/staleness": float(staleness),
    }


def completion_metrics(leaves: Leaves) -> dict[str, float]:
    """Token entropy (nats), length (tokens) and the share that was cut at the limit."""
    return {
        "entropy": float(np.average(leaves.entropy_N, weights=leaves.length_N)),
        "completions/mean_length": float(leaves.length_N.mean()),
        "completions/clipped_ratio": float((leaves.finish_N == TRUNCATED).mean()),
    }


def reward_metrics(group_N: NDArray[np.int64], reward_N: NDArray[np.float64]) -> dict[str, float]:
    """Rewards of the leaves that train; `group_N` does not decrease.

    `reward` is the mean of the known rewards, `reward_std` their deviation inside a prompt, mean
    over the prompts that have any, `frac_reward_zero_std` the share of prompts whose known rewards
    are all the same, `advantage/reward_unknown` the share of rewards that are NaN.
    """
    known_N = ~np.isnan(reward_N)
    groups = np.unique(group_N)
    known = [reward_N[known_N & (group_N == g)] for g in groups]
    informative = sum(values.size > 0 and values.min() < values.max() for values in known)
    metrics = {
        "advantage/reward_unknown": float((~known_N).mean()) if known_N.size else 0.0,
        "frac_reward_zero_std": 1 - informative / max(groups.size, 1),
    }
    spread = [float(values.std()) for values in known if values.size]
    if spread:
        metrics |= {"reward": float(reward_N[known_N].mean()), "reward_std": float(np.mean(spread))}
    return metrics


def vote_metrics(leaves: Leaves, answers: Answers, votes: Votes) -> dict[str, float]:
    """The state of the votes as such: signs of collapse, without any knowledge of the truth.

    `majority_ratio_min` over the prompts with leaves, means of `margin` and of `entropy` (nats)
    over them, `distinct_labels` (different labels per label), `icc` and `unknown` (comparisons of
    answers without a verdict).
    """
    present = np.unique(leaves.group_N)
    label_N = [label for label in votes.label_G if label is not None]
    distinct = len(np.unique(answers.equivalence.classes(label_N)))
    return {
        "vote/majority_ratio_min": float(votes.ratio_G[present].min(initial=1.0)),
        "vote/margin": _mean(votes.margin_G[present]),
        "vote/entropy": _mean(votes.entropy_G[present]),
        "vote/distinct_labels": distinct / len(label_N) if label_N else math.nan,
        "vote/icc": votes.icc,
        "vote/unknown": float(answers.unknown),
    } | mass_metrics(leaves)


def mass_metrics(leaves: Leaves) -> dict[str, float]:
    """`mass` (probability of the leaves that were drawn without replacement, mean over prompts) and
    `unseen` (that of all other responses); nothing for leaves whose probability nobody knows."""
    if np.isnan(leaves.log_mass_N).any():
        return {}
    groups = len(np.unique(leaves.group_N))
    mass = float(np.exp(leaves.log_mass_N).sum()) / max(groups, 1)
    return {"vote/mass": mass, "vote/unseen": 1 - mass}


def label_metrics(
    leaves: Leaves,
    answers: Answers,
    votes: Votes,
    reward_N: NDArray[np.float64],
    prompts: Sequence[Question],
    *,
    prefix: str = "vote/",
) -> dict[str, float]:
    """How good labels and rewards are, as arXiv:2504.16084 measures it: for the eyes only.

    Each is a mean over prompts. Of all prompts with leaves: `majority_ratio` (the label's share of
    the vote), `answered` (share of leaves with an answer) and `majority_voting_reward` (mean
    reward). Of those with a true answer, if there are any: `label_accuracy`, `reward_accuracy`
    (share of leaves whose reward is the true one), `ground_truth_reward` (share of right leaves)
    and `pass_any` (any leaf is right). What a verifier leaves unknown is left out.
    """
    equivalence = answers.equivalence
    grade_N = grade(leaves, answers, prompts, equivalence)
    label_G = right(votes.label_G, prompts, equivalence)
    rows: dict[str, list[float]] = {}
    for group in np.unique(leaves.group_N):
        member_N = leaves.group_N == group
        row = {
            "majority_ratio": float(votes.ratio_G[group]),
            "answered": float((answers.class_N[member_N] >= 0).mean()),
            "majority_voting_reward": _mean(reward_N[member_N]),
        }
        if has_truth(prompts[group]):
            row["label_accuracy"] = float(label_G[group])
            known_N = member_N & np.isfinite(grade_N) & np.isfinite(reward_N)
            row["reward_accuracy"] = _mean(grade_N[known_N] == reward_N[known_N])
            row["ground_truth_reward"] = _mean(grade_N[member_N])
            graded_N = member_N & np.isfinite(grade_N)
            row["pass_any"] = float(grade_N[graded_N].max()) if graded_N.any() else math.nan
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return {f"{prefix}{name}": _mean(np.array(values)) for name, values in rows.items()}


def first_completions(step: Step) -> tuple[Completion, ...]:
    """The first leaf of each of the step's first questions, for reading."""
    first_G = np.searchsorted(step.leaves.group_N, np.arange(min(4, len(step.prompts)))).tolist()
    return tuple(
        Completion(
            step.prompts[g].text,
            step.leaves.text_N[n],
            step.answers.answer_N[n],
            step.votes.label_G[g],
            None if np.isnan(step.reward_N[n]) else float(step.reward_N[n]),
            step.prompts[g].answer,
        )
        for g, n in enumerate(first_G)
    )


def _mean(values: NDArray[Any]) -> float:
    """The mean of the known values; NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
