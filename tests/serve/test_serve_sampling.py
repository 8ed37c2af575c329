"""What clients sample, and what they are told of it."""

from __future__ import annotations

import pytest
import tinker
import torch
from learner_batch import demo_model
from tinker import types
from tinker_server import Server, prompt, ready, served_name

PROMPT = [5, 3, 6, 4, 14]


def sampler(server: Server) -> tinker.SamplingClient:
    return ready(server.client().create_sampling_client(base_model=served_name()))


def logprobs(ids: list[int]) -> torch.Tensor:
    """Log-probs [I, V] of each place's next token by transformers alone."""
    with torch.no_grad():
        found: torch.Tensor = demo_model(torch.float32)(input_ids=torch.tensor([ids])).logits[0]
    return found.log_softmax(-1)


def test_a_seed_repeats_its_samples_and_their_logprobs_are_the_model_s(server: Server) -> None:
    client = sampler(server)
    params = types.SamplingParams(max_tokens=6, seed=7, stop=[], temperature=1.0)
    first, again = (client.sample(prompt([5]), 5, params).result() for _ in range(2))
    tokens = [[int(t) for t in sample.tokens] for sample in first.sequences]
    assert tokens == [[int(t) for t in sample.tokens] for sample in again.sequences]
    assert len({*map(tuple, tokens)}) > 1
    for sample in first.sequences:
        assert sample.stop_reason == "length"
        ids = [5, *(int(t) for t in sample.tokens)]
        expected = logprobs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert sample.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_token_a_text_or_the_model_s_end_ends_a_sample(server: Server) -> None:
    client = sampler(server)
    greedy = {"max_tokens": 8, "temperature": 0.0}
    free = types.SamplingParams(stop=[], **greedy)
    whole = [int(t) for t in client.sample(prompt(PROMPT), 1, free).result().sequences[0].tokens]
    assert len(whole) == 8

    def stopped(stop: object) -> list[int]:
        params = types.SamplingParams(stop=stop, **greedy)
        sample = client.sample(prompt(PROMPT), 1, params).result().sequences[0]
        assert sample.stop_reason == "stop"
        return [int(t) for t in sample.tokens]

    assert stopped([whole[1]]) == whole[: whole.index(whole[1]) + 1]
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(served_name()).decode(whole[2:4])
    assert stopped(text) == whole[:4]
    assert len(stopped(None)) < 8


def test_the_prompt_is_scored_and_top_tokens_are_told(server: Server) -> None:
    client = sampler(server)
    params = types.SamplingParams(max_tokens=2, seed=1, stop=[])
    asked = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 3}
    told = client.sample(prompt(PROMPT), 1, params, **asked).result()
    own = logprobs(PROMPT)
    expected = own[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()
    assert told.prompt_logprobs[0] is None
    assert told.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    top = own.topk(3)
    assert told.topk_prompt_logprobs[0] is None
    for place, row in enumerate(told.topk_prompt_logprobs[1:]):
        assert [token for token, _ in row] == top.indices[place].tolist()
        assert [p for _, p in row] == pytest.approx(top.values[place].tolist(), abs=1e-4)
