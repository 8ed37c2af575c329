"""OpenRLHF: trees from its vLLM actors, their advantages in its experience, pyrl's losses.

A file for `--train.agent_func_path` has an `AgentExecutor` that extends `TreeExecutor`. OpenRLHF
has no hook for advantages and losses: `install` replaces four methods of its classes in each of its
processes, where Ray calls it as `worker_process_setup_hook`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrl.hosts.openrlhf_trees import Held, TreeExecutor
from pyrl.hosts.padded import missing, mode_of, padded_loss
from pyrl.hosts.versions import require
from pyrl.loss import Loss

require("openrlhf")
from openrlhf.models.loss import PolicyLoss, aggregate_loss
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

__all__ = ["TreeExecutor", "install"]

COLUMNS = frozenset({"advantage_T", "logprob_T", "old_logprob_T", "rollout_logprob_T"})
"""What OpenRLHF gives a policy loss."""

CORRECTIONS = {"is_correction_level": "off", "enable_vllm_is_correction": False}
"""How OpenRLHF's importance weights are left out: 0.11.2, and the releases before."""

OWN = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None, "policy_loss_type": "ppo"}
"""Numbers of OpenRLHF's own losses, as they are by default."""


def install(loss: Loss | None = None) -> None:
    """Bring trees' advantages, and a loss in the place of OpenRLHF's, into this process.

    Advantages then come from `TreeExecutor` alone. Raises ValueError for a loss that OpenRLHF
    cannot carry.
    """
    SamplesGenerator._process_response_into_experience = _experience
    SamplesGenerator.generate_eval_samples = _eval_samples
    RemoteExperienceMaker.compute_advantages_and_returns = _advantages
    if loss is None:
        return
    lacking, mode = missing(loss, COLUMNS), mode_of(loss)
    if lacking:
        raise ValueError(f"loss: it needs {lacking}, which OpenRLHF does not give its losses")
    if mode not in ("token-mean", "seq-mean-token-mean"):
        raise ValueError(
            f"loss.aggregate: expected TokenMean or SeqMeanTokenMean, which OpenRLHF has, "
            f"got {loss.aggregate}"
        )

    PolicyLoss.forward = _forward(loss, mode)


_EXPERIENCE = SamplesGenerator._process_response_into_experience
_EVAL_SAMPLES = SamplesGenerator.generate_eval_samples
_ADVANTAGES = RemoteExperienceMaker.compute_advantages_and_returns
_FORWARD = PolicyLoss.forward


def _experience(self: Any, response: dict[str, Any], **generate_kwargs: Any) -> Any:
    """OpenRLHF's record of a response, which may hold advantages from the beginning."""
    experience = _EXPERIENCE(self, response, **generate_kwargs)
    if "advantages" in response:
        length = experience.sequences.shape[1]
        advantage_L = torch.tensor(response["advantages"][1:length], dtype=torch.float32)
        experience.advantages = advantage_L.unsqueeze(0)
    return experience


def _eval_samples(self: Any, **generate_kwargs: Any) -> Any:
    """OpenRLHF's samples for an evaluation, of questions whose labels say so."""
    dispatch = self._dispatch_prompts_to_vllm

    def held(prompts: list[str], labels: list[Any], **options: Any) -> Any:
        return dispatch(prompts, [Held(label or "") for label in labels], **options)

    self._dispatch_prompts_to_vllm = held
    try:
        return _EVAL_SAMPLES(self, **generate_kwargs)
    finally:
        del self._dispatch_prompts_to_vllm


def _advantages(self: Any, experiences: list[Any]) -> list[Any]:
    """OpenRLHF's returns and numbers of a step; the advantages are those of the trees.

    ValueError names an option that contradicts them.
    """
    _check_arguments(self.args)
    given = [experience.advantages for experience in experiences]
    if any(advantage is None for advantage in given):
        raise ValueError(
            "--train.agent_func_path: expected an AgentExecutor that extends "
            "pyrl.hosts.openrlhf.TreeExecutor, got responses without advantages"
        )
    for experience, advantage in zip(_ADVANTAGES(self, experiences), given, strict=True):
        experience.advantages = advantage
        experience.returns = advantage.clone()
    return experiences


def _forward(loss: Loss, mode: str) -> Callable[..., tuple[Any, ...]]:
    """OpenRLHF's `PolicyLoss.forward` with pyrl's loss, beside OpenRLHF's numbers."""

    def forward(
        self: Any,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Any, ...]:
        """OpenRLHF's signature of its policy loss; tensors are [N, L]."""
        assert action_mask is not None
        batch = (dp_size, batch_num_tokens, global_batch_size)
        columns = {"advantage_T": advantages, "old_logprob_T": old_log_probs}
        if rollout_log_probs is not None:
            columns["rollout_logprob_T"] = rollout_log_probs
        _check_options(self, loss, mode, rollout_log_probs)
        result = padded_loss(
            loss,
            log_probs,
            columns,
            action_mask,
            lambda loss_NL, mask_NL: aggregate_loss(
                loss_NL, mask_NL, self.token_level_loss, *batch
            ),
        )
        with torch.no_grad():
            own = (log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, *batch)
            _, clipped, *others = _FORWARD(self, *own)
        return result.loss, clipped.new_tensor(result.clipped_low + result.clipped_high), *others

    return forward


def _check_arguments(args: Any) -> None:
    advantage, kl, reward = args.algo.advantage, args.algo.kl, args.reward
    in_reward = kl.init_coef if not kl.use_loss else 0
    for option, given, expected, why in (
        ("algo.advantage.estimator", advantage.estimator, "reinforce", "whose place trees take"),
        ("algo.kl.init_coef", in_reward, 0, "or --algo.kl.use_loss: rewards are scored before"),
        ("reward.overlong_buffer_len", reward.overlong_buffer_len, None, "trees are scored before"),
        (
            "reward.stop_properly_penalty_coef",
            reward.stop_properly_penalty_coef,
            None,
            "trees are scored before",
        ),
    ):
        if given != expected:
            raise ValueError(f"--{option}: expected {expected} with trees ({why}), got {given}")


def _check_options(module: Any, loss: Loss, mode: str, rollout_log_probs: Tensor | None) -> None:
    """ValueError names an option of OpenRLHF's loss that contradicts pyrl's."""
    options = vars(module)
    for name, off in CORRECTIONS.items():
        if options.get(name, off) != off:
            raise ValueError(
                f"--algo.advantage.{name}: expected {off} with a loss of pyrl, of which tis, "
                f"icepop and mis bring importance weights, got {options[name]}"
            )
    for name, default in OWN.items():
        if options[name] != default:
            raise ValueError(
                f"{name}: expected OpenRLHF's default {default}, since pyrl's loss brings its "
                f"numbers, got {options[name]}"
            )
    if mode != "token-mean" and module.token_level_loss:
        raise ValueError(
            f"--actor.loss_agg_mode: expected the mean of responses, which is a part of the loss "
            f"({type(loss.aggregate).__name__}), got token-mean"
        )
    if rollout_log_probs is None and any(n.name == "rollout_logprob_T" for n in loss.needs):
        raise ValueError(
            "--rollout.temperature: expected 1, at which vLLM's log-probs are those that the loss "
            "reads, got responses without"
        )
