"""Rows: the host's padded rows of tokens as batches of pyrl's, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.learner.reader import Reader
from pyrl.pack import TokenBatch, pack_given


def read_rows(
    reader: Reader,
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [N, T] of the last `keep` tokens of rows [N, I], read as trees; 0 where
    a token is masked. Both are differentiable."""
    mask_NI, id_NI = attention_mask.bool().cpu().numpy(), input_ids.cpu().numpy()
    mask_NT, id_NT = mask_NI[:, -keep:], id_NI[:, -keep:]
    start = id_NI.shape[1] - keep
    row_N = np.flatnonzero(mask_NT.any(axis=1))
    batch = pack_given(
        [id_NI[n, :start][mask_NI[n, :start]] for n in row_N],
        [id_NT[n][mask_NT[n]] for n in row_N],
    )
    logprob_NT, entropy_NT = torch.zeros(2, *id_NT.shape, device=input_ids.device)
    for leaf_N in reader.passes(batch):
        stats = reader(model, batch.take(leaf_N))
        ordinal_T, column_T = np.nonzero(mask_NT[row_N[leaf_N]])
        place = torch.from_numpy(row_N[leaf_N][ordinal_T]), torch.from_numpy(column_T)
        logprob_NT = logprob_NT.index_put(place, stats.logprob.to(logprob_NT))
        entropy_NT = entropy_NT.index_put(place, stats.entropy.to(entropy_NT))
    return logprob_NT, entropy_NT


def weighed(of_all: Tensor, weights: Tensor, rank: int, rows: int) -> NDArray[np.float64]:
    """The reward [N] of a process's rows: the weighted sum of what functions gave, NaN for none."""
    own = of_all[rank * rows : (rank + 1) * rows].double()
    reward_N = (own * weights.to(own)).nansum(dim=1)
    reward_N[own.isnan().all(dim=1)] = torch.nan
    found: NDArray[np.float64] = reward_N.cpu().numpy()
    return found


def put_advantages(output: dict[str, Any], batch: TokenBatch) -> None:
    """The advantage of each token [N, T] into the host's rows, and which of them do not train."""
    mask = output["completion_mask"]
    output["advantages"] = _padded(batch, batch.advantage_T.astype(np.float32), mask)
    if not batch.mask_T.all():
        output["tool_mask"] = _padded(batch, batch.mask_T.astype(np.int64), mask)


def _padded(batch: TokenBatch, value_T: NDArray[Any], mask: Tensor) -> Tensor:
    column_T = np.arange(len(value_T)) - batch.token_offset_N1[:-1][batch.leaf_T]
    value_NT = np.zeros(mask.shape, value_T.dtype)
    value_NT[batch.leaf_T, column_T] = value_T
    return torch.from_numpy(value_NT).to(mask.device)
