"""The demo model as a rollout's engine, and its prompts."""

from functools import cache

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.engine.hf import HFEngine
from pyrl.models import load_model
from pyrl.prompts import load_prompts


@cache
def demo() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model("demo")


def demo_engine(max_rows: int = 64, dtype: torch.dtype = torch.float32) -> HFEngine:
    model, tokenizer = demo()
    return HFEngine(model.to(dtype), [tokenizer.eos_token_id], max_rows=max_rows)


def demo_prompts(count: int) -> list[np.ndarray]:
    return [p.tokens for p in load_prompts("demo:train", demo()[1], max_tokens=64)[:count]]
