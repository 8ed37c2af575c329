"""The executor inside OpenRLHF's own actor, and its advantages in OpenRLHF's experience."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openrlhf_host import (
    arguments,
    door,
    experience_maker,
    openrlhf_trees,
    samples_generator,
    vllm_engine,
)
from whole_replies import Server, forking, tokenizer

from pyrl.methods import METHODS

AGENT = """
from pyrl.hosts.openrlhf import TreeExecutor
from whole_replies import forking

class AgentExecutor(TreeExecutor):
    algorithm = forking()
    extractor, equivalence = "whole", "exact"
"""


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """What `install` changes is put back."""
    generator, maker = samples_generator.SamplesGenerator, experience_maker.RemoteExperienceMaker
    kept = [
        (generator, "_process_response_into_experience"),
        (generator, "generate_eval_samples"),
        (maker, "compute_advantages_and_returns"),
    ]
    before = [vars(owner)[name] for owner, name in kept]
    door.install()
    yield
    for (owner, name), method in zip(kept, before, strict=True):
        setattr(owner, name, method)


def sampling(**options: Any) -> Any:
    given = {"temperature": 1.0, "max_tokens": None, "logprobs": None} | options
    return SimpleNamespace(**given)


def actor(executor: Any, server: Server, **kwargs: Any) -> Any:
    """OpenRLHF's actor over a toy model."""
    made = object.__new__(vllm_engine.RolloutRayActor)
    made.executor, made.kwargs, made.asked = executor, kwargs, []

    async def generate(token_ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        made.asked.append(params)
        token_T, logprob_T = await server.reply(token_ids, params.max_tokens)
        told = [
            {token: SimpleNamespace(logprob=logprob)}
            for token, logprob in zip(token_T.tolist(), logprob_T.tolist(), strict=True)
        ]
        ended = "stop" if token_T[-1] == 0 else "length"
        output = SimpleNamespace(token_ids=token_T.tolist(), logprobs=told, finish_reason=ended)
        return SimpleNamespace(outputs=[output])

    made.generate = generate
    return made


def executor(tmp_path: Path) -> Any:
    """As OpenRLHF loads it from the file of `--train.agent_func_path`."""
    path = tmp_path / "tree_agent.py"
    path.write_text(AGENT)
    return vllm_engine._load_agent_executor(str(path))


def responses(
    made: Any, *prompts: str, samples: int = 13, label: Any = "b", **options: Any
) -> list[list[dict[str, Any]]]:
    """As OpenRLHF asks an actor for several prompts at once."""

    async def run() -> Any:
        calls = [
            made.generate_responses(prompt, label, sampling(**options), 32, tokenizer(), samples)
            for prompt in prompts
        ]
        return await asyncio.gather(*calls)

    found: list[list[dict[str, Any]]] = asyncio.run(run())
    return found


def test_calls_for_a_prompt_share_a_tree_of_as_many_leaves(tmp_path: Path) -> None:
    server = Server()
    (group,) = responses(actor(executor(tmp_path), server), "a b")
    assert len(group) == len(server.asked) == 13
    assert len({tuple(row["observation_tokens"]) for row in group}) > 6
    assert any(len(prompt) > 2 for prompt, _ in server.asked)
    for row in group:
        ((begin, end),) = row["action_ranges"]
        lengths = {len(row[n]) for n in ("observation_tokens", "rollout_log_probs", "advantages")}
        assert (begin, lengths) == (2, {end})
        assert row["truncated"] == (row["observation_tokens"][-1] != 0)
        assert row["observation_tokens"][:2] == [1, 2]
        assert row["advantages"][:2] == [0, 0]


def test_prompts_at_the_same_time_have_a_tree_each(tmp_path: Path) -> None:
    server = Server()
    made = actor(executor(tmp_path), server)
    first, second = responses(made, "a b", "a c", samples=5)
    assert {tuple(row["observation_tokens"][:2]) for row in first} == {(1, 2)}
    assert {tuple(row["observation_tokens"][:2]) for row in second} == {(1, 3)}
    assert made.executor._gathering._groups == {}
    assert len(responses(made, "a b", samples=3)[0]) == 3


def test_evaluations_have_independent_answers_that_the_label_grades(tmp_path: Path) -> None:
    def graded(label: str) -> tuple[list[str | None], list[float], Server]:
        server = Server()
        held = openrlhf_trees.Held(label)
        (group,) = responses(actor(executor(tmp_path), server), "a b", label=held)
        rows = [row["observation_tokens"][2:] for row in group]
        texts = [tokenizer().decode(row, skip_special_tokens=True) for row in rows]
        ended = [t if row[-1] == 0 else None for t, row in zip(texts, rows, strict=True)]
        return ended, [row["reward"] for row in group], server

    texts, _, server = graded("nothing")
    assert {len(prompt) for prompt, _ in server.asked} == {2}
    label = next(text for text in texts if text)
    again, rewards, _ = graded(label)
    assert again == texts
    assert rewards == [float(text == label) for text in texts]


def experiences(rows: list[dict[str, Any]], args: Any) -> tuple[list[Any], Any]:
    """From responses to the experience of a step, with OpenRLHF's own code but for its models."""
    generator = object.__new__(samples_generator.SamplesGenerator)
    samples = [generator._process_response_into_experience(row, max_len=32) for row in rows]
    maker = object.__new__(experience_maker.RemoteExperienceMaker)
    maker.args, maker.strategy = args, SimpleNamespace(args=args)
    maker.advantage_estimator = args.algo.advantage.estimator
    maker.tokenizer, maker.kl_ctl = tokenizer(), SimpleNamespace(value=0.0)
    batches = maker.split_rollout_samples(samples)
    for batch in batches:
        batch.kl = torch.zeros(batch.action_mask.shape)
    return batches, maker


def test_advantages_arrive_in_openrlhfs_experience_token_by_token(tmp_path: Path) -> None:
    (group,) = responses(actor(executor(tmp_path), Server(seed=2)), "a b")
    batches, maker = experiences(group, arguments())
    made = maker.compute_advantages_and_returns(batches)
    assert [len(batch.advantages) for batch in made] == [4, 4, 4, 1]
    rows = [row for batch in made for row in batch.advantages]
    masks = [row for batch in made for row in batch.action_mask.bool()]
    several = 0
    for row, mask, response in zip(rows, masks, group, strict=True):
        expected = torch.tensor(response["advantages"][2:], dtype=torch.float32)
        torch.testing.assert_close(row[mask], expected)
        assert not row[~mask].any()
        several += len({*row[mask].tolist()}) > 1
    assert several > 0
    assert made[0].info["reward"].tolist() == [row["reward"] for row in group[:4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "group_norm"}, "^--algo.advantage.estimator: expected reinforce with trees"),
        ({"init_coef": 0.1}, "^--algo.kl.init_coef: expected 0 with trees .*use_loss"),
        ({"overlong_buffer_len": 9}, "^--reward.overlong_buffer_len: expected None .* got 9"),
    ],
)
def test_options_that_contradict_trees_are_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (group,) = responses(actor(executor(tmp_path), Server()), "a b", samples=2)
    args = arguments(n_samples_per_prompt=2, **options)
    batches, maker = experiences(group, args)
    with pytest.raises(ValueError, match=message):
        maker.compute_advantages_and_returns(batches)


