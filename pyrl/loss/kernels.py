"""The policy-loss kernels of the core, called with torch tensors: csrc/loss/policy_loss.h."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl import _core
from pyrl._core.loss import PolicyLossTotals
from pyrl.logits.kernels import column_addresses, device_of
from pyrl.loss.spec import LossSpec


def host_array(tensor: Tensor) -> NDArray[Any]:
    """Contiguous: the tensor's own memory where it can be, else a copy."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def has_kernel(device: torch.device) -> bool:
    """A CUDA device in a build with CUDA kernels. Elsewhere the CPU computes, from copies."""
    return device.type == "cuda" and _core.build_info()["cuda"] is not None


@dataclass(frozen=True)
class PolicyInputs:
    """What the kernels read, T tokens in N responses."""

    columns: Mapping[str, Tensor | None]
    """[T] by the names of TOKEN_COLUMNS and in their order, float32 or float64 each."""
    mask: Tensor | None
    """bool [T]"""
    offset: Tensor
    """int64 [N + 1]"""
    weight: Tensor
    """float64 [N]"""
    spec: LossSpec

    @property
    def logprob(self) -> Tensor:
        logprob = self.columns["logprob"]
        assert logprob is not None
        return logprob

    def responses(self) -> dict[str, Any]:
        """What the host reads, as the kernels take it."""
        return {"offset_N1": host_array(self.offset), "weight_N": host_array(self.weight)}

    @property
    def device(self) -> torch.device:
        """Where the kernels run, and so where their outputs lie."""
        device = self.logprob.device
        return device if has_kernel(device) else torch.device("cpu")


def policy_sums(
    inputs: PolicyInputs,
    loss_T: Tensor | None,
    logprob_grad_T: Tensor,
    entropy_grad_T: Tensor | None,
) -> PolicyLossTotals:
    """Write the outputs, of the log-probs' type, where they are asked for; the sums.

    ValueError: a column has another length or
    type, offsets do not divide the tokens, an advantage is not finite or a radius below 0.
    """
    if has_kernel(inputs.logprob.device):
        return _on_device(inputs, (loss_T, logprob_grad_T, entropy_grad_T))
    return _core.loss.policy_loss(
        columns=[None if c is None else host_array(c) for c in inputs.columns.values()],
        mask_T=None if inputs.mask is None else host_array(inputs.mask),
        **inputs.responses(),
        **inputs.spec.kernel_arguments(),
        loss_T=None if loss_T is None else loss_T.numpy(),
        logprob_grad_T=logprob_grad_T.numpy(),
        entropy_grad_T=None if entropy_grad_T is None else entropy_grad_T.numpy(),
    )


def _on_device(inputs: PolicyInputs, outputs: tuple[Tensor | None, ...]) -> PolicyLossTotals:
    """What lies on the CPU of [T] is copied to the device; nothing of [T] comes back."""
    like_T = inputs.logprob
    columns = [
        None if column is None else _resident(f"columns[{c}]", column, like_T)
        for c, column in enumerate(inputs.columns.values())
    ]
    for column in columns:
        if column is not None and column.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"columns: expected float32 or float64, got {column.dtype}")
    mask_T = None if inputs.mask is None else _resident("mask_T", inputs.mask, like_T)
    loss_T, logprob_grad_T, entropy_grad_T = outputs
    return _core.loss.policy_loss_cuda(
        tokens=len(like_T),
        columns=column_addresses(columns),
        mask=_address(mask_T),
        **inputs.responses(),
        **inputs.spec.kernel_arguments(),
        loss=_address(loss_T),
        logprob_grad=_address(logprob_grad_T),
        entropy_grad=_address(entropy_grad_T),
        **device_of(like_T),
    )


def _resident(name: str, tensor: Tensor, like_T: Tensor) -> Tensor:
    """Contiguous on the device, itself or a copy."""
    if tensor.shape != like_T.shape:
        raise ValueError(f"{name}: expected {len(like_T)} entries, got {list(tensor.shape)}")
    return tensor.detach().to(like_T.device).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
