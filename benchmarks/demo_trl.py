"""TTRL on the demo inside TRL's trainer, beside `pyrl train ttrl`: the share of right answers.

    pip install "pyrl[trl]"
    OMP_NUM_THREADS=1 python benchmarks/demo_trl.py --steps 40

The settings of `pyrl demo ttrl` on both sides: 48 questions a step, 16 answers each, two updates,
AdamW at 2e-5 with a warm-up over ten steps. The order of the questions and the end of the schedule
are each side's own. The table has the mean over the samples of ten steps; true answers are counted
and train nothing. Exit code 1 if TRL's side is more than 0.05 lower in the last ten steps, or if
either has not risen by 0.05 since the first ten.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from measure import conditions, table
from rich.console import Console
from transformers import PrinterCallback
from trl import GRPOConfig

from pyrl.demo.run import demo_run
from pyrl.hosts.trl import TreeGRPOTrainer
from pyrl.models import load_model
from pyrl.prompts import load_prompts
from pyrl.report import Progress
from pyrl.run.config import Run
from pyrl.train import Trainer

ACCURACY = "vote/ground_truth_reward"
CLOSE = RISE = 0.05


def of_pyrl(run: Run) -> list[float]:
    trainer = Trainer(run, Progress(console=Console(file=StringIO())))
    curve = [trainer.observe(trainer.train_step())[ACCURACY] for _ in range(run.steps)]
    trainer.close()
    return [float(str(value)) for value in curve]


def of_trl(run: Run, folder: str) -> list[float]:
    model, tokenizer = load_model(run.model)
    questions = load_prompts(run.data, tokenizer, max_tokens=40)
    sample, updates = run.algorithm.sample, run.algorithm.updates_per_step
    trainer = TreeGRPOTrainer(
        model,
        args=GRPOConfig(
            folder,
            max_steps=run.steps * updates,
            num_generations=sample.train,
            per_device_train_batch_size=run.prompts_per_step * sample.train // updates,
            steps_per_generation=updates,
            max_completion_length=sample.max_tokens,
            temperature=sample.temperature,
            learning_rate=run.learning_rate,
            warmup_steps=run.warmup_steps * updates,
            adam_beta2=run.betas[1],
            max_grad_norm=run.clip_grad_norm,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            seed=run.seed,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": q.text, "answer": q.answer} for q in questions]
        ),
        processing_class=tokenizer,
        algorithm=run.algorithm,
        loss="pyrl",
        extractor="whole",
        equivalence="exact",
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row[ACCURACY] for row in trainer.state.log_history if ACCURACY in row]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = demo_run("ttrl", output=Path(folder) / "pyrl", seed=options.seed)
        run = replace(run, steps=options.steps, loggers=(), eval_before=False, eval_after=False)
        curves = {"pyrl train": of_pyrl(run), "in TRL": of_trl(run, folder)}
    print(conditions() + "\n")
    tens = {side: np.array(curve).reshape(-1, 10).mean(axis=1) for side, curve in curves.items()}
    rows = [
        [f"{10 * n + 1}-{10 * n + 10}", *(f"{of[n]:.3f}" for of in tens.values())]
        for n in range(options.steps // 10)
    ]
    print(table(["steps", *tens], rows))
    close = tens["in TRL"][-1] >= tens["pyrl train"][-1] - CLOSE
    return 0 if close and all(of[-1] - of[0] >= RISE for of in tens.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
