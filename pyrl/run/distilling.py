"""Distilling: what a run's fork and prune rules decide, as small trees with a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import Forest, Observed, SignalSpec
from pyrl.distilled import WINDOWS, Node, Rule, features
from pyrl.fork import Finished, Fork, Site
from pyrl.law import Law
from pyrl.prompts import step_prompts
from pyrl.prune import Prune
from pyrl.report import Progress
from pyrl.rollout import Rollout, derive_seed
from pyrl.run.directory import SETTINGS
from pyrl.run.parsing import load_run
from pyrl.run.setup import assemble

Decisions = list[tuple[NDArray[np.float64], NDArray[np.bool_]]]


@dataclass(frozen=True)
class DistilSettings:
    """Distil the fork and prune rules of a run into small decision trees."""

    run: Path
    """Directory of a run whose rules decide while a branch grows, as those of ECHO."""
    output: Path = Path("rules.json")
    """The fork rule as JSON: --fork distilled --fork.file FILE."""
    steps: int = 4
    """Steps of questions that are sampled once more by the run's last checkpoint; the last of them
    is not fitted on but tests the trees."""
    depth: int = 3
    """Questions that a tree asks of a branch at most."""
    least: int = 20
    """Decisions in a leaf of a tree at least."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("depth", 1), ("least", 1)):
            value = {"steps": self.steps, "depth": self.depth, "least": self.least}[name]
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")


@dataclass(frozen=True)
class WatchedFork:
    """A fork rule whose decisions are noted."""

    rule: Fork
    noted: Decisions = field(default_factory=list)

    def trunks(self, votes: int) -> int:
        return self.rule.trunks(votes)

    def cap(self, votes: int) -> int:
        return self.rule.cap(votes)

    def lower(self, spec: SignalSpec) -> bool:
        return self.rule.lower(spec)

    def width(self, observed: Observed) -> NDArray[np.int32]:
        width_B = self.rule.width(observed)
        ready_B = observed.ready_B > 0
        self.noted.append((features(observed)[ready_B], width_B[ready_B] > 1))
        return width_B

    def at_end(self, trunk: Finished) -> list[Site]:
        return self.rule.at_end(trunk)

    def law(self, forest: Forest, votes: int) -> Law | None:
        return self.rule.law(forest, votes)


@dataclass(frozen=True)
class WatchedPrune:
    """A prune rule whose decisions are noted."""

    rule: Prune
    noted: Decisions = field(default_factory=list)

    def lower(self, spec: SignalSpec) -> bool:
        return self.rule.lower(spec)

    def reason(self, observed: Observed) -> NDArray[np.uint8]:
        reason_B = self.rule.reason(observed)
        self.noted.append((features(observed), reason_B > 0))
        return reason_B

    def respawns(self, votes: int) -> int:
        return self.rule.respawns(votes)


def distil_rules(settings: DistilSettings, progress: Progress) -> Iterator[str]:
    """Sample, fit, test and write: `pyrl distil-rules`; the lines that it prints.

    ValueError: the run's rules decide nothing while a branch grows, or never forked.
    """
    run = replace(load_run(settings.run / SETTINGS), output=settings.run, resume=True)
    algorithm = run.algorithm
    fork, prune = WatchedFork(algorithm.fork), WatchedPrune(algorithm.prune)
    spec = SignalSpec()
    if not fork.lower(spec):
        raise ValueError(
            f"{settings.run}: expected a run whose fork rule decides while a branch grows, such as "
            f"echo's, got {algorithm.fork}"
        )
    prune.lower(spec)
    parts = assemble(run)
    begin = parts.start.step if parts.start else 0
    sample, sizes = algorithm.sample, []
    with closing(parts.engine):
        parts.sync(begin)
        progress.phase("sampling")
        for step in range(begin, begin + settings.steps):
            sizes.append((len(fork.noted), len(prune.noted)))
            asked = step_prompts(parts.prompts, step, run.prompts_per_step, run.seed)
            Rollout(
                parts.engine,
                [prompt.tokens for prompt in asked],
                votes=sample.votes,
                limit=sample.max_tokens,
                sampling=sample.sampling(),
                fork=fork,
                prune=prune,
                signals=parts.signals,
                seed=derive_seed(run.seed, step, 2),
                stop=parts.stop,
                on_tokens=progress.tokens,
            ).run()
    windows = {name: int(value) for name, value in _windows(spec)}
    for name, noted, held in (
        ("fork", fork.noted, sizes[-1][0]),
        ("prune", prune.noted, sizes[-1][1]),
    ):
        yield from _fitted(name, noted, held, settings, windows)
    yield f"rule     {settings.output}"


def _windows(spec: SignalSpec) -> Iterator[tuple[str, int]]:
    values = (spec.smooth_window, spec.group_window, spec.tail_window)
    yield from zip(WINDOWS, (*values, spec.min_tokens, spec.cooldown, spec.max_forks), strict=True)


def _fitted(
    name: str, noted: Decisions, held: int, settings: DistilSettings, windows: dict[str, int]
) -> Iterator[str]:
    """Fit a tree to the decisions before `held`, and say how it does on the others."""
    (feature_BK, acts_B), (other_BK, truth_B) = _joined(noted[:held]), _joined(noted[held:])
    acting = int(acts_B.sum())
    if not acting:
        if name == "fork":
            raise ValueError(
                f"{settings.run}: expected forks to learn from, got none in {len(acts_B)} "
                f"decisions; more --steps may have some"
            )
        yield f"{name}: nothing in {len(acts_B)} decisions"
        return
    balance = (len(acts_B) - acting) / acting or 1.0
    tree = Node.grow(feature_BK, acts_B, settings.depth, settings.least, balance)
    yield f"{name}: {acting} of {len(acts_B)} decisions were to {name}"
    yield from tree.lines(balance, "  ")
    said_B = tree.acts(other_BK, balance)
    both = int((said_B & truth_B).sum())
    yield (
        f"  of {len(truth_B)} decisions held out: {both} of {int(truth_B.sum())} that were to "
        f"{name} are found, {both} of {int(said_B.sum())} that the tree finds were"
    )
    if name == "fork":
        about = {"run": str(settings.run), "decisions": len(acts_B)}
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        Rule(tree, windows, balance).save(settings.output, about)


def _joined(noted: Decisions) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rows = [np.empty((0, 5)), *(feature_BK for feature_BK, _ in noted)]
    return np.concatenate(rows), np.concatenate([np.empty(0, bool), *(acts for _, acts in noted)])
