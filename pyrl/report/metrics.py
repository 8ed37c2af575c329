"""The numbers of a run: one JSON object per step in metrics.jsonl, and how they are read again."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pyrl.report.loggers import LOGGERS, Logger, Sink, Started

Value = float | int | bool | str | None
Row = dict[str, Value]
"""Metric names and values of one step; "step" counts finished updates, 0 is the untrained model."""

MEANING = {
    "reward": "mean reward of the leaves that train",
    "reward_std": "standard deviation of the rewards inside a prompt, mean over prompts",
    "reward/of/*": "mean of one of several reward functions, over the responses that it knows",
    "reward/overlong": "mean punishment of a response for its length (--reward overlong)",
    "reward/length": "mean part of a reward for a good length (--reward length)",
    "reward/class_share": "share of leaves that say the same as a leaf, mean over leaves (empo)",
    "reward/closed": "share of prompts whose leaves earn 0: too few say the same (empo)",
    "reward/taken_right": "share of leaves whose answer is taken for right (scrl)",
    "reward/taken_wrong": "share of leaves whose answer is taken for wrong (scrl)",
    "reward/dropped": "share of leaves between the most and the least frequent answers (ddrl)",
    "reward/novelty_std": "standard deviation of the leaves' novelty (evol_rl)",
    "reward/guard_weight": "weight of a question's rewards, mean over questions (ttrl_guard)",
    "reward/guard_flips": "share of questions whose label has changed since their last visit",
    "reward/guard_skipped": "share of questions that were skipped at random",
    "frac_reward_zero_std": "share of prompts whose leaves all have the same reward: no gradient",
    "entropy": "mean token entropy of the responses (nats)",
    "kl": "mean estimate of KL(policy || reference) (nats)",
    "loss": "policy loss",
    "grad_norm": "norm of the gradient before clipping",
    "learning_rate": "learning rate of the update",
    "diagnostics/flipped": "share of advantages whose sign changes without one of the rewards",
    "diagnostics/vanished": "share of advantages that are 0 without one of the rewards",
    "diagnostics/attention_entropy": "mean entropy of attention / that of all keys alike, by heads",
    "diagnostics/attention_entropy_least": "its smallest value; attention_entropy/LAYER/HEAD: each",
    "diagnostics/attention_entropy_most": "its largest value",
    "off_policy/samples": "effective sample size of the step's rows for the updated policy",
    "off_policy/reward": "estimate of the updated policy's reward; NAME_error is its error",
    "off_policy/entropy": "estimate of its mean token entropy in the policy before (nats)",
    "off_policy/kl": "estimate of KL(updated || before) of a response (nats)",
    "temper/factor": "temperature of the answers that replace rows, times that of sampling (aepo)",
    "temper/rows": "rows that such answers replaced",
    "temper/tokens": "tokens that were sampled for them",
    "optimizer/momentum_norm": "norm of the momentum that a step is along (--optimizer n_pg_igt)",
    "optimizer/ahead": "distance of the weights to the iterate that they look ahead of",
    "optimizer/correction": "norm of what corrected the momentum (--optimizer n_harpg)",
    "step_time": "seconds of the whole step",
    "cpu_time": "processor seconds of all threads of the process in it",
    "timing/sampling": "of these, until the last tree was grown",
    "timing/waiting": "the learner's wait for trees that were sampled ahead (--ahead)",
    "timing/scoring": "texts, answers, votes and rewards",
    "timing/updating": "advantages and the learner's passes and updates",
    "timing/syncing": "the new weights on their way to the engine",
    "ahead/idle": "share of the step in which the learner waited for trees (--ahead)",
    "ahead/staleness": "steps between the weights that sampled and those that learn",
    "num_tokens": "tokens sampled since the run began, pruned ones included",
    "entropy/trained": "mean token entropy of the tokens that trained, at training (nats)",
    "completions/mean_length": "response tokens",
    "completions/clipped_ratio": "share of responses cut at the token limit",
    "clip_ratio/low_mean": "share of tokens clipped from below",
    "clip_ratio/high_mean": "share of tokens clipped from above",
    "clip_ratio/dual_mean": "share of tokens whose loss the dual clip caps",
    "loss/kept": "share of tokens that the loss's masks keep",
    "loss/factor": "mean weight of these tokens by the loss's detached factors",
    "loss/reshaped": "mean change of a token's advantage by the loss",
    "loss/penalized": "share of tokens that a penalty of the loss chose",
    "loss/outside_band": "share of tokens whose entropy is outside EPO's band",
    "loss/nucleus_gap": "nucleus entropy of uncertain tokens less its value in step 1 (nats)",
    "loss/weighted_entropy": "twice the mean entropy of the tokens as TEA-RL weighs them (nats)",
    "sampling/importance_sampling_ratio/mean": "mean of the loss's ratio of policies",
    "sampling/importance_sampling_ratio/max": "its largest value",
    "sampling/sampling_logp_difference/mean": "mean |log-prob at sampling - at training| (nats)",
    "sampling/sampling_logp_difference/max": "its largest value in the step (nats)",
    "pack/tokens": "tokens of all rows that the learner read, prompts included",
    "pack/trained": "response tokens that train with an advantage other than zero",
    "pack/unique": "how many that were: rows with the same beginning share its tokens",
    "pack/repeated": "tokens read again where a tree did not fit in a pass / unique ones",
    "pack/disagreeing": "share of tokens whose log-prob at sampling another row contradicts",
    "pack/chunked_head": "share of passes that made their logits twice, to save memory",
    "old_logprobs/seconds": "seconds of the learner's pass over the samples before its updates",
    "old_logprobs/tokens": "tokens that this pass read",
    "vote/majority_ratio": "share of votes for the label, mean over prompts",
    "vote/majority_ratio_min": "its smallest value over the prompts",
    "vote/majority_voting_reward": "mean reward of the leaves, mean over prompts",
    "vote/margin": "the label's share of the votes less that of the runner-up, mean over prompts",
    "vote/entropy": "entropy of the distribution of answers (nats), mean over prompts",
    "vote/unknown": "comparisons of answers that ran into a limit: no verdict, no reward",
    "vote/answered": "share of leaves from which an answer could be read",
    "vote/distinct_labels": "distinct labels / prompts that have a label",
    "vote/label_flips": "share of prompts seen before whose label has changed",
    "vote/mass": "probability of the leaves that were drawn without replacement, mean over prompts",
    "vote/unseen": "probability of all other responses, mean over prompts",
    "vote/judged_right": "mean probability of a leaf to be right by its entropies (--vote judger)",
    "vote/judged_other": "share of the labels that a plain majority would not have given",
    "vote/icc": "intraclass correlation of votes inside a trunk",
    "vote/label_accuracy": "share of labels that are true (needs true answers; never trains)",
    "vote/reward_accuracy": "share of leaves whose voted reward equals the true one",
    "vote/ground_truth_reward": "mean true reward of the leaves",
    "vote/pass_any": "share of prompts with at least one true leaf",
    "tree/leaves": "leaves",
    "tree/depth": "mean number of forks on a leaf's path",
    "tree/forks": "forks",
    "tree/pruned": "pruned branches",
    "tree/branch_rate": "forks per sampled token (methods that fork)",
    "tree/mean_width": "branches per fork, the parent included",
    "tree/prune_rate": "pruned branches / all branches (methods that prune)",
    "tree/pruned_low_confidence": "of these, for their lowest group confidence",
    "tree/pruned_tail_decline": "of these, for a falling tail confidence",
    "tree/pruned_entropy_spike": "of these, for leaps of entropy",
    "tree/decided": "share of prompts stopped because no missing leaf could change their label",
    "tree/unneeded": "branches of these prompts that were pruned while they ran",
    "tree/unopened": "leaves of these prompts that were never opened",
    "tree/out_of_tokens": "share of prompts that spent --sample.max-tokens-per-prompt",
    "tree/out_of_time": "share of prompts that --sample.max-seconds ended",
    "tree/cut_leaves": "leaves that ended there, truncated",
    "tree/dropped": "branches dropped there, without a token of their own",
    "tree/trunks": "independent samples",
    "tree/trunk_share_entropy": "entropy of the trunks' shares of a vote / that of a flat group",
    "tree/first_token_error": "half of the |share - probability| of samples' first tokens (even)",
    "tree/tokens_saved_ratio": "1 - sampled tokens / tokens of the same leaves without sharing",
    "advantage/clamp_rate": "share of leaves whose entropy reshaping met its bound",
    "advantage/clipped": "share of advantages that were clipped",
    "advantage/whiten_mean": "mean of the advantages before they were whitened",
    "advantage/whiten_std": "their standard deviation",
    "advantage/ear_factor_min": "smallest factor of the entropy reshaping",
    "advantage/ear_factor_max": "its largest factor",
    "advantage/hybrid_clamped": "share of tokens whose hybrid signal met its bound",
    "advantage/hybrid_signal_max": "largest size of the hybrid signal",
    "advantage/baseline_shift": "mean |baseline that weighs rewards by length - their mean|",
    "advantage/entropic": "what right answers count more, and wrong ones less, for the entropy",
    "advantage/informative": "share of prompts whose rewards are not all equal, as GPG counts them",
    "advantage/pass_at_k": "chance that k leaves of a prompt have a right one, mean over prompts",
    "advantage/bonus": "mean bonus of an advantage for the response's entropy",
    "advantage/bonus_bounded": "share of tokens whose bonus met its bound",
    "advantage/steps": "steps of a response, mean over leaves",
    "advantage/step_shift": "mean change of a token's advantage by its step's entropy",
    "advantage/gated": "mean size of ERPO's token signal, before its weight",
    "advantage/confidence_shift": "mean |confidence in a prompt - in a response| where it counts",
    "advantage/confidence_leaves": "share of leaves whose advantages confidence has changed",
    "advantage/rank_max": "largest normal score of a rank",
    "advantage/risk_low": "score of a bundle below which it counts more",
    "advantage/risk_high": "score of a bundle above which it makes no difference",
    "advantage/risk_below": "share of bundles below the first",
    "advantage/places": "uncertain places of a response, mean over leaves",
    "advantage/places_bonus": "mean |change of a reward by their number|",
    "advantage/places_threshold": "entropy from which on a place counts (nats)",
    "advantage/distance": "mean distance of a token from the first model (nats)",
    "advantage/beta_hard": "weight of that distance for prompts of few right leaves",
    "advantage/beta_medium": "for prompts of some right leaves",
    "advantage/beta_easy": "for prompts of many right leaves",
    "advantage/ib_score": "information score of a fork, mean over forks",
    "replay/held": "responses of positive advantage that are kept, before they train (spear)",
    "replay/trained": "of these, those that trained in this step",
    "replay/loss": "policy loss of these",
    "select/questions": "questions sampled, those in the place of refused ones among them",
    "select/refused": "share of these that were refused, because their rewards are all equal",
    "select/idle_tokens": "share of the leaves' tokens that belong to questions that do not train",
    "select/reward_lift": "mean reward of the leaves that train less that of all (--select rso)",
    "select/tokens": "share of the tokens that train (selections after the advantages)",
    "select/leaves": "share of the leaves with a token that trains (the same)",
    "advantage/reward_unknown": "share of the leaves that train whose reward is unknown",
}
"""Names in metrics.jsonl, as in TRL where TRL has them. "vote/post_NAME" is "vote/NAME" of the
leaves that train; evaluations add "eval/SET/METRIC"."""


@dataclass(frozen=True)
class Completion:
    """One sampled response, kept for reading."""

    prompt: str
    completion: str
    answer: str | None
    """What was read from the completion; None if nothing could be."""
    label: str | None
    """What it was rewarded against."""
    reward: float | None
    truth: str | None = None
    """The true answer, if the data has one: it takes no part in any of these."""


class MetricsLog:
    """Writes metrics.jsonl, completions.jsonl and alarms.jsonl, durable row by row, and feeds the
    loggers.

    `resume_at` None begins a run: FileExistsError if the directory already has one. Otherwise
    rows of that step and later are dropped first, so that a repeated step counts once; a last line
    torn by a crash is dropped as well. What alarms have said stays said. `settings`
    are those of the run, for the loggers to show.
    """

    def __init__(
        self,
        output_dir: Path,
        loggers: Sequence[Logger] = (),
        *,
        resume_at: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        for name in loggers:
            if name not in LOGGERS:
                raise ValueError(f"loggers: expected some of {', '.join(LOGGERS)}, got {name!r}")
        output_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._metrics = _Jsonl(output_dir / "metrics.jsonl", resume_at)
            stack.callback(self._metrics.close)
            self._completions = _Jsonl(output_dir / "completions.jsonl", resume_at)
            stack.callback(self._completions.close)
            keep_all = None if resume_at is None else sys.maxsize
            self._alarms = _Jsonl(output_dir / "alarms.jsonl", keep_all)
            stack.callback(self._alarms.close)
            started = Started(output_dir, settings or {}, resume_at, self._metrics.last_step)
            self._sinks: list[Sink] = []
            for name in loggers:
                self._sinks.append(LOGGERS[name](started))
                stack.callback(self._sinks[-1].close)
            self.close = stack.pop_all().close
            """Close the files and finish the loggers."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> Row:
        """Append one row; numpy scalars become Python's, NaN and infinities null. Returns it."""
        row: Row = {"step": step} | plain_row(metrics)
        self._metrics.append([row])
        numbers = {n: float(v) for n, v in row.items() if isinstance(v, int | float)}
        del numbers["step"]
        for sink in self._sinks:
            sink.write(step, numbers)
        return row

    def write_completions(self, step: int, completions: Iterable[Completion]) -> None:
        """Append sampled responses of this step to completions.jsonl."""
        rows: list[Row] = [{"step": step} | plain_row(asdict(row)) for row in completions]
        for row in rows:
            if row["truth"] is None:
                del row["truth"]
        self._completions.append(rows)
        for sink in self._sinks:
            if rows:
                sink.write_completions(step, rows)

    def write_alarms(self, step: int, sentences: Sequence[str]) -> None:
        """Append what alarms said after this step to alarms.jsonl."""
        if sentences:
            self._alarms.append([{"step": step, "alarm": sentence} for sentence in sentences])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics.jsonl by step, rows of one step merged; ValueError names a bad line."""
    merged: dict[int, Row] = {}
    for _, row in _lines(path):
        merged.setdefault(step_of(row), {}).update(row)
    return [merged[step] for step in sorted(merged)]


def read_rows(path: Path) -> list[Row]:
    """Rows of completions.jsonl or alarms.jsonl as they were written; ValueError as above."""
    return [row for _, row in _lines(path)]


def size_before(path: Path, step: int) -> int:
    """Bytes of the rows before a step."""
    return max((end for end, row in _lines(path) if step_of(row) < step), default=0)


def matching(pattern: str, row: Mapping[str, Value]) -> list[str]:
    """The row's metrics that match a pattern in which `*` stands for any text: "eval/*/maj@*"."""
    if "*" not in pattern:
        return [pattern] if pattern in row else []
    regex = re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)
    return [name for name in row if regex.fullmatch(name)]


