"""Philox: the core's random numbers (csrc/base/random.h), on the device of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def uniforms(seed: int, position_T: Tensor) -> Tensor:
    """Numbers in [0, 1), each a function of the seed and a position >= 0: Philox4x32-10.

    A product of two 32-bit words wraps around in int64, whose bits are then those that are meant.
    """
    c0, c1 = position_T & _WORD, position_T >> 32
    c2 = c3 = torch.zeros_like(position_T)
    for turn in range(10):
        key0 = (seed + turn * 0x9E3779B9) & _WORD
        key1 = ((seed >> 32) + turn * 0xBB67AE85) & _WORD
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ key0, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ key1, first & _WORD
    return (c0 << 21 | c1 >> 11).double() * 2.0**-53
