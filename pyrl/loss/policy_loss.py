"""Policy loss of tokens: its value, and the coefficients that its gradient needs.

Each token's loss, its gradients and the sums are computed on the device of the tensors, a CPU or
CUDA. With `terms` nothing of [T] leaves a GPU; the columns of the terms go there with every call,
which waits for its stream, since the totals are the host's. The terms themselves numpy computes:
without `terms` the columns, but the reference's and the expert's, are copied to the CPU. On another
device, or in a build without CUDA kernels (`pyrl info`), all columns are, and the results back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl.logits.graph import traced, untraced
from pyrl.loss import BinaryKL, Loss, LossState, TotalVariation
from pyrl.loss.kernels import PolicyInputs, host_array, policy_sums
from pyrl.loss.result import PolicyLoss
from pyrl.loss.spec import TOKEN_COLUMNS, Lowered, lower
from pyrl.loss.terms import Terms, loss_terms

_SCALES = ("scale_0", "scale_1", "scale_2")


class Columns(TypedDict, total=False):
    """Columns [T] of a policy loss, float32 or float64; which are read is up to its axes."""

    advantage_T: Tensor | None
    old_logprob_T: Tensor | None
    """Of the policy before the update."""
    rollout_logprob_T: Tensor | None
    """As the rollout engine reported it."""
    ref_logprob_T: Tensor | None
    """Of the frozen initial model."""
    proxy_logprob_T: Tensor | None
    """Of the old policy without its least probable tokens; -inf for such a token."""
    expert_logprob_T: Tensor | None
    """Of an expert's response at the same position."""
    second_logprob_T: Tensor | None
    """Of the old policy at a second temperature."""
    nucleus_entropy_T: Tensor | None
    """Differentiable, as the entropy is."""
    reward_T: Tensor | None
    """Of the token's response."""
    sum_p2_T: Tensor | None
    sum_p2_logp_T: Tensor | None
    clip_low_T: Tensor | None
    """Radii of bounds in Python."""
    clip_high_T: Tensor | None


def policy_loss(
    logprob_T: Tensor,
    entropy_T: Tensor,
    *,
    loss: Loss,
    mask_T: Tensor | None = None,
    offset_N1: Tensor | None = None,
    group_N: Tensor | None = None,
    state: LossState | None = None,
    terms: Terms | None = None,
    per_token: bool = False,
    **columns: Unpack[Columns],
) -> PolicyLoss:
    """The loss of T tokens of N responses that lie one after the other.

    `loss` names the axes and with them the columns that are needed; the others are not read.
    `offset_N1` (int64) is where each response begins, and the end of the last; it may be left out
    where nothing depends on responses. Tokens outside `mask_T` (bool) take no part, whatever they
    hold. `terms` (`loss_terms`) stands for what is computed once per mini-batch when these tokens
    are a part of it: advantages, mask, offsets, groups and state are its own, and torch.compile
    finds no graph break. `per_token` asks for `PolicyLoss.loss_T`. Columns are float32 or float64,
    each, and read in place where contiguous. Sums run in float64 in a fixed order.

    Raises ValueError for a column that is missing, or of another dtype, length or device, for an
    advantage that is not finite or a radius below 0, and for a mask, offsets, groups or a state
    beside `terms`.
    """
    named = given_columns(logprob_T, entropy_T, columns)
    if terms is None:
        terms = tensor_terms(loss, named, mask_T, offset_N1, group_N, state)
    else:
        own = {"mask_T": mask_T, "offset_N1": offset_N1, "group_N": group_N, "state": state}
        check_terms(terms, len(logprob_T), own)
    lowered = lower(loss, "ref_logprob_T" in named)
    nucleus = terms.nucleus_T is not None
    compute = _loss_op if traced(logprob_T) else _eager
    loss_value, loss_T, logprob_grad_T, entropy_grad_T, totals = compute(
        logprob_T,
        entropy_T,
        _given(named, "NucleusAnchor", "nucleus_entropy_T") if nucleus else None,
        token_columns(loss, lowered, terms, named),
        _tensor(terms.mask_T),
        torch.from_numpy(terms.offset_N1),
        torch.from_numpy(terms.weight_N),
        _tensor(terms.nucleus_T),
        _tensor(terms.nucleus_gap),
        lowered.spec,
        lowered.scan,
        lowered.position,
        per_token,
    )
    return PolicyLoss(
        loss=loss_value,
        loss_T=loss_T if per_token else None,
        logprob_grad_T=logprob_grad_T,
        entropy_grad_T=entropy_grad_T if loss.entropy else _zeros_like(logprob_grad_T),
        nucleus_grad_T=_tensor(terms.nucleus_T),
        totals=totals,
        has_reference="ref_logprob_T" in named,
    )


