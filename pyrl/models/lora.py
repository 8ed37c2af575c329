"""LoRA: low-rank adapters beside frozen weights (arXiv:2106.09685), made and read by peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyrl.models.folder import adapter_base
from pyrl.models.loading import UNLOADABLE, ModelError, quiet_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRA:
    """Which low-rank matrices train. Dropout is not among the settings: a policy gradient is that
    of the policy that sampled, which drops nothing."""

    rank: int | None = None
    """Rank of the adapter that trains in the place of the weights; None: all weights train."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank; None: twice the rank."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Linear layers that get one, by the last part of their names; "all-linear": all but the
    head."""
    merge: bool = False
    """Leave the trained model whole in `model/`, with the adapter in its weights."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"lora.rank: expected at least 1, or no rank at all to train all weights, "
                f"got {self.rank}"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha: expected > 0, got {self.alpha}")
        if not self.targets:
            raise ValueError(
                f"lora.targets: expected names of linear layers, or {ALL_LINEAR!r}, got none"
            )


def add_adapter(model: PreTrainedModel, lora: LoRA, base: str, seed: int) -> None:
    """Freeze `model` and give it a new adapter, which changes nothing yet.

    `base`: where the model was loaded from, for the adapter's own file; `seed` fixes the adapter's
    random half. ModelError: peft is missing, or no layer has such a name.
    """
    peft = _peft("lora.rank")
    if list(lora.targets) != [ALL_LINEAR]:
        names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        if unknown := [name for name in lora.targets if name not in names]:
            raise ModelError(
                f"lora.targets: expected names of {type(model).__name__}'s linear layers, "
                f"{', '.join(sorted(names))}, or {ALL_LINEAR!r}, got {', '.join(unknown)}"
            )
    assert lora.rank is not None
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        target_modules=ALL_LINEAR if list(lora.targets) == [ALL_LINEAR] else list(lora.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    # peft keeps the names as a set: its file would have them in another order each time.
    config.target_modules = sorted(config.target_modules)
    config.base_model_name_or_path = base
    model.eval()


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Freeze `model` and give it the adapter in `folder`, which trains on.

    ModelError: peft is missing, or the adapter belongs to another model.
    """
    _peft(str(folder))
    with _matching(model, folder):
        model.load_adapter(str(folder), is_trainable=True)
    model.eval()


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with the adapter in `folder` added to its weights: an ordinary model.

    ModelError as `load_adapter`.
    """
    peft = _peft(str(folder))
    with _matching(model, folder):
        whole = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return cast("PreTrainedModel", whole.eval())


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether an adapter trains in the place of the weights."""
    return bool(model._hf_peft_config_loaded)


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as it was before it had an adapter; within, nothing can train."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that the model with its adapter amounts to, by the names that it has without."""
    from peft.tuners.lora import Linear

    weights: dict[str, Tensor] = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            for key in [key for key in weights if key.startswith(f"{name}.lora_")]:
                del weights[key]
            for key in [key for key in weights if key.startswith(f"{name}.base_layer.")]:
                weights[key.replace(".base_layer.", ".")] = weights.pop(key)
            for adapter in layer.active_adapters:
                weight = weights[f"{name}.weight"]
                weights[f"{name}.weight"] = weight + layer.get_delta_weight(adapter).to(weight)
    return weights


@contextmanager
def _matching(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Raise ModelError for an adapter that does not fit."""
    name, base = type(model).__name__, adapter_base(folder)
    try:
        with quiet_progress(), warnings.catch_warnings():
            # peft reads every attribute of a model, those that are deprecated too.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except (OSError, SafetensorError, *UNLOADABLE) as error:
        said = " ".join(str(error).split())
        raise ModelError(
            f"{folder}: expected an adapter for this {name}, it was made for {base}: {said}"
        ) from error


def _peft(asker: str) -> ModuleType:
    if find_spec("peft") is None:
        raise ModelError(f"{asker}: peft is needed for adapters; pip install 'pyrl[lora]'")
    return import_module("peft")
