"""The command line: `pyrl demo`, `train`, `compare`, `methods`, `plan`, `report` and others.

Each command imports what it needs: torch and transformers take seconds, and help needs neither.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import pyrl

if TYPE_CHECKING:
    from pyrl.evaluate import Scoring
    from pyrl.report import Progress, Report
    from pyrl.run.config import Run

USAGE = """\
pyrl: tree-rollout test-time RL. Fork where the model is unsure, vote, learn.

  pyrl demo [METHOD]     learn to sort longer strings of digits, without labels, in minutes
  pyrl train METHOD ...  train a model on unlabelled questions by ttrl, ettrl, echo or another
                         method; `pyrl train` lists them
  pyrl methods           methods and choices by name, with their papers; `pyrl methods show NAME`
  pyrl compare METHOD METHOD ...
                         train methods with the same seeds, questions and budget, and say which
                         differences are certain
  pyrl plan METHOD ...   what such a run would hold in memory, before anything is loaded
  pyrl report RUN ...    a run, or several side by side, as one HTML page with their trees
  pyrl eval ...          score a model on questions with answers
  pyrl fit-judger ...    learn from such questions which responses are right by their entropies
  pyrl distil-rules ...  a run's fork and prune rules as small decision trees
  pyrl doctor            whether a run would work here, how fast, and what to do where not
  pyrl serve ...         a server of the Tinker protocol: clients sample and train adapters
  pyrl sampler ...       a vLLM server that samples for runs on this and other machines
  pyrl info              how this installation was built
  pyrl --version         its version
  pyrl --completion bash
                         what bash (or zsh, fish) needs to complete all this at Tab

Each command has --help.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    Exit codes: 0; 1 if the doctor says that no run works here; 2 for bad input; 3 for an engine or
    a process that failed, also for want of memory; 4 for a run that ended and in which no step
    updated the model; 130 after Ctrl-C or SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "--version"):
        print(f"pyrl {pyrl.__version__}" if args[:1] == ["--version"] else USAGE)
        sys.exit(0)
    if args[0] in ("--complete", "--completion"):
        sys.exit(_completion(*args))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args[0] == "doctor":  # before anything is imported that may be missing
        try:
            sys.exit(_doctor(args[1:]))
        except KeyboardInterrupt:
            sys.exit(130)
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
        print(f"{_name()}: {error}", file=sys.stderr)
        sys.exit(3)
    except bad_input as error:
        print(f"{_name()}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"pyrl: interrupted; {str(interrupt) or 'nothing was saved'}", file=sys.stderr)
        sys.exit(130)


def _name() -> str:
    return f"pyrl: process {_rank()}" if _rank() else "pyrl"


def _command(args: list[str]) -> int:
    from pyrl.checks import one_of

    return COMMANDS[one_of(args[0], COMMANDS, "command")](args[1:])


def _completion(what: str, *words: str) -> int:
    from pyrl.completion import SHELLS, complete, script

    if what == "--complete":
        print("\n".join(complete(words, COMMANDS)))
        return 0
    if len(words) != 1 or words[0] not in SHELLS:
        got = " ".join(words) or "nothing"
        print(f"pyrl: --completion: expected {', '.join(SHELLS)}, got {got}", file=sys.stderr)
        return 2
    print(script(words[0]), end="")
    return 0


def _demo(args: list[str]) -> int:
    with _loading() as progress:
        from pyrl.demo.run import EVAL_SETS, SCORING, parse_demo

        run = parse_demo(args)
        return _run(run, ["demo", *args], progress, SCORING, EVAL_SETS)


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
    from pyrl.run.parsing import parse_train

    run = parse_train(args)
    with _loading() as progress:
        return _run(run, ["train", *args], progress)


def _run(
    run: Run,
    command: Sequence[str],
    progress: Progress,
    scoring: Scoring | None = None,
    eval_sets: Mapping[str, str] | None = None,
) -> int:
    """Lead the run, or follow where another process leads it; the exit code."""
    from torch import OutOfMemoryError

    from pyrl.ranks import RankLost, RanksError
    from pyrl.ranks.joining import follow_signals, joined
    from pyrl.run.following import follow
    from pyrl.run.plan import too_large
    from pyrl.train import Trainer

    if _rank():
        follow_signals()
    try:
        with joined(command, run.processes) as ranks:
            if ranks.rank:
                follow(run, ranks, eval_sets)
                return 0
            trainer = Trainer(run, progress, scoring=scoring, eval_sets=eval_sets, ranks=ranks)
            report = trainer.train()
            ranks.tell("end")
    except OutOfMemoryError as error:
        print(f"{_name()}: {too_large(run, error)}", file=sys.stderr)
        return 3
    except (RankLost, RanksError) as error:
        if not _rank():  # the others know no more of it
            print(f"pyrl: {error}", file=sys.stderr)
        return 3 if isinstance(error, RankLost) else 2
    return _ended(report, run.output, trainer.learner.changed)


def _rank() -> int:
    """The place of this process among those of torchrun, or of the run that started it."""
    return int(os.environ.get("RANK", "0"))


def _loading() -> Progress:
    """Speaks while torch and transformers are imported, which takes seconds."""
    from rich.console import Console

    from pyrl.report import Progress

    progress = Progress(console=Console(quiet=True) if _rank() else None)
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

    from pyrl.run.parsing import parse_train

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


def _compare(args: list[str]) -> int:
    if not args:
        args = ["--help"]
    with _loading():
        import rich

        from pyrl.compare.comparing import FILES, compare
        from pyrl.compare.contestants import parse_compare
        from pyrl.compare.tables import brief, facts, title

        comparison = parse_compare(args)
        record = compare(comparison, lambda text: print(text, file=sys.stderr, flush=True))
    rich.print(f"[bold]{title(record)}[/bold]", facts(record), sep="\n")
    for table in brief(record):
        rich.print(table)
    for name in FILES:
        print(comparison.settings.output / name)
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


def _doctor(args: list[str]) -> int:
    from pyrl import doctor

    if args in (["-h"], ["--help"]):
        print(f"pyrl doctor\n\n{doctor.ABOUT}")
        return 0
    if args:
        print(f"pyrl: doctor: expected no options, got {' '.join(args)}", file=sys.stderr)
        return 2
    return doctor.report()


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


def _sampler(args: list[str]) -> int:
    import tyro

    from pyrl.engine.vllm.sampler import SamplerSettings, serve

    serve(tyro.cli(SamplerSettings, args=args, prog="pyrl sampler"))
    return 0


def _info(args: list[str]) -> int:
    import tyro

    tyro.cli(_nothing, args=args, prog="pyrl info", description="How pyrl was built.")
    for name, value in pyrl.build_info().items():
        print(f"{name}: {value}")
    return 0


def _nothing() -> None: ...


COMMANDS = {
    "demo": _demo,
    "train": _train,
    "methods": _methods,
    "compare": _compare,
    "plan": _plan,
    "report": _report,
    "eval": _eval,
    "fit-judger": _fit_judger,
    "distil-rules": _distil_rules,
    "doctor": _doctor,
    "serve": _serve,
    "sampler": _sampler,
    "info": _info,
}
"""Each takes the words that follow its name, and returns the exit code."""
