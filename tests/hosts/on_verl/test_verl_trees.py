"""The agent loop inside verl's own worker: from prompts to the advantages that verl trains on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from verl_host import (
    DataProto,
    OmegaConf,
    agent_loop,
    agent_loop_tq,
    ray_trainer,
    replica,
    tensordict_utils,
    verl_trees,
)
from whole_replies import Server, forking, tokenizer

from pyrl.algorithm import Algorithm

ROW = {
    "raw_prompt": [{"role": "user", "content": "a b"}],
    "uid": "question",
    "data_source": "toy",
    "reward_model": {"style": "rule", "ground_truth": "b"},
    "global_steps": 3,
    "index": 0,
}
ENTRY = {
    "name": "pyrl",
    "_target_": "pyrl.hosts.verl_trees.TreeAgentLoop",
    "algorithm": {"_target_": "whole_replies.forking"},
    "votes": 13,
    "extractor": "whole",
    "equivalence": "exact",
}


class Manager:
    """verl's server manager over a toy model."""

    def __init__(self, **told: Any) -> None:
        self.server, self.told, self.sampling = Server(), told, []
        self.sessions: set[str] = set()

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> Any:
        self.sessions.add(request_id)
        limit = sampling_params.pop("max_tokens", 30)
        self.sampling.append(sampling_params)
        token_T, logprob_T = await self.server.reply(prompt_ids, limit)
        extra = {"min_global_steps": 2, "max_global_steps": 3}
        output = {"token_ids": token_T.tolist(), "log_probs": logprob_T.tolist()}
        return replica.TokenOutput(
            **output | {"stop_reason": "completed", "extra_fields": extra} | self.told
        )


class Queue:
    """verl's queue of trajectories, in memory."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, Any] = {}

    async def async_kv_put(self, key: str, partition_id: str, tag: dict[str, Any]) -> None:
        self.tags[key] = tag

    async def async_kv_batch_put(
        self, keys: list[str], fields: Any, tags: list[dict[str, Any]], partition_id: str
    ) -> None:
        self.tags |= dict(zip(keys, tags, strict=True))
        self.rows |= {key: dict(fields[i].items()) for i, key in enumerate(keys)}

    @property
    def fields(self) -> Any:
        """All rows, as verl's trainer gets them."""
        return tensordict_utils.list_of_dict_to_tensordict([*self.rows.values()])


def config(**options: Any) -> Any:
    """verl's configuration, as far as the loop reads it."""
    made = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "rollout": {
                    "n": 11,
                    "name": "vllm",
                    "temperature": 1.0,
                    "top_p": 1,
                    "top_k": -1,
                    "prompt_length": 4,
                    "response_length": 30,
                    "calculate_log_probs": True,
                    "full_determinism": False,
                    "val_kwargs": {"temperature": 0, "top_p": 1.0, "top_k": -1, "n": 2},
                },
                "actor": {"policy_loss": {"loss_mode": "pyrl/cispo"}},
                "model": {"path": "toy", "tokenizer_path": None},
            },
            "algorithm": {"adv_estimator": "pyrl/given", "use_kl_in_reward": False},
            "trainer": {"use_v1": True},
            "reward": {"reward_model": {"enable": False}},
            "data": {"continuous_token": {"enable": False, "model_family": None}},
        }
    )
    for name, value in options.items():
        OmegaConf.update(made, name.replace("__", "."), value)
    return made


def worker(
    settings: Any, entry: dict[str, Any], manager: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Queue]:
    """verl's worker of agent loops without the parts that load a model."""
    queue = Queue()
    monkeypatch.setattr(agent_loop_tq, "tq", queue)
    monkeypatch.setitem(agent_loop._agent_loop_registry, "pyrl", OmegaConf.create(entry))
    made = object.__new__(agent_loop_tq.AgentLoopWorkerTQ)
    words = tokenizer()
    made.__dict__.update(
        config=settings,
        rollout_config=settings.actor_rollout_ref.rollout,
        llm_client=manager,
        server_manager=manager,
        tokenizer=words,
        processor=None,
        hf_model_type=None,
        dataset_cls=None,
        tools=[],
        distillation_enabled=False,
        reward_loop_worker_handles=None,
    )
    return made, queue


def rollout(
    manager: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    entry: dict[str, Any] = ENTRY,
    validate: bool = False,
) -> Queue:
    settings = config()
    made, queue = worker(settings, entry, manager, monkeypatch)
    options = settings.actor_rollout_ref.rollout
    source = options.val_kwargs if validate else options
    sampling = {name: source[name] for name in verl_trees.SAMPLING}
    trajectory = {"step": 3, "sample_index": 0, "rollout_n": 0, "validate": validate}
    prompt = {**ROW, "agent_name": "pyrl"}
    asyncio.run(made._run_prompt(prompt, sampling | {"logprobs": True}, trajectory))
    return queue


def test_a_prompt_becomes_the_leaves_of_a_tree_in_the_queue_of_verl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = Manager()
    queue = rollout(manager, monkeypatch)
    assert queue.tags["question"] == {"status": "finished"}
    assert [*queue.rows] == [f"question_{session}_0" for session in range(11)]
    assert len(manager.server.asked) == 13
    forks = [prompt for prompt, _ in manager.server.asked if len(prompt) > 2]
    assert len(forks) > 2
    assert len(manager.sessions) == 1, "all requests go to the server that has the prefixes"
    assert manager.sampling[0] == {"temperature": 1.0, "top_p": 1, "top_k": -1, "logprobs": True}
    lengths = queue.fields["responses"].offsets().diff().tolist()
    assert len({*lengths}) > 2, "leaves are ragged"
    for name in ("rm_scores", "response_mask", "rollout_log_probs"):
        assert queue.fields[name].offsets().diff().tolist() == lengths
    tag = queue.tags["question_0_0"]
    assert (tag["min_global_steps"], tag["max_global_steps"]) == (2, 3)
    assert queue.fields["prompts"][0].tolist() == [1, 2]


