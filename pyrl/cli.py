"""The command line: `pyrl demo`, `pyrl train METHOD`, `pyrl eval`, `pyrl info`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import tyro

from pyrl.answers.pool import VerifierError
from pyrl.checks import one_of
from pyrl.engine import EngineError, EngineFailure

if TYPE_CHECKING:
    from pyrl.report import Progress, Report

USAGE = """\
pyrl: tree-rollout test-time RL. Fork where the model is unsure, vote, learn.

  pyrl demo [METHOD]     learn to sort longer strings of digits, without labels, in minutes
  pyrl train METHOD ...  train a model on unlabelled questions; METHOD is one of
                         {methods}
  pyrl eval ...          score a model on questions with answers
  pyrl info              how this installation was built

Each command has --help.
"""


BAD_INPUT = (
    ValueError, OSError, ImportError, FloatingPointError, EngineError, VerifierError,
)  # fmt: skip
"""What ends a command with a sentence and exit code 2."""


@dataclass(frozen=True)
class Demo:
    """Learn to sort longer strings of digits from the votes of a small packaged model."""

    method: Annotated[str, tyro.conf.Positional] = "echo"
    """ttrl, ettrl or echo; or a control, gold (true labels) or coin (a random reward)."""
    output: Path = Path("runs/demo")
    """Directory of checkpoints, metrics and the report."""
    seed: int = 0
    steps: int | None = None
    """Fewer steps for a quick look; the default is what the report in the README used."""
    updates: int | None = None
    """Optimizer updates that share the samples of a step; the default is the demo's own number."""
    resume: bool = False
    """Go on from the last checkpoint in the output directory."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exit 0, 2 for bad input, 3 for an engine that failed, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(_command(args))
    except EngineFailure as error:
        print(f"pyrl: {error}", file=sys.stderr)
        sys.exit(3)
    except BAD_INPUT as error:
        # A reward function's own error carries its name in a note.
        for line in (error, *vars(error).get("__notes__", ())):
            print(f"pyrl: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"pyrl: interrupted; {str(interrupt) or 'nothing was saved'}", file=sys.stderr)
        sys.exit(130)


def _command(args: list[str]) -> int:
    commands = {"demo": _demo, "train": _train, "eval": _eval, "info": _info}
    if not args or args[0] in ("-h", "--help"):
        from pyrl.methods import METHODS

        print(USAGE.format(methods=", ".join(METHODS)))
        return 0
    return commands[one_of(args[0], commands, "command")](args[1:])


def _demo(args: list[str]) -> int:
    demo = tyro.cli(Demo, args=args, prog="pyrl demo")
    with _loading() as progress:
        from pyrl.demo.run import EVAL_SETS, METHODS, SCORING, demo_run
        from pyrl.train import Trainer

        method = one_of(demo.method, METHODS, "demo method")
        run = replace(demo_run(method, output=demo.output, seed=demo.seed), resume=demo.resume)
        if demo.steps is not None:
            run = replace(run, steps=demo.steps)
        if demo.updates is not None:
            algorithm = replace(run.algorithm, updates_per_step=demo.updates)
            run = replace(run, algorithm=algorithm)
        report = Trainer(run, progress, scoring=SCORING, eval_sets=EVAL_SETS).train()
    _show(report, run.output)
    return 0


def _train(args: list[str]) -> int:
    from pyrl.methods import METHODS

    if not args or args[0] in ("-h", "--help"):
        print(f"pyrl train METHOD ...\n\nMETHOD is one of {', '.join(METHODS)}; each has --help.")
        return 0 if args else 2
    from pyrl.run.config import parse_run

    method = one_of(args[0], METHODS, "method")
    run = parse_run(args[1:], method, METHODS[method]())
    with _loading() as progress:
        from pyrl.train import Trainer

        report = Trainer(run, progress).train()
    _show(report, run.output)
    return 0


def _loading() -> Progress:
    """Speaks while torch and transformers are imported, which takes seconds."""
    from pyrl.report import Progress

    progress = Progress()
    progress.phase("loading")
    return progress


def _show(report: Report, output: Path) -> None:
    rich.print(report)
    for name in ("model", "curves.png", "metrics.jsonl"):
        print(f"{name.partition('.')[0]:8} {output / name}")


def _eval(args: list[str]) -> int:
    with _loading() as progress:
        from pyrl.evaluate import EvalSettings, evaluate_model
        from pyrl.report import Report

        settings = tyro.cli(EvalSettings, args=args, prog="pyrl eval")
        score = evaluate_model(settings, progress)
    rich.print(Report(f"{settings.model} on {settings.data}", (score,)))
    return 0


def _info(args: list[str]) -> int:
    import pyrl

    tyro.cli(_nothing, args=args, prog="pyrl info", description="How pyrl was built.")
    for name, value in pyrl.build_info().items():
        print(f"{name}: {value}")
    return 0


def _nothing() -> None: ...
