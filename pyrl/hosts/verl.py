"""verl: pyrl's losses and advantages by the names of verl's own configuration (verl 0.9).

verl imports this file in each of its processes: it is an entry point of the group `verl.plugins`.
From then on `actor_rollout_ref.actor.policy_loss.loss_mode=pyrl/NAME` and
`algorithm.adv_estimator=pyrl/NAME` choose pyrl's. Trees: `pyrl.hosts.verl_trees`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from math import nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl.advantage import Stage
from pyrl.forest import Forest
from pyrl.hosts.padded import MODES, missing, mode_of, padded_loss
from pyrl.hosts.served import refuse_pass
from pyrl.hosts.versions import require
from pyrl.leaves import Scored, Texts, needs_of
from pyrl.loss import Loss, TokenMean
from pyrl.methods.choices import ADVANTAGES
from pyrl.presets import PRESETS

require("verl")
from verl.trainer.ppo import core_algos

PREFIX = "pyrl/"

COLUMNS = frozenset({"advantage_T", "logprob_T", "old_logprob_T"})
"""What verl gives a policy loss."""

ROWS = frozenset({"group_N", "reward_N", "length_N", "leaf_T", "advantage_T"})
"""What verl gives an advantage estimator; the advantages are those that an agent loop computed."""

GIVEN = "given"
"""The estimator of advantages that an agent loop has computed: it leaves them as they are."""

NUMBERS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")
LOSS_NUMBERS = (
    *("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta"),
)
"""Options of actor and of actor.policy_loss that are numbers of verl's own losses."""

Stages = tuple[Stage, ...]


def register(
    losses: Mapping[str, Callable[[], Loss]] | None = None,
    advantages: Mapping[str, Callable[[], Stage | Stages]] | None = None,
) -> None:
    """Register losses and advantages, by functions that return them, under `pyrl/NAME` in verl.

    One that needs what verl does not give it is registered as well, to be refused with the reason
    when it is chosen. Losses with other numbers than the presets' come in here too: a module of
    yours that calls this is loaded by `VERL_USE_EXTERNAL_MODULES`.
    """
    for name, make in (losses or {}).items():
        core_algos.register_policy_loss(PREFIX + name)(partial(policy_loss, PREFIX + name, make()))
    for name, given in (advantages or {}).items():
        made = given()
        stages = made if isinstance(made, tuple) else (made,)
        core_algos.register_adv_est(PREFIX + name)(partial(estimate, PREFIX + name, stages))