def test_responses_of_another_executor_are_refused(tmp_path: Path) -> None:
    (group,) = responses(actor(executor(tmp_path), Server()), "a b", samples=2)
    for row in group:
        del row["advantages"]
    batches, maker = experiences(group, arguments(n_samples_per_prompt=2))
    with pytest.raises(ValueError, match=r"^--train.agent_func_path: expected .*TreeExecutor"):
        maker.compute_advantages_and_returns(batches)


def test_logprobs_of_another_temperature_are_left_out(tmp_path: Path) -> None:
    made = actor(executor(tmp_path), Server())
    (warm,) = responses(made, "a b", samples=2, temperature=0.6)
    assert [row["rollout_log_probs"] for row in warm] == [None, None]
    made.kwargs["logprobs_mode"] = "processed_logprobs"
    (same,) = responses(made, "a b", samples=2, temperature=0.6)
    assert all(row["rollout_log_probs"] for row in same)
    assert {params.logprobs for params in made.asked} == {1}


def test_a_method_that_openrlhf_cannot_carry_is_refused_when_the_file_is_loaded() -> None:
    class Echo(door.TreeExecutor):
        algorithm = METHODS["echo"]()

    with pytest.raises(ValueError, match=r"^fork: expected a choice that works in openrlhf"):
        Echo()


def test_groups_of_another_size_are_refused(tmp_path: Path) -> None:
    class Fewer:
        def __call__(self, leaves: Any, train: int) -> Any:
            return torch.arange(train - 1).numpy()

    made = executor(tmp_path)
    made.algorithm = replace(forking(), select=Fewer())
    with pytest.raises(ValueError, match=r"^select: expected all 13 leaves .*got 12"):
        responses(actor(made, Server()), "a b")


def test_a_prompt_without_room_for_a_response_is_refused(tmp_path: Path) -> None:
    prompt = " ".join(["a"] * 32)
    with pytest.raises(ValueError, match=r"^--data.max_len: expected room .* 32 tokens, got 32"):
        responses(actor(executor(tmp_path), Server()), prompt)
