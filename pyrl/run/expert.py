"""Expert: the responses of a column of the data that a loss compares the policy's own with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pyrl.loss import Loss
from pyrl.pack import TokenBatch, pack_given
from pyrl.prompts import Prompt


class Experts:
    """An expert's response to each question; none where the loss reads none."""

    def __init__(
        self,
        loss: Loss,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        data: str,
    ) -> None:
        """Tokenize the column that the loss names; of a response `max_tokens` count at most.

        ValueError names the column, and a question that has no text in it.
        """
        self.responses: list[NDArray[np.int64]] | None = None
        """By `Prompt.index`, with an end token."""
        if loss.expert is None:
            return
        column, end = loss.expert.expert, tokenizer.eos_token_id
        texts = [prompt.columns.get(column) for prompt in prompts]
        self.responses = []
        for prompt, text in zip(prompts, texts, strict=True):
            if not isinstance(text, str) or not text:
                others = ", ".join(name for name in prompt.columns if name != column) or "none"
                raise ValueError(
                    f"{data}: loss.penalties: ExpertLeak needs an expert's response to each "
                    f"question in the column {column!r} (--loss.penalties.expert-leak.expert), "
                    f"got {text!r} for question {prompt.index}; its other columns: {others}"
                )
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
            self.responses.append(np.array(ids[:max_tokens], np.int64))

    def __call__(self, prompts: Sequence[Prompt]) -> TokenBatch | None:
        """The experts' responses to the questions of a step, in their order."""
        if self.responses is None:
            return None
        responses = [self.responses[prompt.index] for prompt in prompts]
        return pack_given([prompt.tokens for prompt in prompts], responses)
