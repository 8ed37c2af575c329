"""Digit sorting: the questions, their answers and the character tokenizer of the embedded default.

`python -m pyrl.demo.task --output DIR` writes the packaged question files again, byte for byte.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"
SYMBOLS = "0123456789+*=<>:,;|abcdefghij"
"""One token each, after the pad and the end token: 31 tokens. Digits and `=` are used here."""


@dataclass(frozen=True)
class Split:
    """One question file: `count` questions at each of `lengths`."""

    name: str
    lengths: tuple[int, ...]
    count: int


SPLITS = (
    Split("train", lengths=(15, 16, 17), count=128),
    Split("heldout", lengths=(15, 16, 17), count=100),
    Split("length18", lengths=(18,), count=100),
)
SPLITS_SEED = 20


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; characters outside `SYMBOLS` are read as the pad token."""
    vocabulary = {token: index for index, token in enumerate((PAD, END, *SYMBOLS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def draw_questions(
    rng: np.random.Generator, length: int, count: int, exclude: frozenset[str] = frozenset()
) -> list[str]:
    """`count` distinct questions of `length` uniform digits, none of them in `exclude`."""
    questions: dict[str, None] = {}
    while len(questions) < count:
        question = "".join(map(str, rng.integers(0, 10, length))) + "="
        if question not in exclude:
            questions[question] = None
    return list(questions)


def solve(question: str) -> str:
    """The digits of a question in ascending order."""
    return "".join(sorted(question.removesuffix("=")))


def write_splits(output: Path) -> None:
    """Write one JSON Lines file per split; no question occurs twice, within or across files.

    Lengths alternate from row to row, so that any run of rows holds equally many of each.
    """
    rng = np.random.default_rng(SPLITS_SEED)
    drawn: frozenset[str] = frozenset()
    for split in SPLITS:
        columns = [draw_questions(rng, n, split.count, exclude=drawn) for n in split.lengths]
        questions = [question for row in zip(*columns, strict=True) for question in row]
        drawn |= set(questions)
        rows = (json.dumps({"prompt": text, "answer": solve(text)}) for text in questions)
        (output / f"{split.name}.jsonl").write_text("".join(f"{row}\n" for row in rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pyrl.demo.task", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for the files")
    output: Path = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    write_splits(output)


if __name__ == "__main__":
    main()
