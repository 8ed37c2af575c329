"""The command line: `pyrl demo`, `train`, `methods`, `plan`, `report`, `eval` and others.

Each command imports what it needs: torch and transformers take seconds, and help needs neither.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import pyrl

if TYPE_CHECKING:
    from pyrl.report import Progress, Report

USAGE = """\
pyrl: tree-rollout test-time RL. Fork where the model is unsure, vote, learn.

  pyrl demo [METHOD]     learn to sort longer strings of digits, without labels, in minutes
  pyrl train METHOD ...  train a model on unlabelled questions by ttrl, ettrl, echo or another
                         method; `pyrl train` lists them
  pyrl methods           methods and choices by name, with their papers; `pyrl methods show NAME`
  pyrl plan METHOD ...   what such a run would hold in memory, before anything is loaded
  pyrl report RUN ...    a run, or several side by side, as one HTML page with their trees
  pyrl eval ...          score a model on questions with answers
  pyrl fit-judger ...    learn from such questions which responses are right by their entropies
  pyrl distil-rules ...  a run's fork and prune rules as small decision trees
  pyrl serve ...         a server of the Tinker protocol: clients sample and train adapters
  pyrl info              how this installation was built
  pyrl --version         its version

Each command has --help.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    Exit codes: 0; 2 for bad input; 3 for an engine that failed; 4 for a run that ended and in which
    no step updated the model; 130 after Ctrl-C or SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "--version"):
        print(f"pyrl {pyrl.__version__}" if args[:1] == ["--version"] else USAGE)
        sys.exit(0)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from pyrl.answers.pool import VerifierError
    from pyrl.engine import EngineError, EngineFailure
    from pyrl.run.interrupt import sigterm_as_ctrl_c

    bad_input = (
        ValueError, OSError, ImportError, FloatingPointError, EngineError, VerifierError,
    )  # fmt: skip
    try:
        with sigterm_as_ctrl_c():
            sys.exit(_command(args))
    except EngineFailure as error:
        print(f"pyrl: {error}", file=sys.stderr)
        sys.exit(3)
    except bad_input as error:
        print(f"pyrl: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"pyrl: interrupted; {str(interrupt) or 'nothing was saved'}", file=sys.stderr)
        sys.exit(130)


def _command(args: list[str]) -> int:
    from pyrl.checks import one_of

    commands = {
        "demo": _demo,
        "train": _train,
        "methods": _methods,
        "plan": _plan,
        "report": _report,
        "eval": _eval,
        "fit-judger": _fit_judger,
        "distil-rules": _distil_rules,
        "serve": _serve,
        "info": _info,
    }
    return commands[one_of(args[0], commands, "command")](args[1:])


def _demo(args: list[str]) -> int:
    with _loading() as progress:
        from pyrl.demo.run import EVAL_SETS, SCORING, parse_demo
        from pyrl.train import Trainer

        run = parse_demo(args)
        trainer = Trainer(run, progress, scoring=SCORING, eval_sets=EVAL_SETS)
        report = trainer.train()
    return _ended(report, run.output, trainer.changed)


def _train(args: list[str]) -> int:
    from pyrl.methods.registry import Registry

    if not args or args[0] in ("-h", "--help"):
        names = fill(f"METHOD is one of {', '.join(Registry().names('method'))};", 100)
        print(
            f"pyrl train METHOD ...\n\n{names}"
            "\neach has --help, and `pyrl methods` says what they are."
            "\nWith --config FILE it may be left out where the file names it, as run.yaml does."
        )
        return 0 if args else 2
    from pyrl.run.config import parse_train

    run = parse_train(args)
    with _loading() as progress:
        from pyrl.train import Trainer

        trainer = Trainer(run, progress)
        report = trainer.train()
    return _ended(report, run.output, trainer.changed)


def _loading() -> Progress:
    """Speaks while torch and transformers are imported, which takes seconds."""
    from pyrl.report import Progress

    progress = Progress()
    progress.phase("loading")
    return progress


def _ended(report: Report, output: Path, changed: bool) -> int:
    """Show what a run came to; its exit code."""
    import rich

    rich.print(report)
    for name in ("model", "metrics.jsonl", "curves.png", "report.html"):
        print(f"{name.partition('.')[0]:8} {output / name}")
    if changed:
        return 0
    print("pyrl: no step updated the model: it is unchanged", file=sys.stderr)
    return 4


def _methods(args: list[str]) -> int:
    import rich
    import tyro

    from pyrl.methods.about import named
    from pyrl.methods.pages import Lookup, listing, page
    from pyrl.methods.registry import Registry

    asked = tyro.cli(Lookup, args=args, prog="pyrl methods")
    registry = Registry(asked.plugin)
    if not asked.show:
        rich.print(listing(registry))
    for name in asked.show[1:]:
        for found in named(name, registry):
            rich.print(page(found))
    return 0


def _plan(args: list[str]) -> int:
    import rich
    import tyro

    from pyrl.run.config import parse_train

    if not args or args[0].startswith("-"):
        print(
            "pyrl plan METHOD --model MODEL [--gpu GB] [--prompt-tokens N] ...\n\n"
            "What `pyrl train METHOD` with the same options would hold in memory, by part and\n"
            "phase, from the model's configuration alone; and what makes it smaller if it does\n"
            "not fit. Without --gpu: on a CPU. Questions have --prompt-tokens tokens (256)."
        )
        return 0 if args else 2
    with _loading():
        from pyrl.run.plan import Room, shown
    room, options = tyro.cli(Room, args=args[1:], prog="pyrl plan", return_unknown_args=True)
    if "--data" not in options:
        options += ["--data", "unread"]
    found, smaller = shown(parse_train([args[0], *options]), room)
    rich.print(found)
    if smaller is not None:
        rich.print(smaller)
    return 0


def _report(args: list[str]) -> int:
    import tyro

    from pyrl.report.page import PageSettings, write_page

    settings = tyro.cli(PageSettings, args=args, prog="pyrl report")
    print(f"report   {write_page(settings.runs, settings.output)}")
    return 0


def _eval(args: list[str]) -> int:
    import rich
    import tyro

    with _loading() as progress:
        from pyrl.evaluate import EvalSettings, evaluate_model
        from pyrl.report import Report
        from pyrl.run.lock import one_process

        one_process()
        settings = tyro.cli(EvalSettings, args=args, prog="pyrl eval")
        score = evaluate_model(settings, progress)
    facts = {"questions": score.questions, "seconds": round(score.seconds), "seed": settings.seed}
    report = Report(f"{settings.model} on {settings.data}", (score,), facts)
    rich.print(report)
    if settings.output is not None:
        report.save(settings.output)
        print(f"report   {settings.output / 'report.json'}")
    return 0


def _fit_judger(args: list[str]) -> int:
    import tyro

    with _loading() as progress:
        from pyrl.run.judging import JudgerSettings, fit_judger
        from pyrl.run.lock import one_process

        one_process()
        settings = tyro.cli(JudgerSettings, args=args, prog="pyrl fit-judger")
        found = fit_judger(settings, progress)
    for name, value in found.items():
        print(f"{name:9} {value:.4g}")
    print(f"judger    {settings.output}")
    return 0


def _distil_rules(args: list[str]) -> int:
    import tyro

    with _loading() as progress:
        from pyrl.run.distilling import DistilSettings, distil_rules
        from pyrl.run.lock import one_process

        one_process()
        settings = tyro.cli(DistilSettings, args=args, prog="pyrl distil-rules")
        lines = [*distil_rules(settings, progress)]
    print(*lines, sep="\n")
    return 0


def _serve(args: list[str]) -> int:
    from importlib.util import find_spec

    import tyro

    from pyrl.serve.settings import ServeSettings

    settings = tyro.cli(ServeSettings, args=args, prog="pyrl serve")
    if missing := [name for name in ("starlette", "uvicorn", "peft") if find_spec(name) is None]:
        raise ImportError(f"pyrl serve needs {', '.join(missing)}; pip install 'pyrl[serve]'")
    with _loading():
        from pyrl.serve.server import serve
    serve(settings)
    return 0


def _info(args: list[str]) -> int:
    import tyro

    tyro.cli(_nothing, args=args, prog="pyrl info", description="How pyrl was built.")
    for name, value in pyrl.build_info().items():
        print(f"{name}: {value}")
    return 0


def _nothing() -> None: ...
