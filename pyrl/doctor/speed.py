"""Speed: the demo model really samples and trains for some seconds, and a matrix is multiplied."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from pyrl.demo.run import demo_run
from pyrl.doctor import BROKEN, Finding, told
from pyrl.models import find_device
from pyrl.report import Progress
from pyrl.train import Trainer

SECONDS = 4.0
"""Of training, after a first step that is not timed."""
PRODUCT_SECONDS = 0.5
SIZE = 1024
"""Rows and columns of the matrices; a product takes 2 SIZE^3 operations."""


@dataclass(frozen=True)
class Measured:
    """What the steps came to."""

    sampled: int
    """Tokens that the engine drew, in `sampling` seconds."""
    trained: int
    """Tokens of the leaves that trained, in `updating` seconds."""
    sampling: float
    updating: float


def findings() -> Iterator[Finding]:
    """That the engine hf and the learner work, and how fast."""
    device = find_device("auto")
    try:
        with TemporaryDirectory() as folder:
            measured = measure(Path(folder), SECONDS)
    except BROKEN as error:
        yield Finding("engine hf", f"does not start: {told(error)}", "mend what the message names")
    else:
        yield Finding("engine hf", f"drew {measured.sampled:,} tokens of the demo model")
        where = "on one thread" if device.type == "cpu" else f"on {device.type}"
        yield Finding("sampling", f"{measured.sampled / measured.sampling:,.0f} tokens/s {where}")
        yield Finding("training", f"{measured.trained / measured.updating:,.0f} tokens/s {where}")
    rate = product_rate(device, PRODUCT_SECONDS) / 1e9
    yield Finding("matrix product", f"{rate:,.0f} GFLOP/s in float32 on {device.type}")


def measure(folder: Path, seconds: float) -> Measured:
    """Steps of the demo's TTRL for about so long, on one thread as the demo has it, or on the GPU.

    Raises what the parts of a run raise.
    """
    threads = torch.get_num_threads()
    run = replace(
        demo_run("ttrl", output=folder / "run", seed=0),
        prompts_per_step=16,
        loggers=(),
    )
    try:
        trainer = Trainer(run, Progress(console=Console(file=StringIO())))
        with closing(trainer):
            trainer.train_step()
            return _timed(trainer, time.monotonic() + seconds)
    finally:
        torch.set_num_threads(threads)


def _timed(trainer: Trainer, end: float) -> Measured:
    """At least one step; none begins after the end."""
    first, trained, sampling, updating = trainer.engine.work().decode_tokens, 0, 0.0, 0.0
    while not trained or time.monotonic() < end:
        step = trainer.train_step()
        trained += len(step.advantage_T)
        sampling += step.timing["timing/sampling"]
        updating += step.timing["timing/updating"]
    sampled = trainer.engine.work().decode_tokens - first
    return Measured(sampled, trained, sampling, updating)


def product_rate(device: torch.device, seconds: float) -> float:
    """Floating-point operations in a second of products of square float32 matrices."""
    square = torch.ones(SIZE, SIZE, device=device)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.mm(square, square)
    wait()
    began, done = time.monotonic(), 0
    while done == 0 or time.monotonic() - began < seconds:
        torch.mm(square, square)
        wait()
        done += 1
    return done * 2 * SIZE**3 / (time.monotonic() - began)
