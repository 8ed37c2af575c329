"""vLLM's CPU build, sampling on request for bench_rollout.py; run by the interpreter that has it.

Reads one line of JSON with the settings, then a line for each round; answers each with a line of
JSON: {} when the engine is ready, later the seconds of CPU time and of the day.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whose CPU time is measured
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to stdout too
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(settings["threads"]))
    from vllm import LLM, SamplingParams  # reads the environment when it is imported

    engine = LLM(
        model=settings["model"],
        dtype="float32",
        enforce_eager=settings["eager"],
        max_model_len=len(settings["prompt"]) + settings["tokens"],
        max_num_seqs=settings["samples"],
    )
    sampling = SamplingParams(
        temperature=1.0, max_tokens=settings["tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": settings["prompt"]}] * settings["samples"]
    engine.generate(prompts, sampling, use_tqdm=False)
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.process_time(), time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.process_time() - start[0], time.perf_counter() - start[1]
        drawn = sum(len(output.outputs[0].token_ids) for output in outputs)
        if drawn != settings["samples"] * settings["tokens"]:
            raise RuntimeError(f"vLLM drew {drawn} tokens")
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