def test_a_method_and_its_choices_are_named_in_the_file_of_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = {name: ENTRY[name] for name in ("name", "_target_", "extractor", "equivalence")}
    entry |= {"method": "ttrl", "choices": {"vote": "inverse_width"}}
    manager = Manager()
    queue = rollout(manager, monkeypatch, entry=entry)
    assert [prompt for prompt, _ in manager.server.asked] == [[1, 2]] * 11
    assert len(queue.fields) == 11
    for wrong in ({"method": "echo"}, {"votes": 5}):
        failed = rollout(manager, monkeypatch, entry=entry | wrong)
        assert failed.tags["question"] == {"status": "failure"}


def test_advantages_arrive_at_verls_learner_token_by_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trees = []
    grow = verl_trees.Grower.grow

    async def kept(self: Any, *arguments: Any) -> Any:
        trees.append(await grow(self, *arguments))
        return trees[-1]

    monkeypatch.setattr(verl_trees.Grower, "grow", kept)
    queue = rollout(Manager(), monkeypatch)
    fields = queue.fields.select("rm_scores", "response_mask").to_padded_tensor()
    data = DataProto(batch=fields)
    data.batch["token_level_rewards"] = data.batch["rm_scores"]
    data.non_tensor_batch["uid"] = np.array(["question"] * len(data), dtype=object)
    made = ray_trainer.compute_advantage(data, "pyrl/given", config={})
    (tree,) = trees
    for n, advantage_T in enumerate(tree.advantage_N):
        padded = made.batch["advantages"][n]
        torch.testing.assert_close(
            padded[: len(advantage_T)], torch.from_numpy(advantage_T).float()
        )
        assert not padded[len(advantage_T) :].any()
    assert max(len({*np.round(a, 6)}) for a in tree.advantage_N) > 1


def test_validation_is_verls_own_single_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager()
    queue = rollout(manager, monkeypatch, validate=True)
    assert [prompt for prompt, _ in manager.server.asked] == [[1, 2], [1, 2]]
    assert len(queue.fields) == 2
    assert "rm_scores" not in queue.fields


@pytest.mark.parametrize(
    "told", [{"stop_reason": "aborted"}, {"log_probs": None}], ids=["aborted", "no log-probs"]
)
def test_a_response_that_cannot_train_fails_the_prompt(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = rollout(Manager(**told), monkeypatch)
    assert queue.tags["question"] == {"status": "failure"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actor_rollout_ref__rollout__n": 1}, "^rollout.n: expected the leaves .* got 1"),
        (
            {"actor_rollout_ref__rollout__full_determinism": True},
            "^rollout.full_determinism: expected False with trees .siblings would be equal",
        ),
        ({"trainer__use_v1": False}, "^trainer.use_v1: expected True with trees"),
        ({"algorithm__use_kl_in_reward": True}, "^algorithm.use_kl_in_reward: expected False"),
        ({"algorithm__adv_estimator": "grpo"}, r"^algorithm.adv_estimator: .*given.*got grpo"),
        ({"algorithm__adv_estimator": "pyrl/grpo"}, "pyrl/whiten.*got pyrl/grpo"),
        (
            {"actor_rollout_ref__actor__policy_loss__loss_mode": "pyrl/gsop"},
            "^there is no policy_loss.loss_mode 'pyrl/gsop'; the nearest is 'pyrl/gspo'",
        ),
        (
            {"actor_rollout_ref__actor__policy_loss__loss_mode": "pyrl/steer"},
            "^policy_loss.loss_mode: pyrl/steer: it needs the entropy of each token",
        ),
        (
            {"actor_rollout_ref__rollout__val_kwargs__temperature": 1.0},
            "^rollout.val_kwargs: expected another temperature",
        ),
        ({"reward__reward_model__enable": True}, "^reward.reward_model.enable: expected False"),
        (
            {"actor_rollout_ref__rollout__calculate_log_probs": False},
            "^rollout.calculate_log_probs: expected True",
        ),
    ],
)
def test_options_that_contradict_trees_are_refused_by_name(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verl_trees.check_config(config(**options))


def test_prompts_that_verl_would_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROW, "raw_prompt", [{"role": "user", "content": "a b a b a"}])
    queue = rollout(Manager(), monkeypatch)
    assert queue.tags["question"] == {"status": "failure"}


class Fewer:
    """Selects seven leaves, whatever is asked for."""

    def __call__(self, leaves: Any, train: int) -> Any:
        return np.arange(7)


def fewer() -> Algorithm:
    return replace(forking(), select=Fewer())


def test_a_tree_may_have_fewer_leaves_than_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whole_replies.fewer", fewer, raising=False)
    entry = ENTRY | {"algorithm": {"_target_": "whole_replies.fewer"}}
    queue = rollout(Manager(), monkeypatch, entry=entry)
    assert queue.tags["question"] == {"status": "finished"}
    assert len(queue.rows) == 7
