"""Trees over a host's servers: rollouts over an engine of whole requests, and what is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from whole_replies import Server, forking, tokenizer

from pyrl.algorithm import Algorithm, Sample
from pyrl.engine import EngineError, EngineFailure
from pyrl.fork import Flat
from pyrl.hosts.requests import Reply, RequestEngine
from pyrl.hosts.served import Grower, Tree, check_algorithm
from pyrl.methods import METHODS
from pyrl.methods.registry import choose
from pyrl.prompts import Prompt

QUESTION = Prompt(0, "a b", np.array([1, 2], np.int32), None, {})
FORKING = forking()


def grown(algorithm: Algorithm, server: Server) -> Tree:
    async def ask(token_ids: list[int], limit: int) -> Reply:
        token_T, logprob_T = await server.reply(token_ids, limit)
        return Reply(token_T, logprob_T, token_T[-1] == 0)

    async def run() -> Tree:
        return await Grower(algorithm, tokenizer(), "a host", "whole", "exact").grow(QUESTION, ask)

    return asyncio.run(run())


def test_forks_are_requests_that_go_on_from_a_prefix_of_another_response() -> None:
    server = Server()
    tree = grown(FORKING, server)
    assert (len(tree.token_N), tree.votes, tree.requests) == (13, 13, 13)
    prefixes = [prompt[2:] for prompt, _ in server.asked if len(prompt) > 2]
    assert tree.forks >= 3
    assert len(prefixes) == 2 * tree.forks
    paths = [row.tolist() for row in tree.token_N]
    for prefix in prefixes:
        assert sum(path[: len(prefix)] == prefix for path in paths) >= 3  # parent and siblings
    assert all(len(prompt) - 2 + limit == 30 for prompt, limit in server.asked)


def test_leaves_carry_the_servers_tokens_and_logprobs_and_an_advantage_for_each() -> None:
    server = Server(seed=1)
    tree = grown(FORKING, server)
    for n, token_T in enumerate(tree.token_N):
        before_T = np.array([2, *token_T[:-1]])
        expected_T = np.log(server.transition_VV[before_T, token_T])
        np.testing.assert_allclose(tree.logprob_N[n], expected_T, rtol=1e-5)
        assert tree.advantage_N[n].shape == tree.train_N[n].shape == token_T.shape
        assert tree.truncated_N[n] == (token_T[-1] != 0)
        assert tree.train_N[n].all()
    sizes = {len(set(np.round(advantage_T, 9))) for advantage_T in tree.advantage_N}
    assert max(sizes) > 1, "segments of a leaf differ in their advantage"
    assert set(tree.reward_N) == {0.0, 1.0}


def test_a_tree_without_forks_is_a_flat_group() -> None:
    server = Server()
    flat = replace(choose(FORKING, advantage="grpo"), fork=Flat())
    tree = grown(flat, server)
    assert {len(prompt) for prompt, _ in server.asked} == {2}
    right = tree.reward_N == 1
    reward = (tree.reward_N - tree.reward_N.mean()) / (tree.reward_N.std(ddof=1) + 1e-6)
    assert 0 < right.sum() < 13
    assert [a[0] for a in tree.advantage_N] == pytest.approx(reward.tolist())


@pytest.mark.parametrize(("tokens", "logprobs"), [(0, 0), (31, 31), (3, 2)])
def test_a_reply_that_cannot_be_is_a_failure(tokens: int, logprobs: int) -> None:
    async def ask(token_ids: list[int], limit: int) -> Reply:
        return Reply(np.ones(tokens, np.int32), np.zeros(logprobs, np.float32), ended=False)

    async def run() -> None:
        await Grower(FORKING, tokenizer(), "a host", "whole", "exact").grow(QUESTION, ask)

    with pytest.raises(EngineFailure, match=r"expected 1 to 30 tokens and a log-prob of each, got"):
        asyncio.run(run())


def test_what_a_server_raises_comes_out_and_other_requests_are_cancelled() -> None:
    ended = []

    async def ask(token_ids: list[int], limit: int) -> Reply:
        if not ended:
            ended.append("first")
            raise ConnectionError("gone")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        raise AssertionError

    async def run() -> None:
        with pytest.raises(ConnectionError, match="gone"):
            await Grower(FORKING, tokenizer(), "a host", "whole", "exact").grow(QUESTION, ask)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert ended == ["first", "cancelled"]


def test_an_engine_of_requests_cannot_leave_out_tokens_nor_take_weights() -> None:
    async def run() -> None:
        async def ask(token_ids: list[int], limit: int) -> Reply:
            raise AssertionError

        engine = RequestEngine(ask, asyncio.get_running_loop())
        with pytest.raises(EngineError, match="load_weights"):
            engine.load_weights(None, 1)
        with pytest.raises(ValueError, match="branch 7 is unknown"):
            engine.fork(7, 0, np.array([8]), np.array([1], np.uint64))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "choices", "message"),
    [
        ("echo", {}, "fork: .* EntropyConfidence: it needs entropy and confidence"),
        ("ettrl", {}, "fork: .* TopEntropy: it needs entropy_T, which the host's servers"),
        ("grpo_unique", {}, "fork: .* WithoutReplacement: it needs the mass"),
        ("ttrl", {"prune": "doubt"}, "prune: .* Doubt: it needs entropy and confidence"),
        ("ttrl", {"fork": "aepo_agentic"}, "fork: .* Probed: it needs entropy_T"),
        ("ttrl", {"vote": "judger"}, "vote: .* Judger: it needs entropy_T"),
        ("aepo", {}, "temper.share: expected 0 in verl"),
        ("ttrl", {"vote": "confidence"}, "vote: .* Weighted: it needs confidence_N"),
        ("ttrl", {"advantage": "grpo,hybrid"}, "advantage: .* Hybrid: it needs entropy_T"),
        ("riskpo", {}, "advantage: .* MixedRisk: it remembers earlier steps"),
        ("ttrl_guard", {}, "reward: .* GuardedReward: it remembers earlier steps"),
        ("spear", {}, "replay.capacity: expected 0 in verl, whose updates have the responses"),
        ("ttrl", {"advantage": "g2rpo"}, "advantage: .* RankNormal: it compares all prompts"),
        ("ttrl", {"advantage": "treepo"}, "advantage: .* WhitenTokens: it compares all prompts"),
    ],
)
def test_choices_that_need_more_than_a_host_gives_are_refused_by_name(
    method: str, choices: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_algorithm(choose(METHODS[method](), **choices), "verl")


def test_budgets_that_end_a_prompt_early_are_refused() -> None:
    limits = ({"max_tokens_per_prompt": 99}, {"max_seconds": 1.0}, {"stop_when_decided": True})
    for limit in (*limits, {"even": True}):
        algorithm = replace(METHODS["ttrl"](), sample=Sample(votes=4, train=2, **limit))
        with pytest.raises(
            ValueError, match=rf"^sample.{next(iter(limit))}: expected none in verl"
        ):
            check_algorithm(algorithm, "verl")
