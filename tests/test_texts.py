"""Spans and steps of tokens against slow versions, with tokenizers that split characters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leaf_records import leaves_of, spell
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pyrl.texts import BROKEN, Decode, Texts

WORDS = ["\N{LOWER ONE EIGHTH BLOCK}It", "\N{LOWER ONE EIGHTH BLOCK}is", "n", "ot", ".", "é"]


def bytewise() -> Tokenizer:
    """A token is a byte; id 256 is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def spaced() -> Tokenizer:
    """A token carries the space before it, which a text's first one loses."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "n"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def decode_by(tokenizer: Tokenizer) -> Decode:
    return lambda rows: [tokenizer.decode(row.tolist()) for row in rows]


def texts_of(tokenizer: Tokenizer, responses: Sequence[Sequence[int]]) -> Texts:
    decode = decode_by(tokenizer)
    token_N = tuple(np.array(response, np.int32) for response in responses)
    return Texts(tuple(decode(token_N)), token_N, decode)


def slow_ends(texts: Texts, n: int) -> list[int]:
    """How much of the text the tokens up to each one spell; all of it at the end."""
    text, tokens = texts.text_N[n], texts.token_N[n]
    begun = texts.decode([tokens[:stop] for stop in range(1, len(tokens))])
    ends = [len(part.rstrip(BROKEN)) for part in begun]
    assert all(text.startswith(part.rstrip(BROKEN)) for part in begun)
    return [*ends, len(text)] if len(tokens) else []


def spans(texts: Texts) -> list[NDArray[np.int64]]:
    stops = np.cumsum([len(tokens) for tokens in texts.token_N])
    return np.split(texts.span_T2, stops[:-1])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text("aé≤🙂 ", max_size=6), min_size=1, max_size=3), st.integers(0, 3))
def test_characters_belong_to_the_token_that_completes_them(written: list[str], cut: int) -> None:
    tokenizer = bytewise()
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    responses = []
    for text in written:
        letters = "".join(part for part, _ in encode.pre_tokenize_str(text)) if text else ""
        ids = [tokenizer.token_to_id(letter) for letter in letters]
        responses.append([*ids[: len(ids) - cut], 256])
    texts = texts_of(tokenizer, responses)
    for n, span_T2 in enumerate(spans(texts)):
        assert span_T2[:, 1].tolist() == slow_ends(texts, n)
        assert span_T2[:, 0].tolist() == [0, *span_T2[:-1, 1].tolist()]
        assert span_T2[-1, 1] == len(texts.text_N[n])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=3))
def test_a_space_that_a_first_token_loses_is_found(responses: list[list[int]]) -> None:
    texts = texts_of(spaced(), responses)
    for n, span_T2 in enumerate(spans(texts)):
        assert span_T2[:, 1].tolist() == slow_ends(texts, n)


def test_tokens_that_do_not_spell_their_text_are_refused() -> None:
    texts = Texts(("abc",), (np.array([97, 98, 100], np.int32),), spell)
    with pytest.raises(ValueError, match=r"span_T2: expected tokens that spell .* got 'abd' for"):
        _ = texts.span_T2


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        ("ab--c--d", "--", "00001112"),
        ("a--", "--", "000"),
        ("--a", "--", "001"),
        ("a----b", "--", "000112"),
        ("a--b", "\n\n", "0000"),
    ],
)
def test_a_step_ends_with_its_separator(text: str, separator: str, steps: str) -> None:
    texts = leaves_of([text, "", text]).texts
    assert "".join(map(str, texts.steps(separator))) == steps * 2


def test_a_token_belongs_to_the_step_in_which_it_begins() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a\n": 0, "\n\n": 1, "\nb": 2, "c\n\nd\n\ne": 3}, "c"))
    tokenizer.decoder = decoders.Fuse()
    texts = texts_of(tokenizer, [[0, 2, 1, 2, 3, 2], []])
    assert texts.text_N[0] == "a\n\nb\n\n\nbc\n\nd\n\ne\nb"
    assert texts.steps().tolist() == [0, 0, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="separator: expected a text, got an empty one"):
        texts.steps("")


def test_nothing_is_decoded_before_it_is_read() -> None:
    calls: list[int] = []

    def decode(rows: Sequence[NDArray[np.int32]]) -> list[str]:
        calls.append(len(rows))
        return spell(rows)

    leaves = leaves_of(["ab", "bc"])
    texts = Texts(leaves.text_N, leaves.token_N, decode)
    assert calls == []
    assert texts.span_T2.tolist() == [[0, 1], [1, 2]] * 2
    assert texts.steps("b").tolist() == [0, 0, 0, 1]
    assert calls == [3]
