"""Drives an engine through a rollout and checks what it says against fresh forwards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pyrl.engine import RUNNING, Branches
from pyrl.engine.hf import HFEngine
from pyrl.logits.sampling import Sampling

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
PROMPTS = [np.array(p, np.int32) for p in ([5, 6, 7, 8, 9], [10, 11], [12], [13, 14, 15, 16, 17])]
EOS = 3


def llama(dtype: torch.dtype = torch.float64, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | more)).to(dtype)


def qwen2(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(dtype)


def mistral(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Sees 6 tokens back, fewer than a prompt and its response have."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)).to(dtype)


def gemma3(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Layers with a window of 4, and others without one."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, layer_types=kinds)
    return Gemma3ForCausalLM(config).to(dtype)


@dataclass
class Trace:
    """What a driver has seen of one branch; a fork starts with what it shares."""

    prompt: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    rests: list[float] = field(default_factory=list)
    finish: int = RUNNING
    excluded: dict[int, list[int]] = field(default_factory=dict)
    """Tokens that were not to be drawn, by position."""

    def shared(self, keep: int, exclude: Sequence[int]) -> "Trace":
        lists = (self.tokens, self.logprobs, self.entropies, self.rests)
        before = {at: tokens for at, tokens in self.excluded.items() if at < keep}
        excluded = before | {keep: list(exclude)}
        return Trace(self.prompt, *(values[:keep] for values in lists), excluded=excluded)


class Driver:
    """Records every branch of an engine."""

    def __init__(self, engine: HFEngine, temperature: float = 1.0) -> None:
        self.engine = engine
        self.traces: dict[int, Trace] = {}
        engine.start(Sampling(temperature=temperature))

    def submit(
        self,
        prompt_B: list[int],
        *,
        limit: int | list[int] = 8,
        seed_B: Iterable[int] | None = None,
        retain: bool = False,
    ) -> list[int]:
        ids = [len(self.traces) + b for b in range(len(prompt_B))]
        self.engine.submit(
            Branches(
                PROMPTS,
                np.array(prompt_B, np.int64),
                np.array(ids, np.int64),
                np.array(ids if seed_B is None else seed_B, np.uint64),
                np.broadcast_to(np.array(limit, np.int64), len(ids)),
                retain,
            )
        )
        self.traces |= {b: Trace(PROMPTS[p]) for b, p in zip(ids, prompt_B, strict=True)}
        return ids

    def fork(
        self,
        parent: int,
        keep: int,
        count: int = 1,
        seed: int = 100,
        exclude: Sequence[int] = (),
    ) -> list[int]:
        ids = [len(self.traces) + b for b in range(count)]
        seed_B = np.arange(seed, seed + count).astype(np.uint64)
        self.engine.fork(parent, keep, np.array(ids), seed_B, np.array(exclude, np.int32))
        self.traces |= {b: self.traces[parent].shared(keep, exclude) for b in ids}
        return ids

    def abort(self, *branches: int) -> None:
        self.engine.abort(np.array(branches))

    def step(self, count: int = 1) -> list[int]:
        for _ in range(count):
            sampled = self.engine.step()
            columns = (
                sampled.branch_B,
                sampled.token_B,
                sampled.logprob_B,
                sampled.entropy_B,
                sampled.rest_logprob_B,
                sampled.finish_B,
            )
            for branch, token, logprob, entropy, rest, finish in zip(*columns, strict=True):
                trace = self.traces[int(branch)]
                trace.tokens.append(int(token))
                trace.logprobs.append(float(logprob))
                trace.entropies.append(float(entropy))
                trace.rests.append(float(rest))
                trace.finish = int(finish)
        return sampled.branch_B.tolist()

    def finish(self) -> None:
        while self.step():
            pass


def assert_as_a_fresh_forward(
    driver: Driver, model: PreTrainedModel, temperature: float = 1.0, tolerance: float = 2e-6
) -> None:
    """Every recorded number equals that of one forward over the whole path, nothing cached."""
    assert driver.traces
    for trace in driver.traces.values():
        if not trace.tokens:
            continue
        path = torch.tensor([*trace.prompt.tolist(), *trace.tokens])
        with torch.no_grad():
            logits = model(input_ids=path[None], use_cache=False).logits[0].double()
        logp = (logits[len(trace.prompt) - 1 : -1] / temperature).log_softmax(-1)
        chosen = logp[torch.arange(len(trace.tokens)), trace.tokens]
        np.testing.assert_allclose(trace.logprobs, chosen, rtol=tolerance, atol=tolerance)
        entropy = -(logp.exp() * logp).sum(-1)
        np.testing.assert_allclose(trace.entropies, entropy, rtol=tolerance, atol=tolerance)
        for at, tokens in trace.excluded.items():
            assert trace.tokens[at] not in tokens
            logp[at, tokens] = -torch.inf
        logp[torch.arange(len(trace.tokens)), trace.tokens] = -torch.inf
        np.testing.assert_allclose(trace.rests, logp.logsumexp(-1), rtol=tolerance, atol=tolerance)
