"""Results: what a finished run leaves beside its checkpoints and its log."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.models import load_model
from pyrl.models.lora import has_adapter
from pyrl.report import Report, read_metrics, save_curves
from pyrl.report.page import write_page
from pyrl.report.step import StepObserver
from pyrl.report.table import first_and_last
from pyrl.run.checkpoint import replacing, write_model
from pyrl.run.config import Run
from pyrl.run.evaluation import Evaluations


def write_results(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluations: Evaluations,
    observer: StepObserver,
    changed: bool,
    weights: Mapping[str, Tensor] | None,
    remote: str | None,
) -> Report:
    """Write the trained model, the report (.html, .md, .json) and curves.png, each whole or not at
    all.

    `weights`: those of the model, which has parts of them; `remote`: where a server has them, and
    the model is its tokenizer and configuration.
    """
    with replacing(run.output / "model") as folder:
        write_model(folder, model, tokenizer, weights)
        if run.lora.merge and has_adapter(model):
            whole = load_model(str(folder))[0]
            shutil.rmtree(folder)
            write_model(folder, whole, tokenizer)
    facts: dict[str, str | int | float] = {
        "training steps": run.steps
        if changed
        else f"{run.steps:,} (none of them updated the model: it is unchanged)",
        "sampled tokens in training": observer.tokens,
        "seconds of training": round(observer.seconds),
        "learning rate": run.learning_rate,
        "seed": run.seed,
    }
    if remote is not None:
        facts["trained weights"] = remote
    if evaluations.taken and (left_out := evaluations.left_out()):
        facts["scored"] = left_out
    chosen = ", ".join(f"{kind} {name}" for kind, name in run.names.chosen.items())
    title = f"{run.method}{f' ({chosen})' if chosen else ''} on {run.model}, {run.data}"
    metrics = run.output / "metrics.jsonl"
    training = first_and_last(read_metrics(metrics))
    report = Report(title, tuple(evaluations.taken), facts, training)
    report.save(run.output)
    save_curves(metrics, run.output / "curves.png", title)
    write_page([run.output])
    return report
