"""Contestants: what is compared, read from the command line, each as the settings of its runs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from pyrl.checks import one_of
from pyrl.compare.settings import ABOUT, Budget, Settings, read_budget
from pyrl.demo.run import METHODS as DEMO_METHODS
from pyrl.demo.run import demo_run
from pyrl.evaluate import Scoring
from pyrl.reward import RandomReward, TrueReward
from pyrl.run.config import Run
from pyrl.run.parsing import parse_run, parse_train, save_run

RANDOM, TRUE = "random reward", "true labels"
CONTROLS = {RANDOM: ("random", RandomReward()), TRUE: ("true", TrueReward())}
"""The first method with another reward: what it says without a signal, and at best."""

SAME = (
    *("model", "data", "eval_data", "eval_limit", "eval_samples", "prompt_column"),
    *("answer_column", "chat", "chat_arguments", "system", "prefix", "suffix", "extractor"),
    *("answer_after", "equivalence", "stop"),
)
"""Settings that say what is asked and what is right: those of all contestants are the same."""

OWN = {
    "seed": "pyrl compare gives each run its seed; --seeds N says how many there are",
    "output": "pyrl compare gives each run its directory below its --output",
    "resume": "pyrl compare --resume goes on with all runs",
    "total-tokens": "--budget tokens=N is the one of all runs",
    "total-trained-tokens": "--budget trained=N is the one of all runs",
    "total-seconds": "--budget seconds=N is the one of all runs",
}
"""Options of a run that a METHOD may not bring."""

EVAL_LIMIT = 200
"""Questions of each set that are scored, where nothing says how many."""
STEPS = 10_000
"""No budget of a comparison lasts for longer: it ends the runs, and not their number of steps."""

QUICK = Settings(budget="tokens=12000", seeds=2, demo=True, quick=True)
QUICK_OPTIONS = shlex.split("--eval-limit 24 --eval-samples 4 --prompts-per-step 8 --max-rows 512")


@dataclass(frozen=True)
class Contestant:
    """One method with its options, or a control."""

    label: str
    run: Run
    """Its run with the seed 0; those of other seeds differ in nothing else."""
    control: bool = False

    @property
    def folder(self) -> str:
        """Its label as the name of a folder."""
        return re.sub(r"[^\w.+-]+", "-", self.label).strip("-")

    def of_seed(self, seed: int, output: Path) -> Run:
        """Its run with a seed, below the directory of the comparison."""
        folder = output / "runs" / self.folder / f"seed-{seed}"
        begun = (folder / "run.yaml").exists()
        return replace(self.run, seed=seed, output=folder, resume=begun)


@dataclass(frozen=True)
class Comparison:
    """All that there is to run."""

    settings: Settings
    budget: Budget
    contestants: tuple[Contestant, ...]
    """The methods in the order of the command line, then the controls."""
    argv: tuple[str, ...]
    """What it was read from."""

    @property
    def seeds(self) -> range:
        return range(self.settings.seeds)

    @property
    def methods(self) -> list[Contestant]:
        """Without the controls."""
        return [contestant for contestant in self.contestants if not contestant.control]

    @property
    def scoring(self) -> Scoring:
        """How every model is scored: at the temperature of the first method."""
        samples = [contestant.run.algorithm.sample for contestant in self.methods]
        return Scoring(
            samples[0].temperature,
            samples=self.methods[0].run.eval_samples,
            max_tokens=max(sample.max_tokens for sample in samples),
        )


def parse_compare(argv: Sequence[str]) -> Comparison:
    """What follows `pyrl compare`: METHODs, then options of the comparison and of all runs.

    ValueError: no method, a name twice, another budget or other questions for one of them, or what
    `parse_run` raises. A wrong option exits with code 2.
    """
    first = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    specs, given = argv[:first], [word for word in argv[first:] if word != "--"]
    quick = "--quick" in given
    settings, options = tyro.cli(
        Settings,
        args=given,
        prog="pyrl compare",
        description=ABOUT,
        default=QUICK if quick else Settings(),
        return_unknown_args=True,
    )
    options = [*(QUICK_OPTIONS if quick else ()), *options]
    if not specs:
        raise ValueError("expected METHODs before the options of pyrl compare, got none")
    if settings.budget is None:
        raise ValueError("budget: expected --budget tokens=N, trained=N or seconds=N, got none")
    budget = read_budget(settings.budget)
    contestants = [_contestant(spec, options, settings, budget) for spec in specs]
    if settings.controls:
        contestants += _controls(contestants[0])
    _check_alike(contestants)
    return Comparison(settings, budget, tuple(contestants), tuple(argv))


def _contestant(
    spec: str, options: Sequence[str], settings: Settings, budget: Budget
) -> Contestant:
    named = re.fullmatch(r"([\w.+-]+)=(.*)", spec, re.DOTALL)
    label, text = (named[1], named[2]) if named else (spec, spec)
    method, *own = shlex.split(text) or [""]
    for option in (*options, *own):
        name = option.removeprefix("--").partition("=")[0].replace("_", "-")
        if option.startswith("--") and name in OWN:
            raise ValueError(f"{spec}: expected no option {option.partition('=')[0]}: {OWN[name]}")
    steps = [] if any(word.startswith("--steps") for word in options) else ["--steps", str(STEPS)]
    words = [*steps, *options, *own]
    run = _demo(method, words) if settings.demo else parse_train([method, *words])
    if run.eval_limit is None:
        run = replace(run, eval_limit=EVAL_LIMIT)
    if run.threads is None and settings.workers > 1:
        run = replace(run, threads=max(1, (os.cpu_count() or 1) // settings.workers))
    run = replace(run, eval_before=False, eval_after=True, **budget.of_run())
    return Contestant(label, run)


def _demo(method: str, words: list[str]) -> Run:
    """With the demo's settings in the place of a run's defaults."""
    one_of(method, DEMO_METHODS, "demo method")
    run = demo_run(method, output=Path("runs/compare"), seed=0)
    sets = ["--eval-data", "demo:heldout", "--eval-every", "0"]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "demo.yaml"
        save_run(run, file)
        return parse_run(["--config", str(file), *sets, *words], method, DEMO_METHODS[method]())


def _controls(first: Contestant) -> Iterator[Contestant]:
    for label, (name, reward) in CONTROLS.items():
        run = replace(
            first.run,
            algorithm=replace(first.run.algorithm, reward=reward),
            names=replace(first.run.names, reward=name),
            reward_function=(),
            reward_weights=(),
            reward_answers=False,
        )
        yield Contestant(label, run, control=True)


def _check_alike(contestants: Sequence[Contestant]) -> None:
    """ValueError unless names differ, and questions do not."""
    for one, other in combinations(contestants, 2):
        if one.folder == other.folder:
            raise ValueError(
                f"expected another name for each method, got {one.label!r} and {other.label!r}; "
                f"NAME={other.label!r} gives one"
            )
    wanted = _asked(contestants[0].run)
    for contestant in contestants[1:]:
        for name, value in _asked(contestant.run).items():
            if value != wanted[name]:
                raise ValueError(
                    f"{contestant.label}: expected the {name} of {contestants[0].label}, "
                    f"{wanted[name]!r}, got {value!r}: methods are compared on the same questions"
                )


def _asked(run: Run) -> Mapping[str, object]:
    return {name: value for name, value in vars(run).items() if name in SAME}
