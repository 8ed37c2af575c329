"""Logits of a language-model head a chunk of tokens at a time, and the head's gradient from them.

All GEMMs are torch's. One buffer holds a chunk's logits, then its dlogits: a fresh one for each
chunk would cost more in page faults than the row kernels take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrl.logits.kernels import ELEMENTS

LEAST_CHUNK = 128
USUAL_CHUNK = {"cpu": 256, "cuda": 4096}
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Memory of a chunk's logits, for a chunk above the least."""

SLICE = 4096
"""Rows of a half-precision weight whose gradient is computed at a time."""


def chunk_rows(tokens: int, vocabulary: int, width: int, itemsize: int, device: str) -> int:
    """Tokens in a chunk: enough that adding to the weight's gradient costs little, but bounded.

    A chunk of C tokens moves 8 V H bytes of the gradient's accumulator beside GEMMs of 6 C V H
    operations, so C alone decides what the additions cost: 256 on a CPU core (about 5 %), 4096 on
    a GPU, and at least H / 4; less where the logits would take more than 256 MiB (2 GiB on a GPU),
    but never below 128. The tokens are spread evenly over the chunks.
    """
    wanted = max(USUAL_CHUNK[device], width // 4)
    affordable = CHUNK_BYTES[device] // (vocabulary * itemsize)
    most = max(LEAST_CHUNK, min(wanted, affordable))
    return max(1, math.ceil(tokens / max(1, math.ceil(tokens / most))))


@dataclass(frozen=True)
class Head:
    """hidden @ weight.T + bias."""

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    chunk: int

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """The tokens of each chunk and their logits, in a buffer that the next chunk overwrites.

        In the dtype of the arguments, since autocast leaves products with `out` alone: the backward
        pass must find the logits of the forward pass again. Rows begin at multiples of 16 bytes.
        """
        tokens, vocabulary = self.hidden_TH.shape[0], self.weight_VH.shape[0]
        row = -(-vocabulary * self.hidden_TH.element_size() // 16) * 16
        shape = min(self.chunk, tokens), row // self.hidden_TH.element_size()
        padded = self.hidden_TH.new_empty(shape)
        # torch's bfloat16 product on the CPU multiplies the padding of an odd row by 0.
        padded[:, vocabulary:] = 0
        buffer_CV = padded[:, :vocabulary]
        for begin in range(0, tokens, self.chunk):
            part = slice(begin, min(begin + self.chunk, tokens))
            logits_CV = buffer_CV[: part.stop - begin]
            if self.bias_V is None:
                torch.mm(self.hidden_TH[part], self.weight_VH.T, out=logits_CV)
            else:
                torch.addmm(self.bias_V, self.hidden_TH[part], self.weight_VH.T, out=logits_CV)
            yield part, logits_CV

    def check(self) -> None:
        """ValueError unless shapes, dtypes and devices belong together."""
        hidden_TH, weight_VH, bias_V = self.hidden_TH, self.weight_VH, self.bias_V
        if hidden_TH.ndim != 2 or weight_VH.ndim != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
            raise ValueError(
                "hidden_TH, weight_VH: expected [T, H] and [V, H], "
                f"got {tuple(hidden_TH.shape)} and {tuple(weight_VH.shape)}"
            )
        if weight_VH.shape[0] == 0:
            raise ValueError("weight_VH: expected at least one row, got 0")
        if hidden_TH.dtype not in ELEMENTS:
            raise ValueError(f"hidden_TH: expected one of {list(ELEMENTS)}, got {hidden_TH.dtype}")
        if hidden_TH.device.type not in USUAL_CHUNK:
            raise ValueError(f"hidden_TH: expected a CPU or CUDA tensor, got {hidden_TH.device}")
        if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
            raise ValueError(f"bias: expected [{weight_VH.shape[0]}], got {tuple(bias_V.shape)}")
        for name, tensor in (("weight_VH", weight_VH), ("bias", bias_V)):
            like = (hidden_TH.dtype, hidden_TH.device)
            if tensor is not None and (tensor.dtype, tensor.device) != like:
                raise ValueError(
                    f"{name}: expected {hidden_TH.dtype} on {hidden_TH.device} like hidden_TH, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
        if self.chunk < 1:
            raise ValueError(f"chunk: expected >= 1, got {self.chunk}")


class HeadGradient:
    """Gradients of the inputs that require one, summed over chunks in at least float32."""

    def __init__(self, head: Head, hidden: bool, weight: bool, bias: bool) -> None:
        self.head = head
        self.wide = torch.promote_types(head.hidden_TH.dtype, torch.float32)
        self.hidden_TH = torch.empty_like(head.hidden_TH) if hidden else None
        self.weight_VH = self._sum_like(head.weight_VH) if weight else None
        self.bias_V = self._sum_like(head.bias_V) if bias and head.bias_V is not None else None

    def _sum_like(self, tensor: Tensor) -> Tensor:
        """The first chunk does not read it: zeros would be one more pass over the weight."""
        no_chunk = self.head.hidden_TH.shape[0] == 0
        return (torch.zeros_like if no_chunk else torch.empty_like)(tensor, dtype=self.wide)

    def add(self, part: slice, dlogits_CV: Tensor) -> None:
        """Add the gradients of one chunk; the chunks come in order."""
        keep = 0 if part.start == 0 else 1
        if self.hidden_TH is not None:
            torch.mm(dlogits_CV, self.head.weight_VH, out=self.hidden_TH[part])
        if self.weight_VH is not None:
            _add_product(self.weight_VH, keep, dlogits_CV, self.head.hidden_TH[part])
        if self.bias_V is not None:
            part_V = dlogits_CV.sum(dim=0, dtype=self.wide)
            self.bias_V.copy_(part_V) if keep == 0 else self.bias_V.add_(part_V)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight and bias in their dtype; empty if not asked for."""
        like = self.head.hidden_TH
        hidden, weight, bias = (
            like.new_empty(0) if gradient is None else gradient.to(like.dtype)
            for gradient in (self.hidden_TH, self.weight_VH, self.bias_V)
        )
        return hidden, weight, bias


def _add_product(sum_VH: Tensor, keep: int, dlogits_CV: Tensor, hidden_CH: Tensor) -> None:
    """keep sum + dlogits.T @ hidden: a half-precision GEMM would round it in each chunk."""
    if dlogits_CV.dtype == sum_VH.dtype:
        sum_VH.addmm_(dlogits_CV.T, hidden_CH, beta=keep)
        return
    hidden_CH = hidden_CH.to(sum_VH.dtype)
    for begin in range(0, sum_VH.shape[0], SLICE):
        rows = slice(begin, begin + SLICE)
        dlogits_VC = dlogits_CV[:, rows].to(sum_VH.dtype).T
        sum_VH[rows].addmm_(dlogits_VC, hidden_CH, beta=keep)
