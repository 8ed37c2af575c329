"""Signals, slow and obvious: every window is cut out of the whole history, quantiles are sorted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyrl._core.tree import SignalSpec, Threshold

KEEP, LOW_CONFIDENCE, TAIL_DECLINE, ENTROPY_SPIKE = range(4)
COLUMNS = {
    "smooth_entropy": "smooth_entropy_B",
    "entropy_rise": "entropy_rise_B",
    "group_confidence": "group_confidence_B",
    "tail_confidence": "tail_confidence_B",
    "min_confidence": "min_confidence_B",
    "width": "width_B",
    "prune": "prune_B",
    "ready": "ready_B",
}
"""What the reference calls a column of `Observed`."""


def mean(values: list[float]) -> float:
    return float(np.float32(math.fsum(values) / len(values)))


def bin_edges(value: float) -> tuple[float, float]:
    """Below and above `value`, 64 to an octave up to 256; zero is its own bin."""
    if abs(value) < 2.0**-24:
        return 0.0, 0.0
    if value < 0:
        below, above = bin_edges(-value)
        return -above, -below
    octave = 2.0 ** (math.frexp(value)[1] - 1)
    steps = math.floor((value / octave - 1) * 64)
    return octave * (1 + steps / 64), octave * (1 + (steps + 1) / 64)


@dataclass
class History:
    """All values of the last `steps` steps."""

    steps: int
    values: list[list[float]] = field(default_factory=lambda: [[]])

    def add(self, value: float) -> None:
        self.values[-1].append(value)

    def next_step(self) -> None:
        self.values = [*self.values, []][-self.steps :]

    def all(self) -> list[float]:
        return sorted(value for step in self.values for value in step)

    def edges(self, q: float) -> tuple[float, float]:
        values = self.all()
        return bin_edges(values[math.floor(q * (len(values) - 1))]) if values else (0.0, 0.0)


@dataclass
class Branch:
    entropy: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    group: list[float] = field(default_factory=list)
    spike: list[bool] = field(default_factory=list)
    last_fork: int | None = None
    """Tokens seen at the last fork."""
    forks: int = 0
    repeat: bool = False

    def copy(self) -> Branch:
        lists = (self.entropy, self.confidence, self.tail, self.group, self.spike)
        return Branch(*(list(x) for x in lists), self.last_fork, self.forks, self.repeat)


def run_at_end(flags: list[bool]) -> int:
    return len(flags) if all(flags) else flags[::-1].index(False)


class SlowSignals:
    """The decisions of `Signals`; `observe` takes and gives one branch at a time."""

    def __init__(self, spec: SignalSpec) -> None:
        self.spec = spec
        self.entropy, self.rise, self.group, self.tail, self.trace = (
            History(spec.history) for _ in range(5)
        )
        self.branches: dict[int, Branch] = {}
        self.calibrate()

    def calibrate(self) -> None:
        s = self.spec

        def high(
            threshold: Threshold | None, history: History, side: int, off: float = math.nan
        ) -> float:
            if threshold is None:
                return off
            return history.edges(threshold.q)[side] if threshold.q >= 0 else threshold.value

        def low(threshold: Threshold | None, doubt: History, side: int, off: float) -> float:
            if threshold is None:
                return off
            if threshold.q < 0:
                return threshold.value
            return 1 - doubt.edges(1 - threshold.q)[side]

        self.thresholds = {
            "entropy_high": high(s.entropy_high, self.entropy, 0),
            "entropy_low": high(s.entropy_low, self.entropy, 0),
            "confidence_fork": low(s.confidence_fork, self.group, 0, math.inf),
            "entropy_rise": high(s.entropy_rise, self.rise, 0, -math.inf),
            "confidence_low": low(s.confidence_low, self.trace, 1, -math.inf),
            "tail_low": low(s.tail_low, self.tail, 1, -math.inf),
            "entropy_spike": high(s.entropy_spike, self.rise, 1, math.inf),
        }
        self.calibrated = len(self.trace.all()) >= s.warmup_traces

    def begin_step(self) -> None:
        self.calibrate()
        for history in (self.entropy, self.rise, self.group, self.tail, self.trace):
            history.next_step()
        self.branches = {}

    def observe(self, handle: int, entropy: float, confidence: float) -> dict[str, Any]:
        branch = self.branches.setdefault(handle, Branch())
        if branch.repeat:
            branch.repeat = False
            return self.reading(branch, rise=0.0)
        s, before = self.spec, branch.entropy[-self.spec.smooth_window :]
        rise = float(np.float32(entropy) - np.float32(mean(before))) if before else 0.0
        branch.entropy.append(entropy)
        branch.confidence.append(confidence)
        branch.group.append(mean(branch.confidence[-s.group_window :]))
        branch.tail.append(mean(branch.confidence[-s.tail_window :]))
        branch.spike.append(rise > self.thresholds["entropy_spike"])
        self.entropy.add(entropy)
        self.rise.add(rise)
        self.group.add(1 - branch.group[-1])
        self.tail.add(1 - branch.tail[-1])
        out = self.reading(branch, rise)
        out["prune"] = self.prune(branch)
        out["ready"] = self.ready(branch)
        if out["ready"] and out["prune"] == KEEP:
            out["width"] = self.width(entropy, rise, branch.group[-1])
        return out

    def reading(self, branch: Branch, rise: float) -> dict[str, Any]:
        return {
            "smooth_entropy": mean(branch.entropy[-self.spec.smooth_window :]),
            "entropy_rise": rise,
            "group_confidence": branch.group[-1],
            "tail_confidence": branch.tail[-1],
            "min_confidence": min(branch.group),
            "width": 1,
            "prune": KEEP,
            "ready": False,
        }

    def ready(self, branch: Branch) -> bool:
        s, seen = self.spec, len(branch.entropy)
        cool = branch.last_fork is None or seen > branch.last_fork + s.cooldown
        forks_left = s.max_forks == 0 or branch.forks < s.max_forks
        return self.calibrated and seen > s.min_tokens and cool and forks_left

    def width(self, entropy: float, rise: float, group: float) -> int:
        s, t = self.spec, self.thresholds
        uncertain = entropy >= t["entropy_high"] and entropy > 0
        if not (
            s.fork and uncertain and group <= t["confidence_fork"] and rise >= t["entropy_rise"]
        ):
            return 1
        spread = max(t["entropy_high"] - t["entropy_low"], 1e-12)
        excess = 0.0
        if s.confidence_fork is not None and group < 1:
            excess = 1 - (1 - t["confidence_fork"]) / (1 - group)
        raw = s.width_min + s.alpha * (entropy - t["entropy_low"]) / spread + s.beta * excess
        return round(min(max(raw, s.width_min), s.width_max))

    def prune(self, branch: Branch) -> int:
        s, t = self.spec, self.thresholds
        if not (s.prune and self.calibrated and len(branch.entropy) > s.min_tokens):
            return KEEP
        if min(branch.group) < t["confidence_low"]:
            return LOW_CONFIDENCE
        drops = [b < a for a, b in zip(branch.tail, branch.tail[1:], strict=False)]
        if run_at_end(drops) >= s.decline_run and branch.tail[-1] < t["tail_low"]:
            return TAIL_DECLINE
        if run_at_end(branch.spike) >= s.spike_run:
            return ENTROPY_SPIKE
        return KEEP

    def inherit(self, parent: int, children: list[int]) -> None:
        branch = self.branches[parent]
        branch.last_fork = len(branch.entropy)
        branch.forks += 1
        for child in children:
            self.branches[child] = branch.copy()
            self.branches[child].repeat = True

    def close(self, handle: int) -> None:
        branch = self.branches.pop(handle)
        self.trace.add(1 - min(branch.group))
