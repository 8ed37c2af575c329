"""The gradient of a batch, slow and obvious: one forward per leaf, autograd of the formula."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from learner_batch import PROMPT_N, RESPONSE_N, taken_gradient
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.loss import Loss
from pyrl.loss.aggregate import (
    Aggregate,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)
from pyrl.pack import TokenBatch


@dataclass(frozen=True)
class Token:
    leaf: int
    sampled: bool
    logprob: Tensor
    entropy: Tensor
    reference: float


def slow_tokens(model: PreTrainedModel, initial: PreTrainedModel, batch: TokenBatch) -> list[Token]:
    """One forward for each leaf, by transformers' own attention."""
    tokens = []
    for leaf, (prompt, response) in enumerate(zip(PROMPT_N, RESPONSE_N, strict=True)):
        span = slice(*batch.input_offset_N1[leaf : leaf + 2])
        row = torch.from_numpy(batch.input_I[span])
        now = (model(input_ids=row[None], use_cache=False).logits[0] / 0.6).log_softmax(-1)
        with torch.no_grad():
            then = (initial(input_ids=row[None], use_cache=False).logits[0] / 0.6).log_softmax(-1)
        start = int(batch.token_offset_N1[leaf])
        for t in range(response):
            predictor, label = prompt + t - 1, row[prompt + t]
            tokens.append(
                Token(
                    leaf,
                    bool(batch.mask_T[start + t]),
                    now[predictor, label],
                    -(now[predictor].exp() * now[predictor]).sum(),
                    float(then[predictor, label]),
                )
            )
    return tokens


def slow_weights(aggregate: Aggregate, tokens: list[Token]) -> list[float]:
    leaves = {token.leaf for token in tokens if token.sampled}
    length = {n: sum(t.sampled for t in tokens if t.leaf == n) for n in leaves}
    match aggregate:
        case TokenMean():
            divisor = dict.fromkeys(leaves, float(sum(length.values())))
        case TokenSum():
            divisor = dict.fromkeys(leaves, 1.0)
        case SeqMeanTokenMean():
            divisor = {n: float(len(leaves) * length[n]) for n in leaves}
        case SeqMeanTokenSum():
            divisor = dict.fromkeys(leaves, float(len(leaves)))
        case SeqMeanTokenSumNorm(size):
            divisor = dict.fromkeys(leaves, len(leaves) * size)
        case _:
            raise AssertionError(aggregate)
    return [1 / divisor[t.leaf] if t.sampled else 0.0 for t in tokens]


def slow_loss(loss: Loss, tokens: list[Token], batch: TokenBatch) -> Tensor:
    """The formula, token by token."""
    low_T, high_T = (bound.tolist() for bound in loss.bounds(batch))
    total = torch.zeros((), dtype=tokens[0].logprob.dtype)
    for i, (token, weight) in enumerate(
        zip(tokens, slow_weights(loss.aggregate, tokens), strict=True)
    ):
        advantage = float(batch.advantage_T[i])
        ratio = torch.exp(token.logprob - float(batch.old_logprob_T[i]))
        clipped = ratio.clamp(1 - low_T[i], 1 + high_T[i])
        value = torch.maximum(-advantage * ratio, -advantage * clipped)
        if advantage < 0 and loss.dual is not None:
            value = value.clamp(max=-advantage * loss.dual)
        gap = token.logprob - token.reference
        kl = {"k1": gap, "k2": gap**2 / 2, "k3": torch.exp(-gap) + gap - 1}[loss.kl.estimator]
        total = total + weight * (value + loss.kl.coef * kl - loss.entropy * token.entropy)
    return total


def slow_gradient(
    model: PreTrainedModel, initial: PreTrainedModel, loss: Loss, batch: TokenBatch
) -> tuple[float, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    total = slow_loss(loss, slow_tokens(model, initial, batch), batch)
    total.backward()
    return float(total.detach()), taken_gradient(model)
