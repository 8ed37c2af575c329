"""Reading: from tokens to text, what ends a response, and how the answer is read from it."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.answers.extraction import After, Extractor, extractor_named
from pyrl.leaves import Decode
from pyrl.sources import open_source


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Text of responses without special tokens."""
    return lambda rows: [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows]


def answer_format(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    extractor: str | None,
    stop: str | None,
    answer_after: str = "",
) -> tuple[Extractor, set[int]]:
    """How answers are read and which tokens end a response; None: as the questions ask for.

    ValueError if no decoded response can contain `answer_after`.
    """
    source = open_source(data)
    ids = stop_tokens(model, tokenizer, source.stop if stop is None else stop)
    read = extractor_named(source.extractor if extractor is None else extractor)
    if not answer_after:
        return read, ids
    seen = tokenizer.decode(
        tokenizer(answer_after, add_special_tokens=False)["input_ids"], skip_special_tokens=True
    )
    if answer_after.strip() not in seen:
        raise ValueError(
            f"answer_after: expected a text that responses can show, got {answer_after!r}, of "
            f"which this tokenizer leaves {seen!r} (a special token is not shown)"
        )
    return After(answer_after, read), ids


def check_formats(
    data: str, others: Iterable[str], extractor: str | None, stop: str | None
) -> None:
    """ValueError if questions of others want answers that end, or are read, otherwise."""
    ours = open_source(data)
    for other in others:
        theirs = open_source(other)
        for name, given, mine, wanted in (
            ("extractor", extractor, ours.extractor, theirs.extractor),
            ("stop", stop, ours.stop, theirs.stop),
        ):
            if given is None and mine != wanted:
                raise ValueError(
                    f"{other}: expected the {name} of {data}, {mine!r}, got {wanted!r}: give one "
                    f"that fits both by --{name}, or score the model by pyrl eval afterwards"
                )


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: str) -> set[int]:
    """Ids that end a response: the model's own, and every token whose text contains `stop`.

    ValueError if no token does, or if there is nothing at all to end a response with.
    """
    own = model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    if stop:
        containing = {i for i in range(len(tokenizer)) if stop in tokenizer.decode([i])}
        if not containing:
            raise ValueError(
                f"stop: expected a text that some token contains, got {stop!r}, which this "
                f"tokenizer splits into {tokenizer.tokenize(stop)}"
            )
        ids |= containing
    ids.discard(None)
    if not ids:
        raise ValueError("the model has no end-of-sequence token; give a text to --stop at")
    return ids
