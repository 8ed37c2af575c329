"""Trees in verl 0.9: agent loops that share the tree of a prompt, and give a leaf each.

They ask verl's server manager for whole responses; a fork is a request that goes on from a prefix,
which a server with a cache of prefixes does not compute again. Advantages of tokens travel as
rewards of tokens (`rm_scores`), and an estimator such as `pyrl/given` leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from pyrl.algorithm import Algorithm
from pyrl.checks import one_of
from pyrl.engine import EngineFailure
from pyrl.hosts import verl as door
from pyrl.hosts.requests import Ask, Reply
from pyrl.hosts.served import Gathering, Grower, Tree
from pyrl.hosts.versions import require
from pyrl.methods.registry import Registry, choose
from pyrl.prompts import Prompt
from pyrl.prompts.chat import last_user, read_messages

require("verl")
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopMetrics,
    AgentLoopOutput,
)
from verl.experimental.agent_loop.single_turn_agent_loop import (
    SingleTurnAgentLoop,
)
from verl.trainer.ppo import core_algos

STEPS = ("min_global_steps", "max_global_steps")
"""The first and the last version of the weights that drew a response."""

SAMPLING = ("temperature", "top_p", "top_k")
"""What verl's sampling says, of training and of validation."""

_GATHERING = Gathering()
"""verl makes a loop for each session of a prompt; those of one prompt share its tree."""


class Leaf(AgentLoopOutput):
    """A leaf as verl takes it, with an advantage for each response token."""

    advantages: list[float]

    def as_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().as_dict()
        output["rm_scores"] = torch.tensor(output.pop("advantages"), dtype=torch.float32)
        return output


class TreeAgentLoop(SingleTurnAgentLoop):
    """Grows the tree of a prompt with its other sessions; in validation verl's single-turn loop.

    An entry of the file that `rollout.agent.agent_loop_config_path` names:

        - name: pyrl
          _target_: pyrl.hosts.verl_trees.TreeAgentLoop
          method: treerl
          votes: 32

    `rollout.n` leaves of a prompt train, one a session, and `votes` vote; None: those that train.
    `method` is a name of `pyrl methods`; `choices` replaces some of its choices by name, such as
    {fork: ep_tree, reward: "true", advantage: treerl_released}; `algorithm`, as a nested
    `_target_`, stands for both. The distribution, the limit of tokens and the loss are verl's.
    Raises ValueError for a method that verl cannot carry, and for options of verl that contradict.
    """

    def __init__(
        self,
        *args: Any,
        method: str = "treerl",
        choices: Mapping[str, str] | None = None,
        algorithm: Algorithm | None = None,
        votes: int | None = None,
        extractor: str = "boxed",
        equivalence: str = "math",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_config(self.config)
        chosen = algorithm or _algorithm(method, tuple((choices or {}).items()))
        self.grower = Grower(chosen, self.tokenizer, "verl", extractor, equivalence)
        self.votes = votes

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """A leaf, or none where the tree has fewer; in validation verl's own response."""
        if self._validates(sampling_params):
            return await super().run(sampling_params, **kwargs)
        question = self._question(kwargs)

        async def grow(sessions: int) -> Tree:
            sized = self.grower.sized(sessions, self.response_length, self.votes)
            return await sized.grow(question, self._ask(sampling_params, kwargs["uid"]))

        tree, place = await _GATHERING.leaf(kwargs["uid"], grow)
        if place >= len(tree.token_N):
            return []
        return leaf(question.tokens.tolist(), tree, place)

    def _validates(self, sampling_params: Mapping[str, Any]) -> bool:
        """verl does not tell a loop; `check_config` sees to it that sampling does."""
        validation = self.rollout_config.val_kwargs
        return all(sampling_params[name] == validation[name] for name in SAMPLING)

    def _question(self, fields: Mapping[str, Any]) -> Prompt:
        messages = read_messages(list(fields["raw_prompt"]), "raw_prompt", "verl")
        tokens = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.apply_chat_template_kwargs,
        )
        if len(tokens) > self.prompt_length:
            raise ValueError(
                f"rollout.prompt_length: expected a prompt of at most {self.prompt_length} tokens, "
                f"got {len(tokens)} (data.filter_overlong_prompts=True leaves such out)"
            )
        truth = dict(fields["reward_model"]) if "reward_model" in fields else {}
        answer = truth.get("ground_truth")
        return Prompt(
            index=0,
            text=messages[last_user(messages)]["content"],
            tokens=np.array(tokens, np.int32),
            answer=None if answer is None else str(answer),
            columns={
                name: fields[name] for name in ("data_source", "extra_info") if name in fields
            },
            messages=messages,
            truth={} if answer is None else {"ground_truth": answer},
        )

    def _ask(self, sampling_params: Mapping[str, Any], uid: str) -> Ask:
        """Requests of one tree, all to the server that has its prefixes."""

        async def ask(token_ids: list[int], limit: int) -> Reply:
            output = await self.server_manager.generate(
                request_id=uid,
                prompt_ids=token_ids,
                sampling_params={**sampling_params, "max_tokens": limit},
            )
            if output.stop_reason == "aborted" or output.log_probs is None:
                raise EngineFailure(
                    f"verl's server: expected a response with log-probs, got "
                    f"{len(output.token_ids)} tokens, stop reason {output.stop_reason!r}"
                )
            steps = (output.extra_fields[name] for name in STEPS)
            return Reply(
                np.array(output.token_ids, np.int32),
                np.array(output.log_probs, np.float32),
                ended=len(output.token_ids) < limit
                or output.token_ids[-1] == self.tokenizer.eos_token_id,
                versions=tuple(step for step in steps if step is not None),
            )

        return ask