def policy_loss(
    name: str,
    loss: Loss,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's signature of a policy loss, after the name and the loss: tensors are [N, L].

    The mean over tokens, micro-batches and ranks is verl's. Statistics over a mini-batch, such as
    covariances, are of the micro-batch that verl gives, as with verl's own losses. Raises
    ValueError for a loss that verl cannot carry and for options of verl that contradict it.
    """
    if reason := refusal(loss):
        raise ValueError(f"policy_loss.loss_mode: {name}: {reason}")
    check_actor(name, loss, loss_agg_mode, config)
    result = padded_loss(
        loss,
        log_prob,
        {"advantage_T": advantages, "old_logprob_T": old_log_prob},
        response_mask,
        lambda loss_NL, mask_NL: core_algos.agg_loss(
            loss_mat=loss_NL,
            loss_mask=mask_NL,
            loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        ),
        rollout_is_weights,
    )
    distance_NL = (old_log_prob - log_prob.detach())[response_mask.bool()]
    metrics = {
        "actor/pg_clipfrac": result.clipped_low + result.clipped_high,
        "actor/ppo_kl": distance_NL.double().mean().item(),
        "actor/pg_clipfrac_lower": result.clipped_dual,
    }
    return result.loss, {key: value for key, value in metrics.items() if value == value}


def refusal(loss: Loss) -> str:
    """Why verl cannot carry a loss; empty if it can."""
    lacking = missing(loss, COLUMNS)
    if "engine that sampled" in lacking:
        return (
            f"it needs {lacking}, of which verl gives its losses weights alone: choose a loss "
            f"without that correction, and algorithm.rollout_correction for the weights"
        )
    if lacking:
        return f"it needs {lacking}, which verl does not give its losses"
    if not mode_of(loss):
        kind = type(loss.aggregate).__name__
        return f"it aggregates by {kind}, expected one of {', '.join(k.__name__ for k in MODES)}"
    return ""


def check_actor(name: str, loss: Loss, mode: str, config: Any) -> None:
    """ValueError names an option of verl's actor that contradicts the loss."""
    if not isinstance(loss.aggregate, TokenMean) and mode != mode_of(loss):
        raise ValueError(
            f"actor.loss_agg_mode: expected {mode_of(loss)}, which is a part of {name}, got {mode}"
        )
    for where, record, options in (
        ("actor", config, NUMBERS),
        ("actor.policy_loss", config.policy_loss, LOSS_NUMBERS),
    ):
        default = {field.name: field.default for field in fields(record)}
        for option in options:
            given = record.get(option)
            if given != default[option]:
                raise ValueError(
                    f"{where}.{option}: expected verl's default {default[option]}, since {name} "
                    f"brings its numbers, got {given}; pyrl.hosts.verl.register takes a loss "
                    f"with others"
                )


def estimate(
    name: str,
    stages: Stages,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: NDArray[Any] | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """verl's signature of an advantage estimator, after the name and the stages.

    Rewards and mask are [N, L], `index` [N] names the question of each row; groups may differ in
    size. A stage that needs advantages gets the rewards of tokens as such: those that an agent loop
    computed. A row without tokens, which verl pads its batches with, counts nowhere. Returns
    advantages [N, L] twice, as returns too. Raises ValueError for stages that need more.
    """
    if reason := estimator_refusal(stages):
        raise ValueError(f"algorithm.adv_estimator: {name}: {reason}")
    if index is None:
        raise ValueError(f"algorithm.adv_estimator: {name}: expected uid of each row, got none")
    group_N = np.unique(index, return_inverse=True)[1]
    order_N = np.argsort(group_N, kind="stable")
    mask_NL = response_mask.cpu().numpy()[order_N].astype(bool)
    reward_NL = token_level_rewards.detach().double().cpu().numpy()[order_N]
    scored = _scored(group_N[order_N], reward_NL, mask_NL)
    advantage_T = reward_NL[mask_NL]
    for stage in stages:
        advantage_T = stage(scored, advantage_T)
    advantage_NL = np.zeros(mask_NL.shape)
    advantage_NL[mask_NL] = advantage_T
    back_NL = np.empty_like(advantage_NL)
    back_NL[order_N] = advantage_NL
    result = torch.from_numpy(back_NL).to(token_level_rewards)
    return result, result.clone()


def estimator_refusal(stages: Stages) -> str:
    """Why verl cannot carry stages as an estimator; empty if it can."""
    needed = [name for stage in stages for name in needs_of(stage) if name not in ROWS]
    nowhere = [name for name in needed if name != "segments"]
    if nowhere:
        return f"it needs {nowhere[0]}, which verl does not give its estimators"
    if needed:
        return (
            f"it needs the tree, which verl does not give its estimators: name it in the agent "
            f"loop (pyrl.hosts.verl_trees), and {PREFIX}{GIVEN} here"
        )
    if any(hasattr(stage, "initial") for stage in stages):
        return "it remembers earlier steps, which verl does not save"
    return ""


def takes_given(stages: Sequence[Stage]) -> bool:
    """Whether the stages go on from the advantages of an agent loop."""
    return not stages or "advantage_T" in needs_of(stages[0])


def _scored(
    group_N: NDArray[np.int64], reward_NL: NDArray[np.float64], mask_NL: NDArray[np.bool_]
) -> Scored:
    """Rows as leaves of which nothing else is known."""
    rows, length_N = len(group_N), mask_NL.sum(axis=1)
    leaf_T = np.repeat(np.arange(rows), length_N)
    nan_T = np.full(leaf_T.size, nan, np.float32)
    return Scored(
        group_N=group_N,
        trunk_N=np.arange(rows),
        weight_N=np.full(rows, nan),
        reward_N=np.where(length_N > 0, reward_NL.sum(axis=1), nan),
        entropy_N=np.full(rows, nan),
        length_N=length_N,
        segments=Forest().segments(np.zeros(0, np.int64)),
        leaf_T=leaf_T,
        segment_T=np.zeros(leaf_T.size, np.int64),
        token_T=np.zeros(leaf_T.size, np.int64),
        logprob_T=nan_T,
        entropy_T=nan_T,
        confidence_T=nan_T,
        forced_T=np.zeros(leaf_T.size, bool),
        texts=Texts((), (), lambda rows: [""] * len(rows)),
        look=refuse_pass,
        progress=0.0,
    )


register(PRESETS, {GIVEN: tuple, **ADVANTAGES})
