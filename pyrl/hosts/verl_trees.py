"""Trees in verl 0.9: an agent loop that owns a prompt and gives all leaves of its tree.

It asks verl's server manager for whole responses; a fork is a request that goes on from a prefix,
which a server with a cache of prefixes does not compute again. Advantages of tokens travel as
rewards of tokens (`rm_scores`), and an estimator such as `pyrl/given` leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pyrl.algorithm import Algorithm
from pyrl.checks import one_of
from pyrl.engine import EngineFailure
from pyrl.hosts import verl as door
from pyrl.hosts.requests import Ask, Reply
from pyrl.hosts.trees import Grower, Tree
from pyrl.hosts.versions import require
from pyrl.methods.choices import ADVANTAGES
from pyrl.methods.registry import Registry, choose
from pyrl.presets import PRESETS
from pyrl.prompts import Prompt
from pyrl.prompts.chat import last_user, read_messages

require("verl")
from verl.experimental.agent_loop.agent_loop import (  # noqa: E402
    AgentLoopMetrics,
    AgentLoopOutput,
)
from verl.experimental.agent_loop.single_turn_agent_loop import (  # noqa: E402
    SingleTurnAgentLoop,
)
from verl.trainer.ppo import core_algos  # noqa: E402

SAMPLING = ("temperature", "top_p", "top_k")
"""What verl's sampling says, of training and of validation."""


class Leaf(AgentLoopOutput):
    """A leaf as verl takes it, with an advantage for each response token."""

    advantages: list[float]

    def as_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().as_dict()
        output["rm_scores"] = torch.tensor(output.pop("advantages"), dtype=torch.float32)
        return output


class TreeAgentLoop(SingleTurnAgentLoop):
    """Grows the tree of a prompt; in validation it is verl's single-turn loop.

    An entry of the file that `rollout.agent.agent_loop_config_path` names:

        - name: pyrl
          _target_: pyrl.hosts.verl_trees.TreeAgentLoop
          method: treerl
          votes: 16
          train: 16

    `method` is a name of `pyrl methods`; `choices` replaces some of its choices by name, such as
    {fork: ep_tree, reward: "true", advantage: treerl_released}; `algorithm`, as a nested
    `_target_`, stands for all of these. `votes` leaves vote and `train` of them train; None: as the
    method has it. The distribution, the limit of tokens and the loss are verl's. Raises ValueError
    for a method that verl cannot carry, and for options of verl that contradict.
    """

    def __init__(
        self,
        *args: Any,
        method: str = "treerl",
        choices: Mapping[str, str] | None = None,
        votes: int | None = None,
        train: int | None = None,
        extractor: str = "boxed",
        equivalence: str = "math",
        algorithm: Algorithm | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_config(self.config)
        chosen = algorithm or choose(Registry().method(method), **(choices or {}))
        numbers = {"votes": votes, "train": train, "max_tokens": self.response_length}
        given = {name: number for name, number in numbers.items() if number is not None}
        chosen = replace(chosen, sample=replace(chosen.sample, **given))
        self.grower = Grower(chosen, self.tokenizer, "verl", extractor, equivalence)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """A list of leaves; in validation the one response that verl's own loop gives."""
        if self._validates(sampling_params):
            return await super().run(sampling_params, **kwargs)
        question = self._question(kwargs)
        steps: list[Any] = []
        tree = await self.grower.grow(question, self._ask(sampling_params, kwargs, steps))
        return leaves(question.tokens.tolist(), tree, steps)

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

    def _ask(
        self, sampling_params: Mapping[str, Any], fields: Mapping[str, Any], steps: list[Any]
    ) -> Ask:
        """Requests of one tree, all to the same server; `steps` collects versions of weights."""
        session = f"{fields['uid']}-{fields['session_id']}"

        async def ask(token_ids: list[int], limit: int) -> Reply:
            output = await self.server_manager.generate(
                request_id=session,
                prompt_ids=token_ids,
                sampling_params={**sampling_params, "max_tokens": limit},
            )
            if output.stop_reason == "aborted" or output.log_probs is None:
                raise EngineFailure(
                    f"verl's server: expected a response with log-probs, got "
                    f"{len(output.token_ids)} tokens, stop reason {output.stop_reason!r}"
                )
            steps.extend(
                output.extra_fields[key] for key in ("min_global_steps", "max_global_steps")
            )
            token_T = np.array(output.token_ids, np.int32)
            ended = token_T.size < limit or int(token_T[-1]) == self.tokenizer.eos_token_id
            return Reply(token_T, np.array(output.log_probs, np.float32), ended)

        return ask


def leaves(prompt_ids: list[int], tree: Tree, steps: Sequence[Any]) -> list[Leaf]:
    """The leaves of a tree as verl's outputs of one session."""
    known = [step for step in steps if step is not None]
    shared: dict[str, Any] = {
        "min_global_steps": min(known, default=None),
        "max_global_steps": max(known, default=None),
        "turn_scores": [],
        "tool_rewards": [],
    }
    told = {"votes": tree.votes, "vote_ratio": tree.ratio, "forks": tree.forks}
    return [
        Leaf(
            prompt_ids=prompt_ids,
            response_ids=tree.token_N[n].tolist(),
            response_mask=tree.train_N[n].astype(int).tolist(),
            response_logprobs=tree.logprob_N[n].tolist(),
            reward_score=float(tree.reward_N[n]),
            num_turns=2,
            metrics=AgentLoopMetrics(),
            extra_fields={**shared, "reward_extra_info": dict(told)},
            advantages=tree.advantage_N[n].tolist(),
        )
        for n in range(len(tree.token_N))
    ]


def check_config(config: Any) -> None:
    """ValueError names an option of verl's that contradicts trees, or a name that there is not."""
    rollout, algorithm = config.actor_rollout_ref.rollout, config.algorithm
    validation = rollout.val_kwargs
    estimator, loss = str(algorithm.adv_estimator), config.actor_rollout_ref.actor.policy_loss
    for option, given, expected, why in (
        ("trainer.use_v1", config.trainer.use_v1, True, "only it takes several outputs of a loop"),
        ("rollout.n", rollout.n, 1, "one loop grows all leaves of a prompt"),
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
    if all(rollout[name] == validation[name] for name in SAMPLING):
        raise ValueError(
            f"rollout.val_kwargs: expected another {', '.join(SAMPLING)} than training's, by which "
            f"pyrl's loop knows validation, got the same"
        )
    _check_names(estimator, str(loss.loss_mode))


def _check_names(estimator: str, loss: str) -> None:
    """ValueError for an estimator that does not take advantages, or a loss that there is not."""
    stages = {name: Registry().make("advantage", name) for name in ADVANTAGES}
    taking = [door.GIVEN] + [
        name
        for name, made in stages.items()
        if door.takes_given(made if isinstance(made, tuple) else (made,))
        and not door.estimator_refusal(made if isinstance(made, tuple) else (made,))
    ]
    known = [door.PREFIX + name for name in taking]
    if estimator not in known:
        raise ValueError(
            f"algorithm.adv_estimator: expected one that takes the advantages of trees "
            f"({', '.join(known)}), got {estimator}"
        )
    if loss.startswith(door.PREFIX) and loss not in core_algos.POLICY_LOSS_REGISTRY:
        one_of(loss, [door.PREFIX + name for name in PRESETS], "policy_loss.loss_mode")
