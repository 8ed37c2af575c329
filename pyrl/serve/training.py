"""Training: a batch of the protocol through pyrl's reader and losses, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyrl.learner.reader import Reader
from pyrl.loss import KL, Clipped, Loss, Penalty, Range, TokenSum, Unbounded
from pyrl.loss.presets import PRESETS
from pyrl.loss.terms import loss_terms
from pyrl.pack import TokenBatch, gather, pack_given
from pyrl.serve.body import Body, RequestError
from pyrl.serve.policies import Policy
from pyrl.serve.wire import Datum, Pass, passed

Config = Mapping[str, float]
SUM = TokenSum()
"""A loss of the protocol is a sum over tokens: what it is divided by is in the advantages."""


def cross_entropy(config: Config) -> Loss:
    """- weight logprob."""
    return replace(PRESETS["reinforce"](), aggregate=SUM)


def importance_sampling(config: Config) -> Loss:
    """- advantage times the ratio to the policy that sampled."""
    return Loss(bounds=Unbounded(), surrogate=Clipped(), dual=None, kl=KL(coef=0.0), aggregate=SUM)


def ppo(config: Config) -> Loss:
    """The ratio is clipped (arXiv:1707.06347)."""
    return replace(PRESETS["ppo"](), bounds=_bounds(config), aggregate=SUM)


def cispo(config: Config) -> Loss:
    """The clipped ratio is a detached weight (arXiv:2506.13585)."""
    return replace(PRESETS["cispo"](), bounds=_bounds(config), aggregate=SUM)


def dro(config: Config) -> Loss:
    """REINFORCE with beta / 2 times the squared log ratio (arXiv:2405.19107)."""
    penalty = Penalty(config.get("beta", 0.05), "k2", "old")
    return replace(PRESETS["dro"](), penalties=(penalty,), aggregate=SUM)


def _bounds(config: Config) -> Range:
    return Range(config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2))


@dataclass(frozen=True)
class Choice:
    """A loss of the protocol."""

    make: Callable[[Config], Loss]
    columns: tuple[str, ...]
    """What a datum has for each target beside its id; the first are the advantages."""
    config: tuple[str, ...] = ()
    """Settings that a request may give."""


SAMPLED = ("advantages", "logprobs")
CLIPS = ("clip_low_threshold", "clip_high_threshold")
LOSSES = {
    "cross_entropy": Choice(cross_entropy, ("weights",)),
    "importance_sampling": Choice(importance_sampling, SAMPLED),
    "ppo": Choice(ppo, SAMPLED, CLIPS),
    "cispo": Choice(cispo, SAMPLED, CLIPS),
    "dro": Choice(dro, SAMPLED, ("beta",)),
}
"""By name. A custom loss is computed by the client, which sends its gradient as weights of
`cross_entropy`."""


def check_pass(request: Pass, vocabulary: int, positions: int) -> None:
    """RequestError names what cannot be read: a loss, a setting, or a column of a datum."""
    if request.loss not in LOSSES:
        raise RequestError(
            f"loss_fn: expected one of {', '.join(LOSSES)}, got {request.loss!r}; a custom loss is "
            f"computed by forward_backward_custom of the client"
        )
    choice = LOSSES[request.loss]
    if unknown := sorted(set(request.config) - set(choice.config)):
        expected = ", ".join(choice.config) or "no settings"
        raise RequestError(
            f"loss_fn_config: expected {expected} for {request.loss}, got {unknown[0]}"
        )
    choice.make(request.config)
    for n, datum in enumerate(request.data):
        _check_datum(f"data[{n}]", datum, choice, vocabulary, positions)


def _check_datum(where: str, datum: Datum, choice: Choice, vocabulary: int, positions: int) -> None:
    length, expected = len(datum.token_I), {"target_tokens", *choice.columns}
    if set(datum.inputs) != expected:
        raise RequestError(
            f"{where}.loss_fn_inputs: expected {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(datum.inputs)) or 'none'}"
        )
    if not 1 <= length < positions:
        raise RequestError(
            f"{where}.model_input: expected 1 to {positions - 1} tokens, got {length}"
        )
    for name, column in datum.inputs.items():
        if len(column) != length:
            raise RequestError(
                f"{where}.loss_fn_inputs.{name}: expected a number for each of {length} input "
                f"tokens, got {len(column)}"
            )
        if not np.isfinite(column).all():
            raise RequestError(f"{where}.loss_fn_inputs.{name}: expected finite numbers")
    target_T = datum.inputs["target_tokens"]
    ids = np.concatenate([datum.token_I, target_T])
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise RequestError(
            f"{where}: expected token ids in 0..{vocabulary - 1}, got {ids.min()}..{ids.max()}"
        )
    if datum.inputs[choice.columns[0]][: first_target(datum)].any():
        raise RequestError(
            f"{where}.loss_fn_inputs.target_tokens: expected the input tokens moved by one place "
            f"wherever {choice.columns[0]} is not 0"
        )


def first_target(datum: Datum) -> int:
    """The place from which on each target is the next input token; clients fill up those before,
    which are the prompt's."""
    other = np.flatnonzero(datum.inputs["target_tokens"][:-1] != datum.token_I[1:])
    return int(other[-1]) + 1 if other.size else 0


