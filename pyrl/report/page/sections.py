"""Sections of the page: the questions that its curves answer, and the metrics that do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pyrl.report.curves import Panel


@dataclass(frozen=True)
class Section:
    """Curves under one heading."""

    id: str
    title: str
    panels: tuple[Panel, ...]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


SECTIONS = (
    Section(
        "learning",
        "Learning",
        (
            Panel("greedy accuracy", (("", "eval/*/greedy"),), share=True),
            Panel(
                "reward and labels",
                (
                    ("reward", "reward"),
                    ("labels right", "vote/label_accuracy"),
                    ("true reward", "vote/ground_truth_reward"),
                    ("any leaf right", "vote/pass_any"),
                ),
                share=True,
            ),
            Panel("majority of samples", (("", "eval/*/maj@*"),), share=True),
            Panel("entropy (nats)", (("entropy", "entropy"),)),
            Panel("response length (tokens)", (("length", "completions/mean_length"),)),
            Panel("gradient norm", (("before clipping", "grad_norm"),)),
        ),
    ),
    Section(
        "vote",
        "Vote",
        (
            Panel(
                "the label's share",
                (
                    ("mean", "vote/majority_ratio"),
                    ("most contested question", "vote/majority_ratio_min"),
                    ("margin to the second", "vote/margin"),
                ),
                share=True,
            ),
            Panel(
                "answers",
                (
                    ("answered", "vote/answered"),
                    ("distinct labels", "vote/distinct_labels"),
                    ("labels changed", "vote/label_flips"),
                ),
                share=True,
            ),
            Panel(
                "do votes reward what is right?",
                (
                    ("voted = true reward", "vote/reward_accuracy"),
                    ("labels right", "vote/label_accuracy"),
                ),
                share=True,
            ),
            Panel("entropy of the answers (nats)", (("entropy", "vote/entropy"),)),
            Panel(
                "questions that teach nothing",
                (("all rewards equal", "frac_reward_zero_std"),),
                share=True,
            ),
        ),
    ),
    Section(
        "cost",
        "Cost and trees",
        (
            Panel(
                "seconds of a step",
                (
                    ("sampling", "timing/sampling"),
                    ("updating", "timing/updating"),
                    ("scoring", "timing/scoring"),
                    ("syncing", "timing/syncing"),
                    ("waiting", "timing/waiting"),
                ),
            ),
            Panel(
                "tokens saved by sharing",
                (("share of the leaves' tokens", "tree/tokens_saved_ratio"),),
            ),
            Panel("tokens sampled so far", (("tokens", "num_tokens"),)),
            Panel(
                "forks and pruned branches", (("forks", "tree/forks"), ("pruned", "tree/pruned"))
            ),
            Panel(
                "pruned, by reason",
                (
                    ("low confidence", "tree/pruned_low_confidence"),
                    ("falling confidence", "tree/pruned_tail_decline"),
                    ("leaps of entropy", "tree/pruned_entropy_spike"),
                ),
            ),
            Panel("learning rate", (("rate", "learning_rate"),)),
        ),
    ),
)
