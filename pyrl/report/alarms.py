"""Alarms: what goes wrong in test-time RL, said in plain words while it can still be stopped.

The vote share itself is no alarm: it stays high when all votes agree on a wrong answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pyrl.answers import EXTRACTORS, Extractor
from pyrl.report.metrics import Value, matching, short, step_of

History = Sequence[Mapping[str, Value]]
"""Rows of metrics.jsonl in order of step."""

START = 3
"""Rows whose mean is the start of a run that later values are compared with."""

QUIET = 10
"""Steps of silence after which an alarm has gone: a value about its bound is no news."""


class Rule(Protocol):
    """One thing that may go wrong with one metric."""

    @property
    def metric(self) -> str:
        """The name of a metric; "eval/*/greedy" is every such name in the history."""

    def __call__(self, values: Sequence[float]) -> str | None:
        """What was seen and against what, or None; `values` has no missing ones."""


@dataclass(frozen=True)
class Outside:
    """The mean of the last `steps` values is beyond a fixed bound."""

    metric: str
    seen: str
    """The metric in plain words."""
    than: Literal["above", "below"]
    bound: float
    steps: int
    advice: str

    def __call__(self, values: Sequence[float]) -> str | None:
        if len(values) < self.steps:
            return None
        last = statistics.fmean(values[-self.steps :])
        beyond = last > self.bound if self.than == "above" else last < self.bound
        if not beyond:
            return None
        return (
            f"{self.seen} is {short(last)} over the last {self.steps} steps "
            f"({self.than} {self.bound:g}). {self.advice}"
        )


@dataclass(frozen=True)
class Changed:
    """The mean of the last `steps` values is beyond a multiple of what the run started with."""

    metric: str
    seen: str
    than: Literal["above", "below"]
    times: float
    advice: str
    steps: int = START
    start: int = START
    """Values whose mean is the start; they do not overlap the last `steps`."""
    until: float = 1.0
    """Share of the run in which the rule holds."""

    def __call__(self, values: Sequence[float]) -> str | None:
        if len(values) < self.start + self.steps:
            return None
        first = statistics.fmean(values[: self.start])
        last = statistics.fmean(values[-self.steps :])
        bound = self.times * first
        if first <= 0 or not (last > bound if self.than == "above" else last < bound):
            return None
        grew = "has grown" if self.than == "above" else "has fallen"
        return f"{self.seen} {grew} from {short(first)} to {short(last)}. {self.advice}"


_SLOWER = "The run is collapsing: lower the learning rate, and go back to an earlier checkpoint."

RULES: tuple[Rule, ...] = (
    # Collapse. At a tenfold learning rate accuracy is 0 within ten steps while votes agree.
    # Accuracies of a few questions are noisy: they must fall far, over more steps.
    Changed("eval/*/greedy", "greedy accuracy", "below", 0.5, _SLOWER, steps=1, start=1),
    Changed("vote/label_accuracy", "the share of true labels", "below", 0.3, _SLOWER, 5, 5),
    Changed("reward", "the mean reward", "below", 0.2, _SLOWER, 5, 5),
    Changed("vote/answered", "the share of responses with an answer", "below", 0.5, _SLOWER),
    # Of the label-free signs the first: answers scatter before they agree on something wrong.
    Changed("vote/majority_ratio", "agreement of the votes", "below", 0.85, _SLOWER),
    Changed("vote/distinct_labels", "the variety of labels", "below", 0.4, _SLOWER),
    Changed("completions/mean_length", "the response length", "below", 0.4, _SLOWER),
    Changed(
        "entropy",
        "entropy",
        "below",
        0.2,
        "That is early: the policy stops exploring. Lower the learning rate, or raise the "
        "temperature.",
        until=0.1,
    ),
    Changed("entropy", "entropy", "above", 3.0, _SLOWER),
    Changed(
        "grad_norm",
        "the gradient norm",
        "above",
        10.0,
        "Lower the learning rate, lengthen the warm-up, or clip harder (--clip-grad-norm).",
    ),
    Outside(
        "vote/reward_accuracy",
        "agreement of the voted with the true rewards",
        "below",
        0.7,
        5,
        "The votes are wrong too often to teach; use more votes or easier questions.",
    ),
    Outside(
        "vote/majority_ratio_min",
        "even the most contested prompt's vote share",
        "above",
        0.95,
        3,
        "The model agrees with itself everywhere, so there is nothing left to learn here: stop, "
        "or use harder questions.",
    ),
    Outside(
        "frac_reward_zero_std",
        "the share of prompts without any gradient",
        "above",
        0.9,  # a run that has learned comes near 0.85
        5,
        "Most sampling is wasted: use harder questions, a higher temperature or more samples.",
    ),
    Outside(
        "vote/icc",
        "the correlation of votes inside a trunk",
        "above",
        0.3,
        10,  # a step with few contested prompts says little
        "Leaves of one trunk are no independent votes: use more trunks, or fork earlier.",
    ),
    Outside(
        "tree/prune_rate",
        "the share of pruned branches",
        "above",
        0.5,
        3,
        "Most sampling is thrown away: make the prune thresholds stricter.",
    ),
    Outside(
        "tree/prune_rate",
        "the share of pruned branches",
        "below",
        0.01,
        5,
        "Pruning does nothing here: loosen its thresholds or switch it off.",
    ),
    Outside(
        "tree/branch_rate",
        "the branch rate",
        "below",
        1e-9,
        5,
        "The tree method never forks, so it is flat sampling: lower the fork thresholds.",
    ),
    Outside(
        "advantage/clamp_rate",
        "the share of clamped entropy reshapings",
        "above",
        0.1,
        3,
        "Entropies differ more than the reshaping assumes: lower its strength.",
    ),
    Outside(
        "sampling/sampling_logp_difference/mean",
        "the difference of log-probs between sampling and training",
        "above",
        0.05,
        1,
        "Engine and learner disagree on the same weights: use one dtype for both, and check the "
        "weight sync.",
    ),
)


class Alarms:
    """Applies the rules after each step; an alarm speaks again only after it has been gone."""

    def __init__(self, total_steps: int, rules: Sequence[Rule] = RULES) -> None:
        self._total = total_steps
        self._rules = rules
        self._held: dict[object, int] = {}
        """The last step at which each alarm held."""

    def check(self, history: History) -> list[str]:
        """Messages of the alarms that are new at the last row of the history."""
        seen = {name: value for row in history for name, value in row.items()}
        messages = []
        for index, rule in enumerate(self._rules):
            for name in matching(rule.metric, seen):
                values = [v for row in history if isinstance(v := row.get(name), int | float)]
                said = rule(values) if self._holds(rule, history) else None
                if said and self.news((index, name), step_of(history[-1])):
                    messages.append(_at(history, name) + said)
        return messages

    def news(self, alarm: object, step: int) -> bool:
        """Whether the alarm, which holds at this step, has not held in the last `QUIET` ones."""
        before = self._held.get(alarm)
        self._held[alarm] = step
        return before is None or step - before > QUIET

    def _holds(self, rule: Rule, history: History) -> bool:
        if not isinstance(rule, Changed) or rule.until == 1.0:
            return True
        step = step_of(history[-1])
        # Short runs get as many steps as the rule needs to compare at all.
        shortest = rule.start + rule.steps
        return step <= max(rule.until * self._total, shortest)


def _at(history: History, name: str) -> str:
    step = f"Step {history[-1]['step']}"
    where = name.split("/")[1] if name.startswith("eval/") else ""
    return f"{step}, {where}: " if where else f"{step}: "


def no_update(
    text_N: Sequence[str], answer_N: Sequence[str | None], extractor: Extractor, cut: float
) -> str:
    """Why no response could be rewarded: what was read from which text, and what to change.

    `cut` is the share of responses that ended at the token limit.
    """
    name = next((n for n, known in EXTRACTORS.items() if known == extractor), repr(extractor))
    read = "; ".join(
        f"{_excerpt(text)!r} (read: {'nothing' if answer is None else repr(answer)})"
        for text, answer in ((text_N[n], answer_N[n]) for n in (0, -1))
    )
    asked = r" such as ' Put the final answer in \boxed{}.'," if name == "boxed" else ""
    others = ", ".join([*(n for n in EXTRACTORS if n != name), "regex:PATTERN"])
    return (
        f"no response can be rewarded, so there is no update. The extractor in effect is {name}; "
        f"two responses: {read}. Ask for answers that it reads by --suffix,{asked} or choose "
        f"another one by --extractor ({others}). {cut:.0%} of the responses were cut at "
        "--sample.max-tokens."
    )


def _excerpt(text: str, most: int = 160) -> str:
    """The text, or its end, where an answer would be."""
    return text if len(text) <= most else f"... {text[-most:]}"
