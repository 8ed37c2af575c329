"""Options of TRL's that pyrl's trees cannot follow: each is refused by its name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.advantage import GroupBaseline
from pyrl.algorithm import Algorithm, Sample
from pyrl.answers.reading import end_tokens
from pyrl.hosts.trees import check_replay

SAMPLING = (
    *("use_vllm", "use_transformers_continuous_batching", "repetition_penalty"),
    *("cache_implementation",),
)
"""Options of the host's samplers, in whose place pyrl's engine grows the trees."""

CREDIT = ("scale_rewards", "multi_objective_aggregation")
"""How the host makes advantages of rewards, which the method's stages do."""

LOSS = (
    *("beta", "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level"),
    *("num_iterations", "mask_truncated_completions", "off_policy_mask_threshold"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos"),
    *("vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile", "entropy_coef"),
    *("use_adaptive_entropy", "sync_ref_model", "router_aux_loss_coef", "fp16"),
)
"""Parts of the host's loss, in whose place the method's loss trains with `loss="pyrl"`."""

ARGUMENTS = ("tools", "rollout_func", "environment_factory")
"""Arguments that let others than the model write into a response."""

LossOf = Literal["host", "pyrl"]


def check_options(args: Any, loss: LossOf) -> None:
    """ValueError names an option of a GRPOConfig that contradicts what pyrl does in its place."""
    default = {field.name: field.default for field in fields(args)}
    places = dict.fromkeys(SAMPLING, "pyrl's engine samples")
    places |= dict.fromkeys(CREDIT, "the method's advantage stages do that")
    if loss == "pyrl":
        places |= dict.fromkeys(LOSS, "the method's loss takes its place (loss='host' does not)")
    for name, why in places.items():
        if vars(args)[name] != default[name]:
            raise ValueError(f"{name}: expected {default[name]!r}, got {vars(args)[name]!r}: {why}")
    if more := sorted((args.generation_kwargs or {}).keys() - {"eos_token_id"}):
        raise ValueError(
            f"generation_kwargs: expected only eos_token_id, got {more[0]}: pyrl's engine samples"
        )
    rows, group = args.per_device_train_batch_size * args.steps_per_generation, args.num_generations
    if rows % group:
        raise ValueError(
            f"num_generations: expected a divisor of per_device_train_batch_size * "
            f"steps_per_generation, {rows}, got {group}: a tree grows in one process"
        )
    if args.max_completion_length is None:
        raise ValueError("max_completion_length: expected a number of tokens, got None")
    if loss == "pyrl" and args.steps_per_generation % args.gradient_accumulation_steps:
        raise ValueError(
            f"steps_per_generation: expected a multiple of gradient_accumulation_steps, "
            f"{args.gradient_accumulation_steps}, got {args.steps_per_generation}: an update of "
            f"the method's loss has the samples of one generation"
        )


def check_arguments(given: dict[str, Any]) -> None:
    """ValueError names an argument of the host's trainer that needs another sampler."""
    for name in ARGUMENTS:
        if given[name]:
            raise ValueError(f"{name}: expected None, got {given[name]!r}: pyrl's engine samples")
    if given["eval_dataset"] is not None and not given["reward_funcs"]:
        raise ValueError(
            "eval_dataset: expected reward_funcs beside it, got none: the method's own reward is "
            "of the trees of a training step"
        )


def host_grpo(args: Any) -> Algorithm:
    """The host's own GRPO as a method: flat groups, all of which train, and its baseline."""
    votes = args.num_generations
    return Algorithm((GroupBaseline(eps=1e-4),), Sample(votes=votes, train=votes))


def sampled_as(algorithm: Algorithm, args: Any, loss: LossOf) -> Algorithm:
    """The method with the numbers that a GRPOConfig names as well: those of `args`.

    ValueError: groups that would differ in size, fewer votes than the host's group, a loss that
    reads columns of the data, or responses of earlier steps.
    """
    check_replay(algorithm, "TRL")
    sample = algorithm.sample
    for name in ("max_tokens_per_prompt", "max_seconds"):
        if vars(sample)[name]:
            raise ValueError(
                f"sample.{name}: expected 0, got {vars(sample)[name]}: groups that it cuts have "
                f"fewer leaves than the host's num_generations"
            )
    if sample.votes < args.num_generations:
        raise ValueError(
            f"num_generations: expected at most sample.votes, {sample.votes}, got "
            f"{args.num_generations}: as many of the leaves that vote train"
        )
    if loss == "pyrl" and algorithm.loss.expert is not None:
        raise ValueError("loss: expected one without ExpertLeak, whose column the host drops")
    return replace(
        algorithm,
        sample=replace(
            sample,
            train=args.num_generations,
            max_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k or 0,
            top_p=args.top_p,
            min_p=args.min_p or 0.0,
        ),
        updates_per_step=args.steps_per_generation // args.gradient_accumulation_steps or 1,
    )


def end_ids(args: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a response: those of a GRPOConfig, or the model's own."""
    given = (args.generation_kwargs or {}).get("eos_token_id")
    return end_tokens(model, tokenizer) if given is None else set(np.atleast_1d(given).tolist())


def check_loaded(trainer: Any, loss: LossOf) -> None:
    """ValueError names what of the host's model, data or processes pyrl cannot work with."""
    if trainer._is_vlm:
        raise ValueError("processing_class: expected a tokenizer, got a processor of images")
    if trainer.aux_loss_enabled:
        raise ValueError("router_aux_loss_coef: expected 0 for a mixture of experts")
    kind, processes = trainer.accelerator.distributed_type.value, trainer.accelerator.num_processes
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(f"distributed_type: expected whole weights in each process, got {kind}")
    if loss == "pyrl" and processes > 1:
        raise ValueError(f"loss: expected 'host' in {processes} processes, got 'pyrl'")
    known, ids = trainer.model.get_input_embeddings().weight.shape[0], len(trainer._tokenizer)
    if ids > known:
        raise ValueError(
            f"processing_class: expected ids below {known}, the model's vocabulary, got a "
            f"tokenizer of {ids} tokens"
        )
