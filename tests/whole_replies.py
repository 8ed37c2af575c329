"""A host's server on a toy model: whole responses to prefixes, and a tokenizer of six words."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from toy_rollout import EOS, random_toy
from transformers import PreTrainedTokenizerFast

from pyrl.algorithm import Algorithm, Sample
from pyrl.fork import EPTree
from pyrl.methods.treerl import treerl
from pyrl.select import First

WORDS = ("end", "a", "b", "c", "d", "e")
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end")
    made.chat_template = TEMPLATE
    return made


def forking() -> Algorithm:
    """Two whole trunks of five leaves, and three more leaves: no multiple of a trunk's."""
    return replace(
        treerl(),
        sample=Sample(votes=13, train=13, max_tokens=30),
        fork=EPTree(forks=2, siblings=2, mask_tail=0),
        select=First(),
    )


@dataclass
class Server:
    """Draws responses from a bigram model, each request after another wait.

    What follows a prefix depends on it, and on how often it was asked before, not on the order in
    which requests of different prefixes arrive.
    """

    seed: int = 0
    asked: list[tuple[list[int], int]] = field(default_factory=list)
    """Prompts of requests in their order, with the most tokens that they ask for."""

    def __post_init__(self) -> None:
        self.transition_VV = np.exp(random_toy(end=0.05)._log_VV.numpy())

    async def reply(
        self, token_ids: list[int], limit: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Tokens up to EOS or the limit, and their log-probs."""
        again = sum(prompt == token_ids for prompt, _ in self.asked)
        self.asked.append(([*token_ids], limit))
        random = np.random.default_rng([self.seed, again, *token_ids])
        await asyncio.sleep(0.001 * random.integers(3))
        tokens: list[int] = []
        last = token_ids[-1]
        while len(tokens) < limit and last != EOS:
            last = int(random.choice(len(WORDS), p=self.transition_VV[last]))
            tokens.append(last)
        before = [token_ids[-1], *tokens[:-1]]
        logprobs = np.log(self.transition_VV[before, tokens])
        return np.array(tokens, np.int32), logprobs.astype(np.float32)
