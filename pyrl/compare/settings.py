"""The settings of a comparison: how many seeds, which budget, where, and what stands beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPENT = {
    "tokens": ("total_tokens", "sampled tokens"),
    "trained": ("total_trained_tokens", "trained tokens"),
    "seconds": ("total_seconds", "seconds"),
}
"""Each kind of budget: the setting of a run, and what it counts."""


@dataclass(frozen=True)
class Budget:
    """What each run may spend in training."""

    kind: str
    """"tokens" that are sampled, "trained" tokens, or "seconds"."""
    amount: int

    def __str__(self) -> str:
        return f"{self.amount:,} {SPENT[self.kind][1]}"

    def of_run(self) -> dict[str, Any]:
        """As settings of a run."""
        return {SPENT[self.kind][0]: self.amount}


def read_budget(text: str) -> Budget:
    """ "tokens=300000", "trained=150000" or "seconds=600"; ValueError names what is wrong."""
    kind, _, amount = text.partition("=")
    try:
        number = int(amount.replace("_", ""))
    except ValueError:
        number = 0
    if kind not in SPENT or number < 1:
        raise ValueError(
            f"budget: expected tokens=N, trained=N or seconds=N with a whole N, got {text!r}"
        )
    return Budget(kind, number)


ABOUT = """\
Train methods on the same questions, with the same seeds and one budget, and compare them:

  pyrl compare METHOD METHOD ... --budget tokens=N --model M --data D [options of pyrl train]

One METHOD may bring options and a name: "wide=echo --fork.max-width 4".

Other options of `pyrl train METHOD` go to every run. --eval-data: held-out questions.

--eval-limit: how many of each set are scored (else 200). --eval-samples: samples of each."""


@dataclass(frozen=True)
class Settings:
    """The options of `pyrl compare`."""

    budget: str | None = None
    """What each run may spend: tokens=N (sampled in training: such a comparison repeats bit for bit
    on a CPU), trained=N (tokens whose advantage is not zero: no step begins after them) or
    seconds=N (of its steps: nothing repeats exactly, and other work on the machine counts)."""
    seeds: int = 5
    """Each method runs with the seeds 0, 1, ...; differences are paired by seed and by question."""
    output: Path = Path("runs/compare")
    """Directory of all runs, of comparison.json, comparison.png and comparison.html."""
    resume: bool = False
    """Go on with the comparison in the output directory; finished runs are not repeated."""
    workers: int = 1
    """Runs that train at the same time, each in a process; 1: one after the other in this one."""
    temperatures: tuple[float, ...] = (0.3, 0.6, 1.0)
    """Temperatures at which the untrained model is scored beside the methods."""
    controls: bool = True
    """Also train by the first method with a random reward, and with true labels if there are
    any."""
    demo: bool = False
    """Compare on the demo: METHOD is one of `pyrl demo`, with its model, questions and sizes."""
    quick: bool = False
    """A rough look at the demo in a minute: 2 seeds, 24 questions, a budget of 12,000 tokens."""

    def __post_init__(self) -> None:
        for name in ("seeds", "workers"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name}: expected >= 1, got {vars(self)[name]}")
        for temperature in self.temperatures:
            if not temperature > 0:
                raise ValueError(f"temperatures: expected numbers > 0, got {temperature:g}")