def token_columns(
    loss: Loss, lowered: Lowered, terms: Terms, columns: Mapping[str, Tensor]
) -> list[Tensor | None]:
    """The columns of the per-token part in their order, from terms and from what was given.

    Those of this moment (logprob, entropy and a scanned log_ratio) and the weight, which is one per
    response, are None. ValueError names an axis and the column that it needs.
    """

    found: dict[str, Tensor | None] = {
        name: _tensor(vars(terms)[f"{name}_T"])
        for name in ("advantage", "low", "high", "factor", "heat", "addend", *_SCALES)
    }
    if loss.ratio.of != "one" or isinstance(loss.bounds, TotalVariation | BinaryKL):
        found["anchor"] = _given(columns, "loss.ratio", lowered.anchor).detach()
    if loss.trust == "old":
        found["trust"] = _given(columns, "loss.trust", "old_logprob_T").detach()
    for slot, name in enumerate(lowered.targets):
        if name is not None:
            axis = "loss.kl" if slot == 0 else "loss.penalties"
            found[f"target_{slot}"] = _given(columns, axis, name).detach()
    return [found.get(name) for name in TOKEN_COLUMNS]


def given_columns(
    logprob_T: Tensor, entropy_T: Tensor, columns: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Those that are not None, checked; TypeError or ValueError names one that cannot be used."""
    unknown = sorted(set(columns) - set(Columns.__annotations__))
    if unknown:
        expected = ", ".join(Columns.__annotations__)
        raise TypeError(f"unexpected column {unknown[0]!r}: expected some of {expected}")
    named = {"logprob_T": logprob_T, "entropy_T": entropy_T}
    named |= {name: tensor for name, tensor in columns.items() if tensor is not None}
    _check(named)
    return named


def check_terms(terms: Terms, tokens: int, own: Mapping[str, object]) -> None:
    """ValueError unless they are of so many tokens and nothing is given of what is their own."""
    if len(terms.advantage_T) != tokens:
        raise ValueError(f"terms: expected those of {tokens} tokens, got {len(terms.advantage_T)}")
    for name, given in own.items():
        if given is not None:
            raise ValueError(f"{name}: expected None with terms, which have their own")


def _given(columns: Mapping[str, Tensor], axis: str, name: str) -> Tensor:
    if name not in columns:
        raise ValueError(f"{axis}: needs the column {name}")
    return columns[name]


@untraced
def tensor_terms(
    loss: Loss,
    columns: Mapping[str, Tensor],
    mask_T: Tensor | None,
    offset_N1: Tensor | None,
    group_N: Tensor | None,
    state: LossState | None,
) -> Terms:
    """`loss_terms` of tensors, which numpy computes."""
    if "advantage_T" not in columns:
        raise ValueError("policy_loss: needs the column advantage_T, or terms")
    return loss_terms(
        loss,
        {name: host_array(tensor) for name, tensor in columns.items() if name not in _LATER},
        mask_T=None if mask_T is None else host_array(mask_T),
        offset_N1=None if offset_N1 is None else host_array(offset_N1),
        group_N=None if group_N is None else host_array(group_N),
        state=state,
    )


_LATER = ("ref_logprob_T", "expert_logprob_T")
"""Columns that no statistic of the mini-batch reads."""


def _check(columns: Mapping[str, Tensor]) -> None:
    like_T = columns["logprob_T"]
    for name, tensor in columns.items():
        if tensor.ndim != 1 or tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: expected float32[T] or float64[T], got {tensor.dtype}{list(tensor.shape)}"
            )
        if len(tensor) != len(like_T):
            raise ValueError(
                f"{name}: expected [{len(like_T)}] like logprob_T, got {list(tensor.shape)}"
            )
        if tensor.device != like_T.device:
            raise ValueError(f"{name}: expected a tensor on {like_T.device}, got {tensor.device}")


def _tensor(values: NDArray[Any] | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


def _zeros_like(tensor: Tensor) -> Tensor:
    """Without memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


# -- the op --


def _compute(
    logprob: Tensor,
    entropy: Tensor,
    nucleus_entropy: Tensor | None,
    columns: Sequence[Tensor | None],
    mask: Tensor | None,
    offset: Tensor,
    weight: Tensor,
    nucleus: Tensor | None,
    nucleus_gap: Tensor | None,
    spec: Sequence[float],
    scan: int,
    position: Sequence[float],
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = [logprob, entropy, *columns[2:]]
    inputs = PolicyInputs(logprob, given, mask, offset, weight, spec, scan, position)
    loss_T, logprob_grad_T, entropy_grad_T = (
        torch.empty(size, dtype=logprob.dtype, device=inputs.device)
        for size in _sizes(logprob, per_token, spec)
    )
    loss, *totals = policy_sums(
        inputs, loss_T if per_token else None, logprob_grad_T, entropy_grad_T if spec[-1] else None
    )
    if nucleus is not None and nucleus_gap is not None:
        # coef gap^2 = the sum of 2 coef gap weight, times gap / 2
        loss += 0.5 * float(nucleus_gap) * float(nucleus.sum())
    device = logprob.device
    return (
        torch.tensor(loss, dtype=logprob.dtype, device=device),
        loss_T.to(device),
        logprob_grad_T.to(device),
        entropy_grad_T.to(device),
        torch.tensor(totals, dtype=torch.float64, device="cpu"),
    )


def _sizes(logprob: Tensor, per_token: bool, spec: Sequence[float]) -> tuple[int, int, int]:
    """Of loss_T, logprob_grad_T and entropy_grad_T, empty where not asked for."""
    tokens = logprob.shape[0]
    return tokens * per_token, tokens, tokens * (spec[-1] != 0)


_loss_op = torch.library.custom_op("pyrl::policy_loss", mutates_args=())(_compute)


@_loss_op.register_fake
def _(
    logprob: Tensor,
    entropy: Tensor,
    nucleus_entropy: Tensor | None,
    columns: Sequence[Tensor | None],
    mask: Tensor | None,
    offset: Tensor,
    weight: Tensor,
    nucleus: Tensor | None,
    nucleus_gap: Tensor | None,
    spec: Sequence[float],
    scan: int,
    position: Sequence[float],
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    totals = torch.empty(8, dtype=torch.float64, device="cpu")
    loss_T, logprob_grad_T, entropy_grad_T = (
        logprob.new_empty(size) for size in _sizes(logprob, per_token, spec)
    )
    return logprob.new_empty(()), loss_T, logprob_grad_T, entropy_grad_T, totals


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], output[3], inputs[7])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else each other output gets a gradient of zeros


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 13
    if torch.is_grad_enabled():  # create_graph=True
        raise NotImplementedError(
            "policy_loss: expected to be differentiated once, got a request for second derivatives"
        )
    logprob_grad_T, entropy_grad_T, nucleus_T = ctx.saved_tensors
    logprob_grad = _times(grad_loss, logprob_grad_T)
    entropy_grad = _times(grad_loss, entropy_grad_T) if len(entropy_grad_T) else None
    nucleus_grad = None if nucleus_T is None else grad_loss * nucleus_T.to(grad_loss)
    # Autograd makes a tensor that nobody else refers to the `grad` of a leaf, and adds to it.
    ctx.handed_out = logprob_grad, entropy_grad
    return logprob_grad, entropy_grad, nucleus_grad, *[None] * 10


def _times(factor: Tensor, gradient: Tensor) -> Tensor:
    """Without a pass over memory where the loss itself is differentiated.

    What is handed out is the memory of PolicyLoss.logprob_grad_T, and shares its version: after a
    write to it, a second backward pass through a retained graph is refused by autograd. Not while
    compiling: values are unknown.
    """
    if type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1:
        return gradient.detach()
    return factor * gradient


_loss_op.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The op without torch.library's dispatch."""

    forward = staticmethod(_compute)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


_eager: Callable[..., tuple[Tensor, ...]] = _Eager.apply
