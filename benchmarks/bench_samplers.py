"""Tokens per second of a sampler beside the same vLLM in this process, and in one of its own.

    python benchmarks/bench_samplers.py [--model M] [--rows B] [--tokens T] [--rounds R]

Run it by an interpreter that has vLLM and pyrl. It starts the sampler, at this machine. All three
sample the same answers of equal length by the same seeds, in turns, and their tokens are compared.
CPU time is that of this process and of all that it started.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPException
from statistics import median

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import psutil
import torch
from measure import conditions

from pyrl.engine import Branches
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.engine.vllm.served import ServedEngine
from pyrl.engine.vllm.wire import model_shape
from pyrl.logits.sampling import Sampling
from pyrl.models import load_model, model_location


def cpu() -> float:
    """Seconds of this process and of all that it started."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def sample(engine: VLLMEngine, rows: int, tokens: int, seed: int) -> tuple[float, np.ndarray]:
    """Seconds, and the tokens [B, T]."""
    branch_B = np.arange(rows)
    started = time.perf_counter()
    engine.start(Sampling())
    prompts = [np.arange(10, 60, dtype=np.int32)]
    seed_B = (branch_B + seed).astype(np.uint64)
    limit_B = np.full(rows, tokens)
    engine.submit(Branches(prompts, np.zeros(rows, np.int64), branch_B, seed_B, limit_B))
    drawn: list[list[int]] = [[] for _ in range(rows)]
    while len((sampled := engine.step()).branch_B):
        for branch, token in zip(sampled.branch_B.tolist(), sampled.token_B.tolist(), strict=True):
            drawn[branch].append(token)
    return time.perf_counter() - started, np.array(drawn)


def started(model: str, rows: int) -> tuple[subprocess.Popen[bytes], str]:
    """A sampler that answers, and where."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    words = ["--model", model, "--port", str(port), "--max-rows", str(rows)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pyrl", "sampler", *words, "--vllm.kv-cache-gib", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return process, f"http://127.0.0.1:{port}"
        except (OSError, HTTPException):
            time.sleep(0.5)
        finally:
            connection.close()
    raise RuntimeError("the sampler has ended; `pyrl sampler` says why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    process, url = started(str(model_location(options.model)), options.rows)
    try:
        measure(options, url)
    finally:
        process.terminate()
        process.wait()


def measure(options: argparse.Namespace, url: str) -> None:
    location = str(model_location(options.model))
    model, _ = load_model(options.model)
    shape = model_shape(model.config.get_text_config())

    def here(own_process: bool) -> VLLMEngine:
        settings = VLLMOptions(own_process=own_process, kv_cache_gib=1.0)
        return VLLMEngine(location, [], max_rows=options.rows, options=settings)

    engines = {
        "in this process": here(False),
        "in a process of its own": here(True),
        "a sampler": ServedEngine(shape, [], VLLMOptions(sampler=(url,))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    of_cpu: dict[str, list[float]] = {name: [] for name in engines}
    for version, engine in enumerate(engines.values(), 1):
        began = time.perf_counter()
        engine.load_weights(model.state_dict().items(), version)
        print(f"weights: {time.perf_counter() - began:.2f} s")
    for turn in range(options.rounds + 1):  # the first warms up
        tokens = []
        for name, engine in engines.items():
            before = cpu()
            took, drawn = sample(engine, options.rows, options.tokens, 1000 * turn)
            tokens.append(drawn)
            if turn:
                seconds[name].append(took)
                of_cpu[name].append(cpu() - before)
        differ = [int((drawn != tokens[0]).any(1).sum()) for drawn in tokens]
        print(f"answers that differ from those of the first: {differ}", flush=True)
    total = options.rows * options.tokens
    for name, took in seconds.items():
        used = 1000 * median(of_cpu[name]) / total
        print(f"{name}: {total / median(took):.0f} tokens/s, {used:.2f} ms of CPU time a token")
        engines[name].close()
    print(conditions())


if __name__ == "__main__":
    main()
