"""verl with stand-ins for clusters and servers, and what tests ask of it."""

from __future__ import annotations

from typing import Any

from absent import stand_ins

ABSENT = (
    *("ray", "transfer_queue", "torchdata", "uvicorn", "fastapi", "zmq", "cachetools"),
    *("peft", "vllm", "nvtx", "aiohttp", "orjson"),
)

with stand_ins(*ABSENT):
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from verl.experimental.agent_loop import agent_loop, single_turn_agent_loop
    from verl.protocol import DataProto
    from verl.trainer.ppo import core_algos, ray_trainer
    from verl.trainer.ppo.v1 import agent_loop_tq
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.rollout import llm_server, replica

    from pyrl.hosts import verl as door
    from pyrl.hosts import verl_trees

__all__ = [
    "DataProto",
    "OmegaConf",
    "TensorDict",
    "actor",
    "agent_loop",
    "agent_loop_tq",
    "core_algos",
    "door",
    "llm_server",
    "ray_trainer",
    "replica",
    "single_turn_agent_loop",
    "tensordict_utils",
    "verl_trees",
]


def actor(mode: str = "token-mean", *, batch: dict[str, Any] | None = None, **options: Any) -> Any:
    """verl's options of an actor; what is not among its fields is of its policy loss."""
    loss = {n: options.pop(n) for n in [*options] if n in PolicyLossConfig.__dataclass_fields__}
    made = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        policy_loss=PolicyLossConfig(**loss),
        **options,
    )
    made.global_batch_info.update(batch or {})
    return made
