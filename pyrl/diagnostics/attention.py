"""How widely each head attends: the first sign of a model that breaks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.attention import plain_attention
from pyrl.pack import TokenBatch

ROWS = 4
"""Responses that are read, the first ones of the step."""


def row_entropy(weight_HQK: Tensor) -> Tensor:
    """Entropy of the keys of each query over the logarithm of how many it may see, [H, Q - 1].

    Query q sees q + 1 keys; the first one has no choice.
    """
    entropy_HQ: Tensor = torch.special.entr(weight_HQK.double()).sum(dim=-1)
    keys_Q = torch.arange(1, weight_HQK.shape[-1] + 1, device=weight_HQK.device)
    return entropy_HQ[:, 1:] / keys_Q[1:].double().log()


def attention_entropy(model: PreTrainedModel, batch: TokenBatch) -> dict[str, float]:
    """The mean of `row_entropy` of each head, 0 (one key) to 1 (all keys alike), and what they
    come to; entropy collapse and overload: arXiv:2501.03489.

    Attention is computed as the model's own code does, with its weights in memory.
    """
    sums, queries = [], 0
    with torch.no_grad(), plain_attention(model):
        for begin, end in pairwise(batch.input_offset_N1[: ROWS + 1].tolist()):
            inputs = torch.from_numpy(batch.input_I[begin:end])[None].to(model.device)
            weights = model(input_ids=inputs, use_cache=False, output_attentions=True).attentions
            sums.append([row_entropy(layer[0]).sum(dim=1).cpu().numpy() for layer in weights])
            queries += end - begin - 1
    mean_LH = np.sum(sums, axis=0) / max(1, queries)
    heads = {
        f"attention_entropy/{layer}/{head}": float(value)
        for (layer, head), value in np.ndenumerate(mean_LH)
    }
    return heads | {
        "diagnostics/attention_entropy": float(mean_LH.mean()),
        "diagnostics/attention_entropy_least": float(mean_LH.min()),
        "diagnostics/attention_entropy_most": float(mean_LH.max()),
    }
