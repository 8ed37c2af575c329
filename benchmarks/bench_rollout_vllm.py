"""Trees on vLLM: forks in mid-flight against blocking calls, statistics against none.

    python benchmarks/bench_rollout_vllm.py [check flat host tree sync]

Run it by an interpreter that has vLLM's CPU build and pyrl. Each part runs in a process of its own,
with vLLM in that process: eager, float32, one thread, blocks of 32 tokens, a cache per engine.
Variants take turns; a ratio is the median of the rounds' ratios, in CPU time: this process has one
thread, whose CPU time is its wall time on a machine that does nothing else.

check: token counts, and log-probs and entropies against transformers. flat: 64 answers of equal
length, against `LLM.generate`. host: the time that pyrl's code takes of a step with 1024 branches,
of a random model of the packaged one's size. tree: ETMR (arXiv:2508.11356; 60 leaves, 12 trunks)
against 60 independent answers, and against two blocking calls that sample a tree of the same
shape. sync: all weights from the learner to the engine, with the probe.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

# vLLM reads these when it is imported.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # LLM runs in this process too
}

import numpy as np
import torch
from measure import conditions, gate, table
from rollout_peers import Blocking, Cost, Host, Shape, with_a_barrier
from transformers import LlamaConfig, LlamaForCausalLM

from pyrl._core.tree import Signals
from pyrl.engine.sync import Sync
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.fork import EntropyConfidence, Flat, Fork, TopEntropy
from pyrl.logits.sampling import Sampling
from pyrl.models import load_model, model_location
from pyrl.prompts import load_prompts
from pyrl.prune import Doubt, Keep, Prune
from pyrl.rollout import Rollout, answer_start, make_signals

QUESTIONS = (
    "reasoning_gym:chain_sum?min_terms=3&max_terms=5&min_digits=2&max_digits=2&shots=0&size=8"
)
ASK = " Think step by step and put the answer in \\boxed{}."
ONLINE, LEAVES, BLOCK = "ETMR online", 60, 32
# The windows of ECHO's rules, as answers of 1000 tokens have them, shrunk to these answers'.
ECHO = (
    EntropyConfidence(group_window=8, cooldown=8),
    Doubt(decline_run=8, tail_window=16),
)
Variants = dict[str, Callable[[], Cost]]


class Bench:
    """Engines for one model, and questions to it."""

    def __init__(self, options: argparse.Namespace, rows: int) -> None:
        torch.set_num_threads(1)
        self.options, self.rows = options, rows
        self.location = str(model_location(options.model))
        self.model, self.tokenizer = load_model(options.model)
        prompts = load_prompts(QUESTIONS, self.tokenizer, max_tokens=256, suffix=ASK)
        self.prompts = [prompt.tokens for prompt in prompts]
        self.length = max(map(len, self.prompts)) + options.tokens

    def engine(self, eos: list[int]) -> VLLMEngine:
        settings = VLLMOptions(max_model_len=self.length, kv_cache_gib=1.0, block_size=BLOCK)
        return VLLMEngine(self.location, eos, max_rows=self.rows, options=settings)

    def blocking(self) -> Blocking:
        return Blocking(self.location, self.rows, self.length, 1.0, BLOCK)


def rollout(
    engine: VLLMEngine,
    prompts: list[np.ndarray],
    votes: int,
    limit: int,
    rules: tuple[Fork, Prune],
    signals: Signals | None,
    seed: int,
    answer: Callable[[np.ndarray], int] = len,
) -> tuple[Rollout, Cost]:
    """Trees with statistics and all decisions, and what they cost."""
    before, host = engine.work(), Host()
    with host.watch():
        fork, prune = rules
        grown = Rollout(
            engine,
            prompts,
            votes=votes,
            limit=limit,
            sampling=Sampling(),
            fork=fork,
            prune=prune,
            signals=signals,
            seed=seed,
            answer_start=answer,
            on_tokens=host.mark,
        )
        leaves = len(grown.run().leaves())
    if leaves != votes * len(prompts):
        raise RuntimeError(f"expected {votes * len(prompts)} leaves, got {leaves}")
    after = engine.work()
    return grown, Cost(
        leaves=leaves,
        sampled=grown.counts.sampled_tokens,
        computed=after.prompt_tokens
        + after.decode_tokens
        - before.prompt_tokens
        - before.decode_tokens,
        recomputed=after.recomputed_tokens - before.recomputed_tokens,
        host=host.seconds()[1],
        full=host.seconds(1024),
    )


def take_turns(variants: Variants, costs: dict[str, list[Cost]]) -> None:
    """One round."""
    for name, variant in variants.items():
        cpu, wall = time.process_time(), time.perf_counter()
        cost = variant()
        cost.cpu, cost.wall = time.process_time() - cpu, time.perf_counter() - wall
        costs.setdefault(name, []).append(cost)
        print(f"{name}: {cost}", file=sys.stderr, flush=True)


def report(costs: dict[str, list[Cost]]) -> None:
    """Medians over the rounds."""

    def middle(runs: list[Cost], read: Callable[[Cost], float], form: str) -> str:
        value = median(map(read, runs))
        return "" if np.isnan(value) else format(value, form)

    head = ["", "leaves", "sampled", "computed", "again", "s", "CPU s", "tokens/s", "host us/token"]
    rows = [
        [
            name,
            middle(runs, lambda run: run.leaves, ".0f"),
            middle(runs, lambda run: run.sampled, ".0f"),
            middle(runs, lambda run: run.computed, ".0f"),
            middle(runs, lambda run: run.recomputed, ".0f"),
            middle(runs, lambda run: run.wall, ".1f"),
            middle(runs, lambda run: run.cpu, ".1f"),
            middle(runs, lambda run: run.sampled / run.wall, ".0f"),
            middle(runs, lambda run: 1e6 * run.host / run.sampled, ".1f"),
        ]
        for name, runs in costs.items()
    ]
    print(table(head, rows), end="\n\n")


def compare(
    costs: dict[str, list[Cost]], claims: list[tuple[str, str, str, dict[str, float]]]
) -> None:
    """Claims: what, of which variant, over which, and its gate."""
    rows = []
    for what, upper, lower, promise in claims:
        pairs = list(zip(costs[upper], costs[lower], strict=True))
        if what == "sampled tokens":
            wall = ""
            value = median(a.sampled / b.sampled for a, b in pairs)
        else:
            wall = f"{median(a.wall / b.wall for a, b in pairs):.2f}"
            value = median(a.cpu / b.cpu for a, b in pairs)
        verdict = gate(value, **promise) if promise else ""
        rows.append([f"{what}: {upper} / {lower}", f"{value:.2f}", wall, verdict])
    print(
        table(["median of the rounds' ratios", "ratio", "by the clock", "gate"], rows), end="\n\n"
    )


def check(options: argparse.Namespace) -> None:
    """Log-probs and entropies of a few tokens, against transformers."""
    bench = Bench(options, rows=8)
    engine = bench.engine([])
    grown, cost = rollout(engine, bench.prompts[:2], 4, 6, (Flat(), Keep()), None, 0)
    if cost.sampled != 2 * 4 * 6:
        raise RuntimeError(f"expected 48 tokens, got {cost.sampled}")
    largest = 0.0
    for leaf in grown.forest.leaves().tolist():
        path, prompt = grown.forest.path(leaf), bench.prompts[grown.forest.tree_of(leaf)]
        ids = torch.from_numpy(np.concatenate([prompt, path.tokens])).long()[None]
        with torch.no_grad():
            logits_TV = bench.model(ids).logits[0, len(prompt) - 1 : -1].double()
        expected_TV = logits_TV.log_softmax(-1)
        token_T1 = torch.from_numpy(path.tokens).long()[:, None]
        logprob_T = expected_TV.gather(1, token_T1)[:, 0].numpy()
        entropy_T = torch.special.entr(expected_TV.exp()).sum(-1).numpy()
        seen = np.concatenate([path.logprob - logprob_T, path.entropy - entropy_T])
        largest = max(largest, float(np.abs(seen).max()))
    rows = [["nats, 48 tokens", f"{largest:.1e}", gate(largest, most=1e-4)]]
    print(table(["log-prob and entropy, vLLM - transformers", "largest", "gate"], rows), "\n")


def flat(options: argparse.Namespace) -> None:
    bench = Bench(options, rows=64)
    engine, peer = bench.engine([]), bench.blocking()
    costs: dict[str, list[Cost]] = {}
    for i in range(-1, options.rounds):
        prompt = bench.prompts[i % len(bench.prompts)]
        tokens = options.flat_tokens if i >= 0 else 2

        def ours(prompt: np.ndarray = prompt, tokens: int = tokens, seed: int = i) -> Cost:
            return rollout(engine, [prompt], 64, tokens, (Flat(), Keep()), None, seed)[1]

        def theirs(prompt: np.ndarray = prompt, tokens: int = tokens) -> Cost:
            return peer.flat(prompt.tolist(), 64, tokens)

        take_turns({"pyrl, statistics": ours, "LLM.generate": theirs}, costs if i >= 0 else {})
        if any(run.sampled != 64 * tokens for runs in costs.values() for run in runs):
            raise RuntimeError(f"expected {64 * tokens} tokens")
    print(f"64 answers of {options.flat_tokens} tokens, {options.rounds} rounds\n")
    report(costs)
    compare(costs, [("CPU time", "pyrl, statistics", "LLM.generate", {"most": 1.08})])


def tree(options: argparse.Namespace) -> None:
    bench = Bench(options, rows=64)
    engine, peer = bench.engine([bench.tokenizer.eos_token_id]), bench.blocking()
    signals, etmr = make_signals(*ECHO), TopEntropy()
    costs: dict[str, list[Cost]] = {}

    def answer(tokens: np.ndarray) -> int:
        return answer_start(tokens, bench.tokenizer)

    def grow(rules: tuple[Fork, Prune], round: int, shape: Shape) -> Cost:
        observed = signals if rules == ECHO else None
        with shape.record(engine):
            grown, cost = rollout(
                engine, questions(round), LEAVES, options.tokens, rules, observed, round, answer
            )
        leaf_N = grown.forest.leaves()
        shape.length = {leaf: grown.forest.length(leaf) for leaf in leaf_N.tolist()}
        if cost.recomputed > BLOCK * (grown.counts.trunks + grown.counts.siblings):
            raise RuntimeError(f"{cost}: more than a block for each branch was computed again")
        return cost

    def questions(round: int) -> list[np.ndarray]:
        first = options.prompts * round
        return [bench.prompts[(first + i) % len(bench.prompts)] for i in range(options.prompts)]

    # Both sides have read the prompts, and ECHO's thresholds have seen finished samples.
    rollout(engine, bench.prompts, 4, options.tokens, ECHO, signals, 2**32)
    peer.generate([prompt.tolist() for prompt in bench.prompts], [1] * len(bench.prompts))
    for i in range(options.rounds):
        shape = Shape()
        variants: Variants = {
            "flat": lambda i=i: grow((Flat(), Keep()), i, Shape()),
            ONLINE: lambda i=i, shape=shape: grow((etmr, Keep()), i, shape),
            "ETMR, a barrier": lambda shape=shape: with_a_barrier(engine, shape),
            "two calls": lambda shape=shape: peer.tree(shape),
            "two calls, 20 log-probs": lambda shape=shape: peer.tree(shape, 20),
            "ECHO's rules": lambda i=i: grow(ECHO, i, Shape()),
        }
        take_turns(variants, costs)
    print(f"{options.prompts} questions a round, {LEAVES} leaves each, of at most ", end="")
    print(f"{options.tokens} tokens; {options.rounds} rounds\n")
    report(costs)
    claims = [
        ("sampled tokens", ONLINE, "flat", {"most": 0.65}),
        ("CPU time", ONLINE, "flat", {"most": 0.75}),
        ("CPU time", "ETMR, a barrier", ONLINE, {}),
        ("CPU time", "two calls", ONLINE, {"least": 1.15}),
        ("CPU time", "two calls, 20 log-probs", ONLINE, {"least": 1.15}),
        ("CPU time", "ECHO's rules", "flat", {}),
    ]
    compare(costs, claims)


def host(options: argparse.Namespace) -> None:
    """A random model with heads of 32: those of 24, as the packaged model has, vLLM refuses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
        settings = VLLMOptions(max_model_len=128, kv_cache_gib=1.0, block_size=BLOCK)
        engine = VLLMEngine(folder, [], max_rows=1024, options=settings)
    rules: tuple[Fork, Prune] = (EntropyConfidence(), Doubt())
    signals = make_signals(*rules)
    prompts = [np.arange(10, dtype=np.int32) + i % 21 for i in range(64)]
    shares, micros = [], []
    for i in range(-1, options.rounds):
        grown, cost = rollout(engine, prompts, 40, 48, rules, signals, i)
        wall, ours = cost.full
        if i >= 0:
            shares.append(100 * ours / wall)
            micros.append(1e6 * cost.host / cost.sampled)
            print(f"{cost.sampled} tokens, {grown.counts.forks} forks, ", end="")
            print(f"{sum(grown.counts.pruned.values())} pruned; {wall:.1f} s in full steps")
    print()
    rows = [
        [
            "pyrl's code, % of the time of steps with 1024",
            f"{median(shares):.1f}",
            gate(median(shares), most=5),
        ],
        ["pyrl's code in all steps, us per token", f"{median(micros):.1f}", ""],
    ]
    print(table(["1024 branches, ECHO's rules", "median", "gate"], rows), end="\n\n")