def short(value: float) -> str:
    """Three digits of a number for reading; all of a large one's before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class _Jsonl:
    """An append-only file of JSON rows with a "step" that never falls."""

    def __init__(self, path: Path, resume_at: int | None) -> None:
        if resume_at is None and path.exists() and path.stat().st_size:
            raise FileExistsError(f"{path}: holds another run; choose a new directory or resume")
        self.last_step = -1
        """The last step in the file as it was found, rows that are now dropped included."""
        kept = 0
        for end, row in _lines(path) if path.exists() else ():
            self.last_step = step_of(row)
            kept = end if resume_at is not None and self.last_step < resume_at else kept
        self._file = path.open("ab")
        # A cut at one byte offset is atomic, a rewrite is not.
        self._file.truncate(kept)

    def append(self, rows: Sequence[Row]) -> None:
        text = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> Iterable[tuple[int, Row]]:
    """(end offset, row) of each complete line; a last line without its newline is torn."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: expected a JSON object: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError(f'{path}:{number}: expected a JSON object with an integer "step"')
            yield end, row


def step_of(row: Mapping[str, Value]) -> int:
    """The row's step, which every row has."""
    step = row["step"]
    assert isinstance(step, int)
    return step


def plain_row(metrics: Mapping[str, Any]) -> Row:
    """The row as JSON holds it: numpy scalars become Python's, NaN and infinities null."""
    return {name: _plain(value) for name, value in metrics.items()}


def _plain(value: Any) -> Value:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, float | int | str):
        return value
    raise TypeError(f"a metric is expected to be a number or a string, got {type(value).__name__}")
