"""Trees without replacement on the demo, beside TTRL, as tables for docs/results.md.

    python benchmarks/demo_unique.py votes
    python benchmarks/demo_unique.py learning
    python benchmarks/demo_unique.py rates
    python benchmarks/demo_unique.py choices

votes: the untrained model answers the held-out questions; what its votes are worth by tokens.
learning: `pyrl demo`'s runs of 80 steps, scored by greedy answers. TTRL stands beside with its 16
samples a question, and with as many as cost the same tokens.
rates: the same at other learning rates.
choices: the trees with one choice after the other changed.

Every run has a thread and a directory below --output, and goes on there when it is started again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pyrl.advantage import MassBaseline
from pyrl.algorithm import Algorithm
from pyrl.answers import EQUIVALENCES, EXTRACTORS, classify
from pyrl.answers.reading import decoder
from pyrl.answers.truth import right
from pyrl.demo.run import EVAL_SETS, MAX_TOKENS, METHODS, SCORING, TEMPERATURE, demo_run
from pyrl.engine.hf import HFEngine
from pyrl.leaves import collect
from pyrl.models import load_model
from pyrl.prompts import load_prompts
from pyrl.report import Progress
from pyrl.report.metrics import Row, read_metrics
from pyrl.rollout import Rollout, make_signals
from pyrl.run.config import Run
from pyrl.train import Trainer

GREEDY = replace(SCORING, samples=1, votes=0, exact=0)
CHOICES = ("leaves 3", "leaves 5", "leaves 8", "power of W 0", "power of W 1", "temperature 0.8")
HELD_OUT, LONGER = (f"eval/{name}/greedy" for name in EVAL_SETS)


def table(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |")
    print(f"|---|{'---:|' * (len(columns) - 1)}")


def row(*cells: object) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def with_votes(method: str, votes: int) -> Algorithm:
    algorithm = METHODS[method]()
    return replace(algorithm, sample=replace(algorithm.sample, votes=votes, train=votes))


def votes(seeds: list[int]) -> None:
    """Labels and coverage of the untrained model, means over the seeds."""
    model, tokenizer = load_model("demo")
    prompts = load_prompts("demo:heldout", tokenizer, max_tokens=64, chat=False)
    engine = HFEngine(model, [tokenizer.eos_token_id], max_rows=1024)
    extractor, equivalence = EXTRACTORS["whole"], EQUIVALENCES["exact"]()
    table("sampled how", "leaves", "tokens a question", "label right", "some leaf right", "mass")
    sizes = {
        "ttrl": (4, 8, 16, 32),
        "ettrl": (10, 20, 40),
        "echo": (16, 32),
        "ttrl_unique": (4, 8, 16),
    }
    for method, counts in sizes.items():
        for count in counts:
            algorithm = with_votes(method, count)
            found = []
            for seed in seeds:
                run = Rollout(
                    engine,
                    [prompt.tokens for prompt in prompts],
                    votes=count,
                    limit=MAX_TOKENS,
                    sampling=algorithm.sample.sampling(),
                    fork=algorithm.fork,
                    prune=algorithm.prune,
                    signals=make_signals(algorithm.fork, algorithm.prune),
                    seed=seed,
                )
                leaves = collect(run.run(), decoder(tokenizer))
                answers = classify(leaves, extractor, equivalence)
                label_G = algorithm.vote(leaves, answers).label_G
                asked = [prompts[group] for group in leaves.group_N.tolist()]
                right_N = right(answers.answer_N, asked, equivalence) == 1
                found.append(
                    (
                        run.counts.sampled_tokens / len(prompts),
                        np.mean(right(label_G, prompts, equivalence) == 1),
                        np.mean(np.bincount(leaves.group_N, right_N, len(prompts)) > 0),
                        np.exp(leaves.log_mass_N).sum() / len(prompts),
                    )
                )
            tokens, label, some, mass = np.mean(found, axis=0)
            seen = "" if np.isnan(mass) else f"{mass:.3f}"
            row(method, count, f"{tokens:.0f}", f"{label:.3f}", f"{some:.3f}", seen)


def train(method: str, size: int, rate: float, seed: int, output: Path) -> list[float]:
    """Greedy held-out and at length 18, sampled tokens, and the last step's idle questions."""
    folder = output / f"{method}-{size}-{rate:g}-{seed}"
    return trained(with_votes(method, size), method, rate, seed, folder)


