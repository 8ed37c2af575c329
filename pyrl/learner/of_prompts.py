"""Of prompts: how probable the learner finds the questions themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pyrl.pack import TokenBatch, pack_given


def of_prompts(
    batch: TokenBatch, read: Callable[[TokenBatch], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The mean log-prob of its prompt's tokens but the first for each response token [T].

    `read` gives the log-probs [T] of the responses of a batch.
    """
    own_N, place_N = np.diff(batch.token_offset_N1), batch.input_offset_N1
    prompt_N = [
        batch.input_I[begin : end - own]
        for begin, end, own in zip(place_N[:-1], place_N[1:], own_N, strict=True)
    ]
    place = {prompt.tobytes(): prompt for prompt in prompt_N if prompt.size > 1}
    if not place:
        return np.zeros(len(batch.label_T))
    asked = pack_given(
        [prompt[:1].astype(np.int32) for prompt in place.values()],
        [prompt[1:] for prompt in place.values()],
    )
    total = np.bincount(asked.leaf_T, read(asked))
    mean = dict(zip(place, total / np.diff(asked.token_offset_N1), strict=True))
    return np.repeat([mean.get(prompt.tobytes(), 0.0) for prompt in prompt_N], own_N)