def sync(options: argparse.Namespace) -> None:
    bench = Bench(options, rows=8)
    engine = bench.engine([])
    carry = Sync(engine, bench.model, bench.prompts[0])
    loads, whole = [], []
    for version in range(1, 2 + options.rounds):
        start = time.perf_counter()
        engine.load_weights(bench.model.state_dict().items(), version)
        middle = time.perf_counter()
        carry(version)
        loads.append(middle - start)
        whole.append(time.perf_counter() - middle)
    rows = [
        ["load_weights", f"{median(loads[1:]):.2f}", ""],
        ["with digests and probe", f"{median(whole[1:]):.2f}", gate(median(whole[1:]), most=0.6)],
    ]
    print(table([f"sync of {options.model}, one process", "s", "gate"], rows), end="\n\n")


PARTS = {"check": check, "flat": flat, "host": host, "tree": tree, "sync": sync}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="|".join(PARTS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=128, help="limit of a leaf of a tree")
    parser.add_argument("--prompts", type=int, default=2, help="questions in a round of trees")
    parser.add_argument("--flat-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if len(options.parts) == 1:
        print(conditions(), end="\n\n", flush=True)
        PARTS[options.parts[0]](options)
        return
    settings = sys.argv[1:]
    if options.parts != list(PARTS):
        settings = settings[len(options.parts) :]
    for part in options.parts:
        subprocess.run([sys.executable, Path(__file__), part, *settings], check=True)


if __name__ == "__main__":
    main()
