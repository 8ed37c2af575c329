"""Every method, advantage and many another choice by its name, from the command line, by a kill.

For each name two processes: `pyrl train` makes three steps of the demo model; then the directory is
put back to what a run leaves that is killed in its third step, and `--resume` makes that step
again. Weights, optimizer, states, metrics and report have to be the same, bit for bit. The table
has the metric that says that the idea of the name acted. It takes minutes, so it is not among the
tests that pytest collects:

    OMP_NUM_THREADS=1 python tests/every_method.py [NAME ...]
"""

from __future__ import annotations

import json
import multiprocessing
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from acting import ACTS, acting
from rich.console import Console
from rich.table import Table
from short_run import ECHO, outcome
from tiny_run import write_questions

from pyrl import cli
from pyrl.methods import METHODS
from pyrl.methods.choices import ADVANTAGES
from pyrl.methods.fields import leaves
from pyrl.methods.registry import choose
from pyrl.report.metrics import read_metrics
from pyrl.reward import RandomReward

STEPS = 3
SETTINGS = shlex.split("""
    --model demo --device cpu --threads 1 --chat False --extractor whole --equivalence exact
    --prompts-per-step 4 --sample.max-tokens 21 --updates-per-step 2 --warmup-steps 0
    --learning-rate 1e-5 --steps 3 --save-every 1 --keep-checkpoints 3 --no-eval-before
    --no-eval-after --loggers
""")
VOTES = {"ib_tpo": 30, "ttrl_unique": 5, "grpo_unique": 5, "ettrl": 25, "treerl": 30}
"""Answers of a question; 8 of the others."""

METRICS = {
    "ttrl": "vote/majority_ratio",
    "ettrl": "advantage/ear_factor_max",
    "echo": "tree/forks",
    "echo_paper": "tree/forks",
    "treerl": "tree/forks",
    "ttrl_unique": "vote/mass",
    "grpo_unique": "vote/mass",
    "grpo": "reward_std",
    "dr_grpo": "reward_std",
    "rloo": "reward_std",
    "return": "reward",
    "treerl_released": "tree/forks",
    "treepo": "advantage/whiten_std",
    "tree_grpo": "tree/forks",
    "mass": "vote/mass",
    "ear": "advantage/ear_factor_max",
    "ear_clip": "advantage/clipped",
    "hybrid": "advantage/hybrid_signal_max",
    "whiten": "advantage/whiten_std",
    "ares_kl": "advantage/distance",
}
"""Of the names that `acting` does not have."""

ON = {"treerl": "treerl", "treerl_released": "treerl", "treepo": "treerl", "tree_grpo": "treerl"}
"""Methods that run an advantage; GRPO the others."""
ON |= {"mass": "grpo_unique", "ib_tpo": "treerl"}
AFTER = {"ear", "ear_clip", "hybrid", "whiten"}
AFTER |= {"funrl", "empg", "erpo", "progrpo", "ares_kl"}
"""Stages that change the advantages of one before them."""


CHOICES = {
    "top_h": ("grpo --sample.top-h 0.5", "completions/mean_length"),
    "even": ("grpo --sample.even", "tree/first_token_error"),
    "rso": ("grpo --select rso --sample.train 4", "select/reward_lift"),
    "judger": ("ttrl --vote judger --vote.file {folder}/judger.json", "vote/judged_right"),
    "forks of aepo_agentic": ("grpo --fork aepo_agentic --fork.step 3", "tree/forks"),
    "n_pg_igt": ("grpo --optimizer n_pg_igt", "optimizer/ahead"),
    "n_harpg": ("grpo --optimizer n_harpg", "optimizer/correction"),
    "diagnostics": (
        "grpo --diagnostics advantage_flips attention_entropy off_policy",
        "off_policy/samples",
    ),
}
"""Options of other choices by their names, and the metric that says that they acted."""
COINS = ["--reward", "random", "--reward.p", "0.5"]
JUDGER = shlex.split("""
    fit-judger --model demo --device cpu --data demo:train --limit 20 --samples 6 --temperature 1.2
    --max-tokens 21 --chat False --extractor whole --equivalence exact --output
""")


