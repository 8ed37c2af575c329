"""Trees in OpenRLHF: an agent executor whose calls for one prompt share the leaves of its tree."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from pyrl.advantage import grpo
from pyrl.algorithm import Algorithm
from pyrl.engine import EngineFailure
from pyrl.fork import Flat
from pyrl.hosts.requests import Ask, Reply
from pyrl.hosts.served import Gathering, Grower, Tree, check_algorithm
from pyrl.hosts.versions import require
from pyrl.methods.treerl import treerl
from pyrl.prompts import Prompt
from pyrl.prune import Keep
from pyrl.reward import TrueReward
from pyrl.select import First, SelectAfter

require("openrlhf")
from openrlhf.utils.agent import AgentExecutorBase


class Held(str):
    """The label of a question of an evaluation: its answers are independent, and graded by it."""


class TreeExecutor(AgentExecutorBase):
    """Each call for a prompt gets a leaf of the same tree: all that OpenRLHF makes at once.

    A tree has as many leaves as calls (`--rollout.n_samples_per_prompt`), which all vote and train.
    The distribution and the limit of tokens are OpenRLHF's. Evaluations get independent answers,
    and the label says which are right. Raises ValueError for an algorithm that OpenRLHF cannot
    carry, naming the choice.
    """

    algorithm: ClassVar[Algorithm] = treerl()
    extractor: ClassVar[str] = "boxed"
    equivalence: ClassVar[str] = "math"

    def __init__(self) -> None:
        check_algorithm(self.algorithm, "openrlhf")
        if isinstance(self.algorithm.select, SelectAfter):
            raise ValueError(
                f"select: expected one that keeps all tokens of a leaf, which OpenRLHF trains on, "
                f"got {type(self.algorithm.select).__name__}"
            )
        self._gathering = Gathering()

    async def execute(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """OpenRLHF's response of one call, with an advantage for each token."""
        if images:
            raise ValueError("images: expected none: pyrl's trees are of text")
        prompt_ids = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        limit = max_length - len(prompt_ids)
        if sampling_params.max_tokens is not None:
            limit = min(limit, sampling_params.max_tokens)
        if limit < 1:
            raise ValueError(
                f"--data.max_len: expected room for a response after a prompt of "
                f"{len(prompt_ids)} tokens, got {max_length}"
            )
        held = isinstance(label, Held)
        algorithm = _evaluated(self.algorithm) if held else self.algorithm
        grower = Grower(algorithm, hf_tokenizer, "openrlhf", self.extractor, self.equivalence)
        question = Prompt(
            index=0,
            text=prompt,
            tokens=np.array(prompt_ids, np.int32),
            answer=str(label) if label else None,
            columns={},
        )

        async def grow(calls: int) -> Tree:
            ask = _ask(sampling_params, llm_engine)
            tree = await grower.sized(calls, limit).grow(question, ask)
            if len(tree.token_N) != calls:
                raise ValueError(
                    f"select: expected all {calls} leaves (--rollout.n_samples_per_prompt), since "
                    f"OpenRLHF has no groups of other sizes, got {len(tree.token_N)}"
                )
            return tree

        tree, place = await self._gathering.leaf((prompt, str(label), held), grow)
        comparable = _comparable(sampling_params, llm_engine)
        return _response(prompt, label, prompt_ids, tree, place, comparable)


def _evaluated(algorithm: Algorithm) -> Algorithm:
    return replace(
        algorithm,
        fork=Flat(),
        prune=Keep(),
        reward=TrueReward(),
        select=First(),
        advantage=grpo(),
    )


def _comparable(sampling_params: Any, llm_engine: Any) -> bool:
    """Whether vLLM's log-probs are those at the sampling temperature."""
    mode = llm_engine.kwargs.get("logprobs_mode")
    return bool(sampling_params.temperature == 1 or mode == "processed_logprobs")


def _ask(sampling_params: Any, llm_engine: Any) -> Ask:
    async def ask(token_ids: list[int], limit: int) -> Reply:
        params = deepcopy(sampling_params)
        params.max_tokens, params.logprobs = limit, 1
        (output,) = (await llm_engine.generate(token_ids, params)).outputs
        if output.finish_reason not in ("stop", "length"):
            raise EngineFailure(
                f"vLLM: expected a whole response, got {len(output.token_ids)} tokens, "
                f"finish reason {output.finish_reason!r}"
            )
        logprobs = [
            told[token].logprob
            for token, told in zip(output.token_ids, output.logprobs, strict=True)
        ]
        return Reply(
            np.array(output.token_ids, np.int32),
            np.array(logprobs, np.float32),
            ended=output.finish_reason == "stop",
        )

    return ask


def _response(
    prompt: str, label: str, prompt_ids: list[int], tree: Tree, place: int, comparable: bool
) -> dict[str, Any]:
    """OpenRLHF's record of one leaf, with advantages of all its tokens, 0 for the prompt's."""
    before = [0.0] * len(prompt_ids)
    token_ids = tree.token_N[place].tolist()
    reward = float(tree.reward_N[place])
    return {
        "prompt": prompt,
        "label": label,
        "images": None,
        "mm_train_inputs": None,
        "reward": reward,
        "scores": reward,
        "observation_tokens": prompt_ids + token_ids,
        "action_ranges": [(len(prompt_ids), len(prompt_ids) + len(token_ids))],
        "rollout_log_probs": before + tree.logprob_N[place].tolist() if comparable else None,
        "truncated": bool(tree.truncated_N[place]),
        "extra_logs": {"vote_ratio": tree.ratio, "tree_forks": tree.forks},
        "advantages": before + tree.advantage_N[place].tolist(),
    }