def trained(algorithm: Algorithm, method: str, rate: float, seed: int, folder: Path) -> list[float]:
    run = replace(
        demo_run(method, output=folder, seed=seed), algorithm=algorithm, learning_rate=rate
    )
    scores, _, rows = finished(run)
    last = [metrics for metrics in rows if "num_tokens" in metrics][-1]
    return [*scores, last["num_tokens"], last["frac_reward_zero_std"]]


def finished(run: Run) -> tuple[list[float], Trainer, list[Row]]:
    """A run of the demo, or what is missing of it: its greedy scores on both sets, and metrics."""
    resume = (run.output / "run.yaml").exists()
    run = replace(run, eval_every=0, save_every=20, resume=resume)
    with Progress(console=Console(file=StringIO())) as progress:
        trainer = Trainer(run, progress, scoring=GREEDY, eval_sets=EVAL_SETS)
        trainer.train()
        trainer.close()
    rows = read_metrics(run.output / "metrics.jsonl")
    return [[r[name] for r in rows if name in r][-1] for name in (HELD_OUT, LONGER)], trainer, rows


def learning(seeds: list[int], output: Path) -> None:
    """The three ways to spend tokens, seed by seed, and their paired differences."""
    table("seed", "method", "leaves", "held-out", "length 18", "sampled tokens", "without gradient")
    greedy: dict[tuple[str, int], list[float]] = {}
    for seed in seeds:
        for method, size in (("ttrl", 16), ("ttrl", 5), ("ttrl_unique", 5)):
            score, longer, tokens, idle = train(method, size, 2e-5, seed, output)
            row(seed, method, size, f"{score:.3f}", f"{longer:.3f}", f"{tokens:,}", f"{idle:.2f}")
            greedy.setdefault((method, size), []).append(score)
    ours = np.array(greedy["ttrl_unique", 5])
    for other in (("ttrl", 16), ("ttrl", 5)):
        difference = ours - np.array(greedy[other])
        mean = f"{difference.mean():+.3f}"
        print(f"\nLess {other[0]} with {other[1]}: {difference.round(3).tolist()}, mean {mean}")


def rates(seeds: list[int], output: Path) -> None:
    """How far the learning rate may go."""
    table("learning rate", "method", *(f"held-out, seed {seed}" for seed in seeds))
    for rate in (1e-5, 2e-5, 4e-5, 1e-4):
        for method, size in (("ttrl", 16), ("ttrl_unique", 5)):
            scores = [train(method, size, rate, seed, output)[0] for seed in seeds]
            row(f"{rate:g}", method, *(f"{score:.3f}" for score in scores))


def changed(choice: str) -> Algorithm:
    """The demo's method with one choice changed."""
    algorithm = METHODS["ttrl_unique"]()
    name, value = choice.rsplit(" ", 1)
    match name:
        case "leaves":
            return with_votes("ttrl_unique", int(value))
        case "power of W":
            return replace(algorithm, advantage=(MassBaseline(power=float(value)),))
        case "temperature":
            return replace(algorithm, sample=replace(algorithm.sample, temperature=float(value)))
    raise ValueError(f"choice: expected a known one, got {choice!r}")


def choices(seeds: list[int], output: Path) -> None:
    """What each default is worth."""
    table("changed", *(f"held-out, seed {seed}" for seed in seeds), "sampled tokens")
    for choice in CHOICES:
        folder = output / choice.replace(" ", "-")
        found = [
            trained(changed(choice), "ttrl_unique", 2e-5, seed, folder / str(seed))
            for seed in seeds
        ]
        row(choice, *(f"{one[0]:.3f}" for one in found), f"{np.mean([f[2] for f in found]):,.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=("votes", "learning", "rates", "choices"))
    parser.add_argument("--output", type=Path, default=Path("runs/unique"))
    parser.add_argument("--seeds", type=int, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"T = {TEMPERATURE}, torch {torch.__version__}\n")
    if options.table == "votes":
        votes(options.seeds or [0, 1, 2, 3])
    elif options.table == "learning":
        learning(options.seeds or [0, 1, 2, 3, 4], options.output)
    elif options.table == "choices":
        choices(options.seeds or [0, 1], options.output)
    else:
        rates(options.seeds or [0, 1], options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
