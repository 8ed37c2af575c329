"""Policy loss of tokens: its value, and the coefficients that its gradient needs.

Each token's loss, its gradients and the sums are computed on the device of the tensors, a CPU or
CUDA, and so are the terms of the mini-batch: nothing of [T] leaves a GPU. A call waits for its
stream, since the totals are the host's. On another device, or in a build without CUDA kernels
(`pyrl info`), the kernels read copies of all columns on the CPU, and the results go back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from pyrl.checks import described
from pyrl.logits.graph import traced
from pyrl.logits.kernels import check_tensors
from pyrl.loss.axis import LossState, check_needs
from pyrl.loss.columns import Columns
from pyrl.loss.kernels import PolicyInputs, policy_sums
from pyrl.loss.loss import Loss, check_loss
from pyrl.loss.result import TOTALS, PolicyLoss
from pyrl.loss.spec import TOKEN_COLUMNS, LossSpec, Lowered, lower
from pyrl.loss.terms import Terms, reduced

_SCALES = ("scale_0", "scale_1", "scale_2")


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
    are a part of it: advantages, mask, offsets, groups and state are its own. `per_token` asks for
    `PolicyLoss.loss_T`. Columns are float32 or float64, each, and read in place where contiguous.
    Sums run in float64 in a fixed order. torch.compile finds no graph break.

    Raises ValueError for a column that is missing, or of another dtype, length or device, for an
    advantage that is not finite or a radius below 0, and for a mask, offsets, groups or a state
    beside `terms`. Raises TypeError for what is no tensor, or no Loss.
    """
    check_loss(loss)
    named = given_columns(logprob_T, entropy_T, columns)
    if terms is None:
        if "advantage_T" not in named:
            raise ValueError("policy_loss: needs the column advantage_T, or terms")
        terms = reduced(loss, named, mask_T, offset_N1, group_N, state)
    else:
        own = {"mask_T": mask_T, "offset_N1": offset_N1, "group_N": group_N, "state": state}
        check_terms(terms, len(logprob_T), own)
    lowered = lower(loss, "ref_logprob_T" in named)
    inputs = _Inputs(
        logprob=logprob_T,
        columns=token_columns(loss, lowered, terms, named),
        entropy=entropy_T,
        nucleus_entropy=None if terms.nucleus_T is None else named["nucleus_entropy_T"],
        mask=terms.mask_T,
        offset=terms.offset_N1,
        weight=terms.weight_N,
        nucleus=terms.nucleus_T,
        nucleus_gap=terms.nucleus_gap,
        spec=lowered.spec,
        per_token=per_token,
    )
    loss_value, loss_T, logprob_grad_T, entropy_grad_T, totals = inputs.outputs()
    return PolicyLoss(
        loss=loss_value,
        loss_T=loss_T if per_token else None,
        logprob_grad_T=logprob_grad_T,
        entropy_grad_T=entropy_grad_T if loss.entropy else _zeros_like(logprob_grad_T),
        nucleus_grad_T=terms.nucleus_T,
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
    check_needs(loss.token_needs, columns)
    found: dict[str, Tensor | None] = {
        name: vars(terms)[f"{name}_T"]
        for name in ("advantage", "low", "high", "factor", "heat", "addend", *_SCALES)
    }
    for column, name in lowered.sources.items():
        found[column] = columns[name].detach()
    return [found.get(name) for name in TOKEN_COLUMNS]


def given_columns(
    logprob_T: Tensor, entropy_T: Tensor, columns: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The given columns, checked; TypeError or ValueError names one that cannot be used."""
    unknown = sorted(set(columns) - set(Columns.__annotations__))
    if unknown:
        expected = ", ".join(Columns.__annotations__)
        raise TypeError(f"unexpected column {unknown[0]!r}: expected some of {expected}")
    named = {"logprob_T": logprob_T, "entropy_T": entropy_T}
    named |= {name: tensor for name, tensor in columns.items() if tensor is not None}
    _check(named)
    return named


def check_terms(terms: Terms, tokens: int, own: Mapping[str, object]) -> None:
    """ValueError unless the terms have `tokens` tokens and nothing is given that they contain.

    TypeError unless they are terms.
    """
    if not isinstance(terms, Terms):
        raise TypeError(
            f"terms: expected what pyrl.loss.terms.loss_terms returns, got {described(terms)}"
        )
    if len(terms.advantage_T) != tokens:
        raise ValueError(f"terms: expected those of {tokens} tokens, got {len(terms.advantage_T)}")
    for name, given in own.items():
        if given is not None:
            raise ValueError(f"{name}: expected None with terms, which have their own")


def _check(columns: Mapping[str, Tensor]) -> None:
    check_tensors(**columns)
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


def _zeros_like(tensor: Tensor) -> Tensor:
    """One zero, seen as many."""
    return tensor.new_zeros(()).expand(tensor.shape)


# -- the op --


class _Inputs(NamedTuple):
    """The arguments of the op, and in a backward pass their gradients."""

    logprob: Any = None
    entropy: Any = None
    nucleus_entropy: Any = None
    columns: Any = None
    """[T] in the order of TOKEN_COLUMNS; logprob and entropy are the arguments of these names."""
    mask: Any = None
    offset: Any = None
    weight: Any = None
    nucleus: Any = None
    nucleus_gap: Any = None
    spec: Any = None
    """A LossSpec, or its numbers where torch.library has to know the type."""
    per_token: Any = None

    def outputs(self) -> tuple[Tensor, ...]:
        """What the op returns, of the op itself only where somebody is to see it."""
        if traced(self.logprob):
            return tuple(_loss_op(*self._replace(spec=self.spec.numbers())))
        return _eager(*self)


def _compute(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = _Inputs(*arguments)
    logprob = given.logprob
    columns = dict(zip(TOKEN_COLUMNS, given.columns, strict=True))
    columns |= {"logprob": logprob, "entropy": given.entropy}
    inputs = PolicyInputs(columns, given.mask, given.offset, given.weight, given.spec)
    loss_T, logprob_grad_T, entropy_grad_T = (
        torch.empty(size, dtype=logprob.dtype, device=inputs.device)
        for size in _sizes(len(logprob), given.per_token, given.spec)
    )
    sums = policy_sums(
        inputs,
        loss_T if given.per_token else None,
        logprob_grad_T,
        entropy_grad_T if given.spec.token.entropy_coef else None,
    )
    loss = sums.loss
    if given.nucleus is not None:
        # coef gap^2 = the sum of 2 coef gap weight, times gap / 2
        loss += 0.5 * float(given.nucleus_gap) * float(given.nucleus.sum())
    device = logprob.device
    return (
        torch.tensor(loss, dtype=logprob.dtype, device=device),
        loss_T.to(device),
        logprob_grad_T.to(device),
        entropy_grad_T.to(device),
        torch.tensor([getattr(sums, name) for name in TOTALS], dtype=torch.float64, device="cpu"),
    )


def _sizes(tokens: int, per_token: bool, spec: LossSpec) -> tuple[int, int, int]:
    """Lengths of loss_T, logprob_grad_T and entropy_grad_T, 0 where not asked for."""
    return tokens * per_token, tokens, tokens * (spec.token.entropy_coef != 0)


@torch.library.custom_op("pyrl::policy_loss", mutates_args=())
def _loss_op(
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
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (logprob, entropy, nucleus_entropy, columns, mask, offset, weight)
    return _compute(*arguments, nucleus, nucleus_gap, LossSpec.of(spec), per_token)


@_loss_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = _Inputs(*arguments)
    totals = torch.empty(len(TOTALS), dtype=torch.float64, device="cpu")
    sizes = _sizes(given.logprob.shape[0], given.per_token, LossSpec.of(given.spec))
    loss_T, logprob_grad_T, entropy_grad_T = (given.logprob.new_empty(size) for size in sizes)
    return given.logprob.new_empty(()), loss_T, logprob_grad_T, entropy_grad_T, totals


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, logprob_grad_T, entropy_grad_T, _ = output
    ctx.save_for_backward(logprob_grad_T, entropy_grad_T, _Inputs(*inputs).nucleus)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else each other output gets a gradient of zeros


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Any, ...]:
    if grad_loss is None:
        return tuple(_Inputs())
    if torch.is_grad_enabled():  # create_graph=True
        raise NotImplementedError(
            "policy_loss: expected to be differentiated once, got a request for second derivatives"
        )
    logprob_grad_T, entropy_grad_T, nucleus_T = ctx.saved_tensors
    gradients = _Inputs(
        logprob=_times(grad_loss, logprob_grad_T),
        entropy=_times(grad_loss, entropy_grad_T) if len(entropy_grad_T) else None,
        nucleus_entropy=None if nucleus_T is None else grad_loss * nucleus_T.to(grad_loss),
    )
    # Autograd makes a tensor that nobody else refers to the `grad` of a leaf, and adds to it.
    ctx.handed_out = gradients.logprob, gradients.entropy
    return tuple(gradients)


def _times(factor: Tensor, gradient: Tensor) -> Tensor:
    """The product, with no pass over memory where the loss itself is differentiated.

    What is handed out is the memory of PolicyLoss.logprob_grad_T, and shares its version: after a
    write to it, a second backward pass through a retained graph is refused by autograd. Not while
    compiling: values are unknown.
    """
    if type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1:
        return gradient.detach()
    return factor * gradient


_loss_op.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The op without torch.library's dispatch, nor the binding of arguments of a setup_context."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = _compute(*arguments)
        _save(ctx, arguments, output)
        return output

    backward = staticmethod(_backward)


_eager: Callable[..., tuple[Tensor, ...]] = _Eager.apply
