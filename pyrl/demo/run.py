"""The demo's settings: the methods at a scale where a model learns in minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from pyrl.algorithm import Algorithm
from pyrl.checks import one_of
from pyrl.evaluate import Scoring
from pyrl.fork import EntropyConfidence, TopEntropy
from pyrl.loss import KL
from pyrl.methods.echo import echo as echo_method
from pyrl.methods.ettrl import ettrl as ettrl_method
from pyrl.methods.registry import Registry
from pyrl.methods.ttrl import ttrl as ttrl_method
from pyrl.methods.unique import ttrl_unique as ttrl_unique_method
from pyrl.prune import Doubt
from pyrl.reward import RandomReward, TrueReward
from pyrl.run.config import Run
from pyrl.run.names import Names, Plugins

TEMPERATURE = 0.6
MAX_TOKENS = 21
"""The longest answer has 18 digits and an end."""

UPDATES = 2
"""Optimizer updates that share a step's samples: the fewest with which bounds act. Scores with 1, 2
and 4 of them differ by less than their standard error (docs/results.md)."""

EVAL_SETS = {"held-out": "demo:heldout", "length 18": "demo:length18"}
"""Beside the trained questions: others of the same lengths, and a length never trained on."""

SCORING = Scoring(TEMPERATURE, samples=4, exact=16, max_tokens=MAX_TOKENS)
"""16 different responses hold nearly all of the mass: they say what a vote of any size would, for
the tokens of twelve samples."""


def ttrl() -> Algorithm:
    """16 answers vote and train; no KL term: the first model is nothing to hold on to."""
    parent = ttrl_method()
    return replace(
        parent,
        sample=replace(
            parent.sample, votes=16, train=16, temperature=TEMPERATURE, max_tokens=MAX_TOKENS
        ),
        loss=replace(parent.loss, kl=KL(coef=0.0)),
        updates_per_step=UPDATES,
    )


def ettrl() -> Algorithm:
    """Leaves for TTRL's tokens: an answer has 17 tokens, so few are masked at its end."""
    parent, base = ettrl_method(), ttrl()
    return replace(
        parent,
        sample=replace(base.sample, votes=25, train=16),
        fork=TopEntropy(mask_tail=1),
        loss=base.loss,
        updates_per_step=UPDATES,
    )


def echo() -> Algorithm:
    """Windows and cool-down shrunk to answers of 17 tokens."""
    parent, base = echo_method(), ttrl()
    return replace(
        parent,
        sample=base.sample,
        fork=EntropyConfidence(cooldown=3, group_window=4, min_tokens=1),
        prune=Doubt(tail_window=4, decline_run=4),
        loss=replace(parent.loss, kl=KL(coef=0.0)),
        updates_per_step=UPDATES,
    )


def ttrl_unique() -> Algorithm:
    """5 different answers of a question for less than a third of the tokens of TTRL's 16."""
    parent, base = ttrl_unique_method(), ttrl()
    return replace(
        parent,
        sample=replace(base.sample, votes=5, train=5),
        loss=base.loss,
        updates_per_step=UPDATES,
    )


def gold() -> Algorithm:
    """Upper bound: TTRL's sampling and update with the true answer as the label."""
    return replace(ttrl(), reward=TrueReward())


def coin() -> Algorithm:
    """Control: TTRL's sampling and update with a coin for a reward."""
    return replace(ttrl(), reward=RandomReward())


METHODS: dict[str, Callable[[], Algorithm]] = {
    "ttrl": ttrl,
    "ettrl": ettrl,
    "echo": echo,
    "ttrl_unique": ttrl_unique,
    "gold": gold,
    "coin": coin,
}


def demo_run(method: str, *, output: Path, seed: int) -> Run:
    """The run of `pyrl demo METHOD`."""
    return Run(
        model="demo",
        data="demo:train",
        method=method,
        algorithm=METHODS[method](),
        output=output,
        seed=seed,
        steps=80,
        prompts_per_step=48,
        learning_rate=2e-5,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        warmup_steps=10,
        schedule="linear",
        min_learning_rate=0.05,
        max_rows=1024,
        extractor="whole",
        equivalence="exact",
        eval_every=20,
        eval_limit=0,
        save_trees=1,
        chat=False,
        threads=1,
    )


@dataclass(frozen=True)
class Demo:
    """Learn to sort longer strings of digits from the votes of a small packaged model."""

    method: Annotated[str, tyro.conf.Positional] = "ttrl_unique"
    """ttrl_unique, ttrl, ettrl or echo; or a control, gold (true labels) or coin (a random
    reward)."""
    output: Path = Path("runs/demo")
    """Directory of checkpoints, metrics and the report."""
    seed: int = 0
    """Seed of sampling and of the order of the questions."""
    steps: int | None = None
    """Fewer steps for a quick look; the default is what the report in the README used."""
    updates: int | None = None
    """Optimizer updates that share the samples of a step; the default is the demo's own number."""
    resume: bool = False
    """Go on from the last checkpoint in the output directory."""
    ahead: bool = False
    """Sample the next step while this one's update runs (`pyrl train --ahead`)."""
    processes: int = 1
    """Processes that sample and learn together; torchrun starts them as well."""
    names: Annotated[Names, tyro.conf.arg(name="")] = field(default_factory=Names)
    """Choices by name, in the place of the demo's own."""
    plugin: Plugins = ()
    """Files of Python code with further choices, in tables such as LOSSES."""


def parse_demo(argv: Sequence[str]) -> Run:
    """The run of the options of `pyrl demo`; a wrong option exits with code 2."""
    demo = tyro.cli(Demo, args=argv, prog="pyrl demo")
    method = one_of(demo.method, METHODS, "demo method")
    run = demo_run(method, output=demo.output, seed=demo.seed)
    algorithm = Registry(demo.plugin).choose(run.algorithm, demo.names.chosen)
    if demo.updates is not None:
        algorithm = replace(algorithm, updates_per_step=demo.updates)
    return replace(
        run,
        algorithm=algorithm,
        names=demo.names,
        plugin=demo.plugin,
        resume=demo.resume,
        ahead=demo.ahead,
        processes=demo.processes,
        steps=run.steps if demo.steps is None else demo.steps,
    )