def read_batch(policy: Policy, reader: Reader, request: Pass) -> bytes:
    """Log-probs of a batch; unless it is read only, the gradient of its loss is added to that of
    the requests since the last step. One that fails adds nothing."""
    parameters, held = policy.parameters, [p.grad for p in policy.parameters]
    for parameter in parameters:
        parameter.grad = None
    policy.model.eval()
    try:
        with torch.set_grad_enabled(not request.forward_only):
            logprob_N, total = _read(policy, reader, request)
        added = [parameter.grad for parameter in parameters]
    finally:
        for parameter, grad in zip(parameters, held, strict=True):
            parameter.grad = grad
    for parameter, grad in zip(parameters, added, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    return passed(logprob_N, {"loss:sum": total})


def _read(policy: Policy, reader: Reader, request: Pass) -> tuple[list[NDArray[np.float32]], float]:
    choice = LOSSES[request.loss]
    loss, batch = choice.make(request.config), _packed(request, choice)
    device = policy.model.device
    columns = {
        "advantage_T": torch.from_numpy(batch.advantage_T).to(device),
        "old_logprob_T": torch.from_numpy(batch.old_logprob_T).to(device),
    }
    terms = loss_terms(loss, columns, offset_N1=torch.from_numpy(batch.token_offset_N1))
    logprob_T, total = np.empty(len(batch.label_T), np.float32), 0.0
    for leaf_N in reader.passes(batch):
        part = batch.take(leaf_N)
        old_T = torch.from_numpy(part.old_logprob_T).to(device)
        out, stats = reader.loss(
            policy.model, part, loss, terms.take(leaf_N), {"old_logprob_T": old_T}
        )
        if not request.forward_only:
            torch.autograd.backward(out.loss)
        total += float(out.loss.detach())
        row_T = gather(batch.token_offset_N1, leaf_N)
        logprob_T[row_T] = stats.logprob.detach().float().cpu().numpy()
    own_N = np.split(logprob_T, batch.token_offset_N1[1:-1])
    first_N = [first_target(datum) for datum in request.data]
    return [np.pad(own_T, (s, 0)) for own_T, s in zip(own_N, first_N, strict=True)], total


def _packed(request: Pass, choice: Choice) -> TokenBatch:
    """Each text is a prompt and a response: its targets, but those that only fill it up."""
    pairs = [(datum, first_target(datum)) for datum in request.data]

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([datum.inputs[name][first:] for datum, first in pairs])

    return pack_given(
        [datum.token_I[: first + 1].astype(np.int32) for datum, first in pairs],
        [datum.inputs["target_tokens"][first:].astype(np.int64) for datum, first in pairs],
        advantage_T=column(choice.columns[0]).astype(np.float32).astype(np.float64),
        logprob_T=(column("logprobs").astype(np.float32) if "logprobs" in choice.columns else None),
    )


@dataclass(frozen=True)
class Adam:
    """The settings of one step."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    """Largest norm of the gradient; 0: any."""

    @classmethod
    def read(cls, body: Body) -> Adam:
        """RequestError names a setting that is out of its range."""
        if not body.has("adam_params"):
            raise RequestError("adam_params: expected the settings of Adam, got none")
        given = body.inner("adam_params")
        betas = (given.number("beta1", 0.9, least=0), given.number("beta2", 0.95, least=0))
        if max(betas) >= 1:
            raise RequestError(f"adam_params: expected beta1 and beta2 below 1, got {betas}")
        return cls(
            given.number("learning_rate", 1e-4, least=0),
            betas,
            given.number("eps", 1e-12, least=0),
            given.number("weight_decay", 0.0, least=0),
            given.number("grad_clip_norm", 0.0),
        )


def optim_step(policy: Policy, adam: Adam) -> dict[str, float]:
    """One step along the gradient that the requests have added; what is told of it.

    RequestError, with the weights unchanged: there is no gradient, or it is not finite.
    """
    if not any(parameter.grad is not None for parameter in policy.parameters):
        raise RequestError("optim_step: expected a forward_backward since the last step, got none")
    limit = adam.clip if adam.clip > 0 else float("inf")
    norm = float(nn.utils.clip_grad_norm_(policy.parameters, limit))
    if not np.isfinite(norm):
        policy.optimizer.zero_grad(set_to_none=True)
        raise RequestError(
            f"optim_step: expected a finite gradient, got one of norm {norm}; it was dropped, and "
            f"the weights are unchanged"
        )
    for group in policy.optimizer.param_groups:
        group |= {"lr": adam.learning_rate, "betas": adam.betas, "eps": adam.eps}
        group["weight_decay"] = adam.weight_decay
    policy.optimizer.step()
    policy.optimizer.zero_grad(set_to_none=True)
    policy.saved = False
    return {"grad_norm": norm}
