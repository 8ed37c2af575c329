"""OpenRLHF with stand-ins for clusters, CUDA kernels and vLLM, and what tests ask of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from absent import stand_ins

ABSENT = (
    *("ray", "deepspeed", "flash_attn", "vllm", "peft", "bitsandbytes", "pylatexenc", "aiohttp"),
    *("torchdata", "loralib", "optimum", "torchmetrics", "wandb"),
)

with stand_ins(*ABSENT):
    from openrlhf.models import loss as losses
    from openrlhf.trainer.ppo_utils import experience_maker, samples_generator
    from openrlhf.trainer.ray import ppo_actor, vllm_engine
    from openrlhf.utils import agent

    from pyrl.hosts import openrlhf as door
    from pyrl.hosts import openrlhf_trees

__all__ = [
    "agent",
    "arguments",
    "door",
    "experience_maker",
    "losses",
    "openrlhf_trees",
    "ppo_actor",
    "samples_generator",
    "vllm_engine",
]


def arguments(**changed: Any) -> Any:
    """OpenRLHF's options, as far as making experience reads them; names are the last part's."""
    parts: dict[str, dict[str, Any]] = {
        "advantage": {"estimator": "reinforce", "gamma": 1.0, "no_std_norm": False},
        "kl": {"init_coef": 0.0, "use_loss": False},
        "reward": {
            "overlong_buffer_len": None,
            "stop_properly_penalty_coef": None,
            "clip_range": (-10, 10),
        },
        "rollout": {"n_samples_per_prompt": 13, "micro_batch_size": 4},
        "train": {"dynamic_batch_enable": False},
    }
    for options in parts.values():
        options |= {name: changed[name] for name in options if name in changed}
    made = {name: SimpleNamespace(**options) for name, options in parts.items()}
    algo = SimpleNamespace(advantage=made.pop("advantage"), kl=made.pop("kl"))
    return SimpleNamespace(algo=algo, **made)