def runs(asked: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(what, name, words after `pyrl train`) of all names, or of those."""
    for name in METHODS:
        yield "method", name, [name]
    for name in ADVANTAGES:
        stages = f"grpo,{name}" if name in AFTER else name
        yield "advantage", name, [ON.get(name, "grpo"), "--advantage", stages]
    for name, (words, _) in CHOICES.items():
        yield "choice", name, [*words.split(), *COINS]
    unknown = set(asked) - {*METHODS, *ADVANTAGES, *CHOICES}
    if unknown:
        names = ", ".join(sorted(unknown))
        sys.exit(f"expected names of methods, advantages and choices, got {names}")


def options(name: str, words: list[str]) -> list[str]:
    """The settings of `acting`, with which an idea acts in three steps, as options."""
    votes = str(VOTES.get(words[0], 8))
    given = [*SETTINGS, "--sample.votes", votes, "--sample.train", min(votes, "16", key=int)]
    if name in CHOICES:
        return given
    if words[0] in ("echo", "echo_paper"):
        return given + ECHO
    if name not in ACTS:
        return given
    algorithm = acting(name)
    named = {"advantage": words[2]} if len(words) > 1 else {}
    before = dict(leaves(choose(METHODS[words[0]](), **named)))
    for setting, value in leaves(algorithm):
        if setting in before and before[setting] != value:
            given += [f"--{setting.replace('_', '-')}", str(value)]
    if isinstance(algorithm.reward, RandomReward):
        given += ["--reward", "random", "--reward.p", str(algorithm.reward.p)]
    for setting, value in ({"learning_rate": 3e-4} | ACTS[name].settings).items():
        given += [f"--{setting.replace('_', '-')}", str(value)]
    return given


def command(argv: list[str], log: Path) -> None:
    """`pyrl` with these words, and what it prints in a file."""
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        cli.main(argv)


def run(argv: list[str], log: Path) -> None:
    """In a process of its own, which ends well."""
    process = PROCESSES.Process(target=command, args=(argv, log))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(log.read_text().strip().splitlines()[-1])


def killed_in_the_last_step(output: Path) -> None:
    """What a run leaves that was killed after the steps before its last one."""
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    shutil.rmtree(output / "model")
    for name in ("report.html", "report.json", "report.md", "curves.png"):
        (output / name).unlink()
    for name in ("metrics.jsonl", "completions.jsonl"):
        lines = (output / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] < STEPS]
        (output / name).write_text("".join(kept))


def shown(name: str, words: list[str], folder: Path) -> tuple[str, str]:
    """The metric that says that the idea acted, and whether the resumed run has the same bits."""
    output, log = folder / "run", folder / "log"
    words = [word.format(folder=folder) for word in words]
    method, *chosen = words  # what is chosen comes last: it replaces other settings
    argv = [
        "train",
        method,
        *options(name, words),
        *chosen,
        "--data",
        str(folder / "questions.jsonl"),
    ]
    argv += ["--output", str(output)]
    shutil.rmtree(output, ignore_errors=True)
    run(argv, log)
    whole = outcome(output, STEPS)
    metrics = ACTS[name].metrics if name in ACTS else (METRICS.get(name) or CHOICES[name][1],)
    rows = read_metrics(output / "metrics.jsonl")
    acted = [sum(float(row.get(metric) or 0) for metric in metrics) for row in rows if len(row) > 1]
    said = f"{' + '.join(metrics)} {' '.join(f'{value:.4g}' for value in acted)}"
    killed_in_the_last_step(output)
    run([*argv, "--resume"], log)
    again = outcome(output, STEPS)
    differ = [part for part in whole if whole[part] != again[part]]
    return said, f"{', '.join(differ)} differ" if differ else "same bits"


def main(asked: list[str]) -> int:
    """The table of the asked names, and how many failed."""
    table = Table("", "name", "acted in steps 1 to 3", "killed in step 3 and resumed", box=None)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        lines = write_questions(Path(folder) / "questions.jsonl", 12).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [row | {"expert": row["answer"]} for row in rows]  # for calibrl
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(folder) / "questions.jsonl").write_text(text)
        run([*JUDGER, str(Path(folder) / "judger.json")], Path(folder) / "log")
        for what, name, words in runs(asked):
            if asked and name not in asked:
                continue
            try:
                acted, same = shown(name, words, Path(folder))
            except RuntimeError as error:
                acted, same = "", str(error)
            failed += same != "same bits"
            print(what, name, same, file=sys.stderr)
            table.add_row(what, name, acted, same)
    Console(width=140).print(table)
    return failed


if __name__ == "__main__":
    PROCESSES = multiprocessing.get_context("forkserver")
    PROCESSES.set_forkserver_preload(["pyrl.train", "pyrl.methods", "matplotlib.figure"])
    sys.exit(main(sys.argv[1:]) > 0)