def leaf(prompt_ids: list[int], tree: Tree, place: int) -> Leaf:
    """A leaf of a tree as verl's output of a session."""
    reward = float(tree.reward_N[place])
    told = {"reward": reward, "vote_ratio": tree.ratio, "forks": tree.forks}
    first, last = (min(tree.versions), max(tree.versions)) if tree.versions else (None, None)
    return Leaf(
        prompt_ids=prompt_ids,
        response_ids=tree.token_N[place].tolist(),
        response_mask=tree.train_N[place].astype(int).tolist(),
        response_logprobs=tree.logprob_N[place].tolist(),
        reward_score=reward,
        num_turns=2,
        metrics=AgentLoopMetrics(),
        extra_fields={
            **dict(zip(STEPS, (first, last), strict=True)),
            "turn_scores": [],
            "tool_rewards": [],
            "reward_extra_info": told,
        },
        advantages=tree.advantage_N[place].tolist(),
    )


def check_config(config: Any) -> None:
    """ValueError names an option of verl's that contradicts trees, or a name that there is not."""
    rollout, algorithm = config.actor_rollout_ref.rollout, config.algorithm
    validation = rollout.val_kwargs
    for option, given, expected, why in (
        ("trainer.use_v1", config.trainer.use_v1, True, "only it takes rewards of tokens"),
        ("rollout.full_determinism", rollout.full_determinism, False, "siblings would be equal"),
        ("rollout.calculate_log_probs", rollout.calculate_log_probs, True, "trees read them"),
        ("algorithm.use_kl_in_reward", algorithm.use_kl_in_reward, False, "rewards are advantages"),
        (
            "reward.reward_model.enable",
            config.reward.reward_model.enable,
            False,
            "the method gives the rewards",
        ),
    ):
        if given != expected:
            raise ValueError(f"{option}: expected {expected} with trees ({why}), got {given}")
    if rollout.n < 2:
        raise ValueError(
            f"rollout.n: expected the leaves of a tree that train, 2 or more, got {rollout.n}"
        )
    if all(rollout[name] == validation[name] for name in SAMPLING):
        raise ValueError(
            f"rollout.val_kwargs: expected another {', '.join(SAMPLING)} than training's, by which "
            f"pyrl's loop knows validation, got the same"
        )
    _check_names(
        str(algorithm.adv_estimator), str(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    )


def _check_names(estimator: str, loss: str) -> None:
    """ValueError for an estimator that does not take advantages, and a loss that cannot train."""
    taking = [
        name
        for name, function in core_algos.ADV_ESTIMATOR_REGISTRY.items()
        if name.startswith(door.PREFIX) and door.takes_given(function.args[1])
        if not door.estimator_refusal(function.args[1])
    ]
    if estimator not in taking:
        raise ValueError(
            f"algorithm.adv_estimator: expected one that takes the advantages of trees "
            f"({', '.join(taking)}), got {estimator}"
        )
    if loss.startswith(door.PREFIX):
        losses = core_algos.POLICY_LOSS_REGISTRY
        known = [name for name in losses if name.startswith(door.PREFIX)]
        if reason := door.refusal(losses[one_of(loss, known, "policy_loss.loss_mode")].args[1]):
            raise ValueError(f"policy_loss.loss_mode: {loss}: {reason}")


@cache
def _algorithm(method: str, choices: tuple[tuple[str, str], ...]) -> Algorithm:
    """Once for all loops of a process: names of other packages are looked up on the disk."""
    return choose(Registry().method(method), **dict(choices))
