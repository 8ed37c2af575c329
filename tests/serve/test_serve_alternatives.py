"""What only newer releases of the SDK can ask for: alternative tokens, top log-probs of samples."""

from __future__ import annotations

import numpy as np
import pytest
from test_serve_sampling import PROMPT, logprobs, sampler
from tinker import types
from tinker_server import Server, prompt


def test_alternative_tokens_are_draws_of_the_policy(server: Server) -> None:
    client = sampler(server)
    params = types.SamplingParams(max_tokens=3, seed=3, stop=[])
    asked = {"prompt_alt_tokens_k": 100, "topk_sample_logprobs": 2}
    told = client.sample(prompt(PROMPT), 1, params, **asked).result()
    drawn = np.array(told.prompt_alt_tokens.tokens.data).reshape(len(PROMPT) - 1, 100)
    said = np.array(told.prompt_alt_tokens.logprobs.data).reshape(drawn.shape)
    own = logprobs(PROMPT)[:-1].numpy()
    assert said == pytest.approx(np.take_along_axis(own, drawn, 1), abs=1e-4)
    for place in range(len(drawn)):
        share_V = np.bincount(drawn[place], minlength=own.shape[1]) / 100
        # Total variation of 100 draws: of another distribution it would be far above this.
        assert np.abs(share_V - np.exp(own[place])).sum() / 2 < 0.25
    sample = told.sequences[0]
    for token, logprob, row in zip(
        sample.tokens, sample.logprobs, sample.topk_logprobs, strict=True
    ):
        assert len(row) == 2
        assert row[0][1] >= row[1][1]
        if token == row[0][0]:
            assert logprob == pytest.approx(row[0][1], abs=1e-4)
        assert logprob <= row[0][1] + 1e-4
