"""Trial: when a model is loaded, a few tokens show that its numbers are right in pyrl's passes.

The reference is transformers' own forward of one text, with the attention that the model's authors
wrote: sampler and learner attend through the same function, so they can be wrong together. The
tokens are always the same ones, and no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrl._core.tree import pack_rows
from pyrl.attention import Layout, plain_attention, use_pyrl_attention
from pyrl.engine.kv_cache import SlotCache, prefill
from pyrl.models import room
from pyrl.models.loading import ModelError

TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 0.05,
    torch.bfloat16: 0.3,
}
"""Largest difference of a token's logits from the plain forward's, by root mean square over the
vocabulary, in units of their standard deviation. With SmolLM2-135M rounding makes 3e-6 in float32,
0.02 in float16 and 0.14 in bfloat16; a text that sees its neighbour is off by 0.3 to 1.4."""

LENGTHS = (5, 4)
"""Tokens of the two texts."""
FORK = 2
"""Tokens of the first one with which a third begins as well."""
DECODED = 2
"""Of these the last, which are read one by one."""

REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the code of a model raises that is called in another way than its authors thought of."""


def check_sampling(model: PreTrainedModel) -> None:
    """Let `model` attend through pyrl, in eval mode, and try what the sampler does with it.

    Packed prompts, tokens that are decoded one by one beside another row, and logits that are the
    output embeddings of the decoder's last hidden states. ModelError names the model's class.
    """
    with _refusing(model), torch.no_grad():
        text_N = _prepare(model)
        _check_head(model, text_N[0])
        plain_N = _plain(model, text_N)
        row_N = _decoded(model, text_N)
        for row, plain in zip(row_N, plain_N, strict=True):
            for t, token in enumerate(("its prompt", *["a decoded token"] * DECODED)):
                _compare(model, row[t], plain[t - DECODED - 1], f"after {token}")


def check_learning(model: PreTrainedModel) -> None:
    """Let `model` attend through pyrl, in eval mode, and try the pass of the learner.

    A packed row of texts of which two share their beginning, and one stands at the last positions
    that the model has: a pass that takes something from all of its texts, such as a scale for the
    longest, shows. ModelError names the model's class.
    """
    with _refusing(model), torch.no_grad():
        first, second = _prepare(model)
        text_N = [first, second, torch.cat([first[:FORK], second[:-1]])]
        plain_N = _plain(model, text_N)
        far = second.flip(0)
        tree = pack_rows(
            torch.cat([*text_N, far]).cpu().numpy(),
            np.cumsum([0, *map(len, text_N), len(far)]),
            np.ones(len(text_N) + 1, np.int64),
        )
        position_J, last = tree.position_J.copy(), room(model).tokens
        position_J[tree.begin_S[-1] :] += last - len(far)
        logits_UV = model(
            input_ids=torch.from_numpy(tree.input_J)[None].to(model.device),
            position_ids=torch.from_numpy(position_J)[None].to(model.device),
            layout=Layout.of_tree(tree),
            logits_to_keep=torch.from_numpy(tree.predictor_U).to(model.device),
            use_cache=False,
        ).logits[0]
        plain_TV = torch.cat([plain[:-1] for plain in plain_N])
        unique_T = torch.from_numpy(tree.unique_T[: len(plain_TV)]).to(model.device)
        _compare(model, logits_UV[unique_T], plain_TV, "in a packed row")


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the product of the output embeddings and the last hidden states."""
    try:
        with torch.no_grad():
            _check_head(model, torch.arange(2, device=model.device))
    except REFUSALS:
        return False
    return True


def _prepare(model: PreTrainedModel) -> list[Tensor]:
    """Texts for the trial: token ids spread over the vocabulary, few of the special ones."""
    use_pyrl_attention(model)
    model.eval()
    space = room(model)
    if space.tokens < LENGTHS[0]:
        raise ValueError(f"expected room for {LENGTHS[0]} tokens at least, got {space.limit}")
    vocabulary: int = model.get_input_embeddings().num_embeddings
    id_T = (torch.arange(sum(LENGTHS)) * 7 + 1) * vocabulary // (8 * sum(LENGTHS))
    return list(torch.split(id_T.to(model.device), list(LENGTHS)))


def _plain(model: PreTrainedModel, text_N: Sequence[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each text alone."""
    with plain_attention(model):
        return [model(input_ids=text[None], use_cache=False).logits[0] for text in text_N]


def _decoded(model: PreTrainedModel, text_N: Sequence[Tensor]) -> list[Tensor]:
    """Logits [1 + DECODED, V] of each text's last tokens, as the sampler computes them."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    start_N = [text[:-DECODED] for text in text_N]
    offset_N1 = np.cumsum([0, *map(len, start_N)])
    cache = SlotCache(len(text_N))
    for prefix in prefill(decoder, torch.cat(start_N), offset_N1.tolist()):
        cache.insert(prefix, 1)
    for t in range(-DECODED, 0):
        cache.decode(decoder, torch.stack([text[t] for text in text_N]))
    return [head(cache.view(n, len(text))[-1])[-DECODED - 1 :] for n, text in enumerate(text_N)]


def _check_head(model: PreTrainedModel, text: Tensor) -> None:
    """Raise ValueError unless logits are the output embeddings of the final hidden states."""
    head = model.get_output_embeddings()
    seen: list[Tensor] = []

    def loud(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Large logits, so that soft-capping shows in a model of any scale.
        seen.extend((inputs[0], output * (100 / output.abs().max())))
        return seen[1]

    hook = head.register_forward_hook(loud)
    try:
        logits = model(input_ids=text[None], use_cache=False).logits
    finally:
        hook.remove()
    hidden = model.get_decoder()(input_ids=text[None], use_cache=False).last_hidden_state
    if not (torch.equal(seen[0], hidden) and torch.equal(seen[1], logits)):
        raise ValueError(
            "it changes its hidden states or its logits (soft-capping, scaling) around the output "
            "embeddings, which is not supported"
        )


def _compare(model: PreTrainedModel, found: Tensor, plain: Tensor, where: str) -> None:
    if found.shape != plain.shape:
        raise ValueError(f"expected logits {tuple(plain.shape)} {where}, got {tuple(found.shape)}")
    tolerance = TOLERANCE[model.dtype]
    difference_T = (found.double() - plain.double()).square().mean(-1).sqrt()
    scale_T = plain.double().std(-1)
    if not (difference_T <= tolerance * scale_T).all():
        raise ValueError(
            f"{where}, its logits differ from those of the text alone by up to "
            f"{float((difference_T / scale_T).max()):.2g} of their standard deviation (rounding "
            f"makes {tolerance:g} at most), so it does not keep the texts of a batch apart"
        )


@contextmanager
def _refusing(model: PreTrainedModel) -> Iterator[None]:
    name = type(model).__name__
    try:
        yield
    except ModelError:
        raise
    except REFUSALS as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"{name} cannot be sampled from or trained: {said}") from error
