"""Draws the next token of each row of logits, with the statistics that forks and votes read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl import _core
from pyrl._core.logits import Truncation
from pyrl.checks import described
from pyrl.logits.kernels import ELEMENTS, adjacent, check_tensors, device_of, matrix_of
from pyrl.logits.sampling import Exclude, Sampling

DRAWABLE = "logits without NaN or +inf and in each row a finite entry that is not excluded"
"""What rows must be to be drawn from."""

_NONE = Exclude(np.empty(0, np.int32), np.empty(0, np.int64))
"""For the kernels: nobody excludes anything."""

_CHUNK_ELEMENTS = 1 << 23
"""Logits that the torch composition holds in float64 at a time: 64 MiB for each intermediate."""


@dataclass(frozen=True)
class SampledTokens:
    """One token per row, statistics of the untruncated distribution at the temperature."""

    token_B: NDArray[np.int32]
    logprob_B: NDArray[np.float32]
    """Log-prob of the drawn token (nats)."""
    truncated_logprob_B: NDArray[np.float32]
    """Log-prob of the drawn token in what truncation leaves (nats); 0 when greedy."""
    entropy_B: NDArray[np.float32]
    """Over the whole vocabulary (nats)."""
    confidence_B: NDArray[np.float32]
    """Mass of the five most probable tokens, in (0, 1]."""
    rest_logprob_B: NDArray[np.float32]
    """Log of the mass of all tokens that could have been drawn in its place, those that are kept by
    truncation, not excluded and not drawn, in the distribution of `truncated_logprob_B` (nats).
    -inf if there are none, and when greedy."""


def sample_tokens(
    logits_BV: Tensor,
    seed_B: NDArray[np.uint64],
    position_B: NDArray[np.int64],
    sampling: Sampling,
    exclude: Exclude | None = None,
) -> SampledTokens:
    """Draw one token per row; a draw depends on its row's logits, seed and position alone.

    The uniform number of a draw is Philox4x32-10 keyed by the seed at the position, and the token
    is its inverse distribution function in vocabulary order. Truncation: temperature, min-p,
    top-k, top-p, each renormalised, and top-h, ties to the lower id. Temperature 0 takes the most
    probable token and reports statistics at temperature 1. Columns that are not adjacent are copied
    first.

    `exclude`: tokens that rows may not draw. They leave what truncation has kept, and the token is
    drawn from the rest, renormalised; all statistics stay those of the distribution with them.

    On the CPU a row is read twice and nothing is sorted; float32, bfloat16 and float16 logits give
    the same draws on every instruction set and number of threads. float64 logits go through the C
    library's exponential, whose last bit may differ between machines.

    Logits on a CUDA device are sampled there from the same uniform numbers, by a kernel, or by a
    composition of torch functions in float64 where the core was built without CUDA; the draws
    differ from the CPU's only where rounding (relative 1e-7) moves the boundary between two tokens
    across the uniform number.

    Raises TypeError for arguments of wrong types, ValueError for wrong shapes, dtypes, devices or
    token ids, and FloatingPointError for rows with NaN or +inf or without a token to draw (-inf
    masks one, and so does, on the CPU, a probability below 2^-127 of the largest one).
    """
    sampled = draw_tokens(logits_BV, seed_B, position_B, sampling, exclude)
    broken = np.flatnonzero(sampled.token_B < 0)
    if broken.size:
        raise FloatingPointError(
            f"sample_tokens: expected {DRAWABLE}, "
            f"got {broken.size} of {len(seed_B)} rows that are not: {broken[:8].tolist()}"
        )
    return sampled


def draw_tokens(
    logits_BV: Tensor,
    seed_B: NDArray[np.uint64],
    position_B: NDArray[np.int64],
    sampling: Sampling,
    exclude: Exclude | None = None,
) -> SampledTokens:
    """`sample_tokens`, but a row that cannot be drawn has token -1 in place of the exception."""
    _check(logits_BV, seed_B, position_B, sampling, exclude)
    if logits_BV.device.type == "cpu":
        draw = _sample_kernel
    else:
        draw = sample_rows if _core.build_info()["cuda"] else sample_tokens_composed
    return draw(logits_BV.detach(), seed_B, position_B, sampling, exclude)


def _check(
    logits_BV: Tensor,
    seed_B: NDArray[np.uint64],
    position_B: NDArray[np.int64],
    sampling: Sampling,
    exclude: Exclude | None,
) -> None:
    check_tensors(logits_BV=logits_BV)
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling: expected a Sampling, got {described(sampling)}")
    if logits_BV.ndim != 2 or logits_BV.shape[1] == 0:
        raise ValueError(f"logits_BV: expected shape [B, V >= 1], got {tuple(logits_BV.shape)}")
    if logits_BV.dtype not in ELEMENTS:
        raise ValueError(f"logits_BV: expected one of {list(ELEMENTS)}, got {logits_BV.dtype}")
    if logits_BV.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits_BV: expected a CPU or CUDA tensor, got {logits_BV.device}")
    for name, values, dtype in (
        ("seed_B", seed_B, np.uint64),
        ("position_B", position_B, np.int64),
    ):
        if not isinstance(values, np.ndarray):
            raise TypeError(f"{name}: expected a numpy array, got {described(values)}")
        if values.shape != logits_BV.shape[:1] or values.dtype != dtype:
            raise ValueError(
                f"{name}: expected {np.dtype(dtype).name}[{logits_BV.shape[0]}], "
                f"got {values.dtype}{list(values.shape)}"
            )
    if exclude is not None:
        if not isinstance(exclude, Exclude):
            raise TypeError(f"exclude: expected an Exclude or None, got {described(exclude)}")
        exclude.check(*logits_BV.shape)


def _sample_kernel(
    logits_BV: Tensor,
    seed_B: NDArray[np.uint64],
    position_B: NDArray[np.int64],
    sampling: Sampling,
    exclude: Exclude | None,
) -> SampledTokens:
    logits_BV = adjacent(logits_BV)
    excluded = exclude or _NONE
    return SampledTokens(
        *_core.logits.sample_tokens(
            logits=matrix_of(logits_BV),
            seed_B=np.ascontiguousarray(seed_B),
            position_B=np.ascontiguousarray(position_B),
            truncation=_truncation(sampling),
            exclude_E=np.ascontiguousarray(excluded.token_E),
            exclude_offset_B1=np.ascontiguousarray(excluded.offset_B1),
            threads=torch.get_num_threads(),
        )
    )


@lru_cache
def _truncation(sampling: Sampling) -> Truncation:
    return Truncation(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_h=sampling.top_h,
    )


def sample_rows(
    logits_BV: Tensor,
    seed_B: NDArray[np.uint64],
    position_B: NDArray[np.int64],
    sampling: Sampling,
    exclude: Exclude | None = None,
) -> SampledTokens:
    """The draws of the CUDA kernel (device_sample.h); a row that cannot be drawn has token -1."""
    logits_BV = adjacent(logits_BV)
    uniforms = _core.logits.uniforms(np.ascontiguousarray(seed_B), np.ascontiguousarray(position_B))
    uniform_B = torch.from_numpy(uniforms).to(logits_BV.device)
    columns_KB = uniform_B.new_empty(6, len(uniform_B))
    excluded = exclude or _NONE
    exclude_E = torch.from_numpy(excluded.token_E).to(logits_BV.device)
    offset_B1 = torch.from_numpy(excluded.offset_B1).to(logits_BV.device)
    _core.logits.sample_rows(
        logits=matrix_of(logits_BV),
        uniform=uniform_B.data_ptr(),
        truncation=_truncation(sampling),
        exclude=exclude_E.data_ptr(),
        exclude_offset=offset_B1.data_ptr(),
        out=columns_KB.data_ptr(),
        **device_of(logits_BV),
    )
    return _columns(columns_KB)


def sample_tokens_composed(
    logits_BV: Tensor,
    seed_B: NDArray[np.uint64],
    position_B: NDArray[np.int64],
    sampling: Sampling,
    exclude: Exclude | None = None,
) -> SampledTokens:
    """The kernel's draws from torch functions, on any device, some rows at a time in float64.

    A row that cannot be drawn has token -1.
    """
    uniforms = _core.logits.uniforms(np.ascontiguousarray(seed_B), np.ascontiguousarray(position_B))
    uniform_B = torch.from_numpy(uniforms).to(logits_BV.device)
    rows = max(1, _CHUNK_ELEMENTS // logits_BV.shape[1])
    parts = []
    for begin in range(0, max(1, len(uniform_B)), rows):
        logits = logits_BV[begin : begin + rows].double()
        excluded_BV = _excluded(exclude, begin, logits)
        parts.append(_compose(logits, uniform_B[begin : begin + rows], sampling, excluded_BV))
    return _columns(torch.cat(parts, dim=1))


def _excluded(exclude: Exclude | None, begin: int, logits_BV: Tensor) -> Tensor:
    """Whether each row, of those from `begin` on, may not draw each token."""
    excluded_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    if exclude is not None:
        offset_B1 = torch.from_numpy(exclude.offset_B1[begin : begin + len(logits_BV) + 1])
        token_E = torch.from_numpy(exclude.token_E[offset_B1[0] : offset_B1[-1]])
        row_E = torch.repeat_interleave(offset_B1.diff())
        excluded_BV[row_E.to(logits_BV.device), token_E.to(logits_BV.device)] = True
    return excluded_BV


def _columns(columns_KB: Tensor) -> SampledTokens:
    columns = columns_KB.cpu().numpy()
    return SampledTokens(columns[0].astype(np.int32), *columns[1:].astype(np.float32))


def _compose(
    logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling, excluded_BV: Tensor
) -> Tensor:
    """The fields of `SampledTokens` as the rows of one float64 tensor."""
    logprob_BV = (logits_BV / (sampling.temperature or 1.0)).log_softmax(dim=1)
    probability_BV = logprob_BV.exp()
    if sampling.temperature == 0:
        largest_B, token_B = logprob_BV.masked_fill(excluded_BV, -math.inf).max(dim=1)
        drawable_B = largest_B > -math.inf
        chosen_B = log_kept_B = largest_B
        rest_B = torch.zeros_like(chosen_B)
    else:
        weight_BV = _truncate(probability_BV, sampling)
        log_kept_B = weight_BV.sum(dim=1).log()
        weight_BV = weight_BV.masked_fill(excluded_BV, 0.0)
        cumulative_BV = weight_BV.cumsum(dim=1)
        drawable_B = cumulative_BV[:, -1] > 0
        target_B = uniform_B * cumulative_BV[:, -1]
        token_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
        index_V = torch.arange(weight_BV.shape[1], device=weight_BV.device)
        last_B = torch.where(weight_BV > 0, index_V, 0).amax(dim=1)
        token_B = torch.minimum(token_B, last_B)
        chosen_B = logprob_BV.gather(1, token_B[:, None])[:, 0]
        rest_B = weight_BV.scatter(1, token_B[:, None], 0.0).sum(dim=1)
    truncated_B, rest_logprob_B = chosen_B - log_kept_B, rest_B.log() - log_kept_B
    entropy_B = torch.special.entr(probability_BV).sum(dim=1)
    top_BK = probability_BV.topk(min(5, probability_BV.shape[1]), dim=1).values
    confidence_B = top_BK.sum(dim=1).clamp(max=1)
    token_B = torch.where(drawable_B, token_B, -1)  # NaN is not above a number
    return torch.stack(
        [token_B.double(), chosen_B, truncated_B, entropy_B, confidence_B, rest_logprob_B]
    )


def _truncate(probability_BV: Tensor, sampling: Sampling) -> Tensor:
    """Weights of the kept tokens, 0 elsewhere."""
    if sampling == Sampling(sampling.temperature):
        return probability_BV
    # Stable: equal probabilities stay in the order of their ids.
    sorted_BV, order_BV = probability_BV.sort(dim=1, descending=True, stable=True)
    sorted_BV = sorted_BV.where(sorted_BV >= sampling.min_p * sorted_BV[:, :1], 0.0)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1:
        before_BV = sorted_BV.cumsum(dim=1) - sorted_BV
        mass_B1 = sorted_BV.sum(dim=1, keepdim=True)
        sorted_BV = sorted_BV.where(before_BV < sampling.top_p * mass_B1, 0.0)
    if sampling.top_h < 1:
        mass_BV, moment_BV = sorted_BV.cumsum(dim=1), torch.special.entr(sorted_BV).cumsum(dim=1)
        most_B1 = sampling.top_h * torch.special.entr(probability_BV).sum(dim=1, keepdim=True)
        sorted_BV = sorted_BV.where(moment_BV / mass_BV + mass_BV.log() <= most_B1, 0.0)
    return torch.zeros_like(probability_BV).scatter_(1, order_BV, sorted_BV)
