"""A Llama that vLLM's CPU attention takes (heads of 32 numbers), in vLLM and as it is."""

from pathlib import Path

import numpy as np
import torch
from driven_engine import EOS, SHAPE, Driver
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyrl.engine.hf import HFEngine
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.options import VLLMOptions

HEADS = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small_llama(seed: int = 0, **more: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | HEADS | more)).eval()


def assert_same(ours: Driver, reference: Driver) -> None:
    assert ours.traces.keys() == reference.traces.keys()
    for branch, trace in ours.traces.items():
        expected = reference.traces[branch]
        assert (trace.tokens, trace.finish) == (expected.tokens, expected.finish), branch
        np.testing.assert_allclose(trace.logprobs, expected.logprobs, atol=1e-4)
        np.testing.assert_allclose(trace.entropies, expected.entropies, atol=1e-4)
        np.testing.assert_allclose(trace.rests, expected.rests, atol=1e-4)


class Small:
    """An engine of vLLM and the reference over the same weights."""

    def __init__(
        self, model: PreTrainedModel, folder: Path, max_rows: int = 64, **options: object
    ) -> None:
        model.save_pretrained(folder)
        self.model, self.folder = model, folder
        settings = VLLMOptions(**{"kv_cache_gib": 0.25} | options)
        self.engine = VLLMEngine(str(folder), [EOS], max_rows=max_rows, options=settings)

    def drivers(self, temperature: float = 1.0) -> tuple[Driver, Driver]:
        """Of vLLM and of the reference."""
        reference = HFEngine(self.model, [EOS])
        return Driver(self.engine, temperature), Driver(reference, temperature)

    def long_seed(self, prompt: int, length: int) -> int:
        """A seed with which the response to one of PROMPTS has at least that many tokens."""
        driver = Driver(HFEngine(self.model, [EOS]))
        driver.submit([prompt] * 100, limit=length)
        driver.finish()
        return next(b for b, trace in driver.traces.items() if len(trace.tokens) == length)

    def clear(self, driver: Driver) -> None:
        """Forget what a test has retained or left running."""
        driver.abort(*self.engine._known)
