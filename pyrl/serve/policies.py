"""Policies: adapters that train over one frozen model, and the folders that hold their weights."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.models.folder import ADAPTER
from pyrl.models.lora import LoRA, add_adapter, load_adapter
from pyrl.run.checkpoint import replacing, write_model
from pyrl.serve.body import RequestError

OPTIMIZER = "optimizer.safetensors"
"""Moments and step counts beside an adapter; without it a folder is for sampling alone."""

URI = re.compile(r"tinker://([\w:-]+)/(weights|sampler_weights)/(\w[\w.-]{0,127})")
NAME = re.compile(r"\w[\w.-]{0,127}")

UNNAMED = "session-"
"""How a folder begins that a client did not name; the number of its sampling session follows."""
SNAPSHOTS = 16
"""Unnamed weights of a model that are kept."""

ATTENTION = re.compile(r"att")
"""What the path of a layer of attention has in it; the other layers are the MLP's."""


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own over the same tensors: an adapter is put into it and not into `model`."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass(eq=False)
class Policy:
    """A model that a client trains."""

    model: PreTrainedModel
    rank: int
    optimizer: torch.optim.Optimizer = field(init=False)
    saved: bool = True
    """Nothing has changed since the weights were last written."""

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors by the names of their parameters."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value.detach().contiguous().cpu()
        return found

    def restore(self, moments: dict[str, Tensor]) -> None:
        """Go on with an optimizer's tensors."""
        parameters = dict(self.model.named_parameters())
        for place, value in moments.items():
            name, _, key = place.rpartition("/")
            parameter = parameters[name]
            # AdamW keeps its count of steps on the CPU.
            state = value if key == "step" else value.to(parameter.device)
            self.optimizer.state[parameter][key] = state


class Policies:
    """Makes policies over the served model, writes their folders and reads them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        root: Path,
    ) -> None:
        """`source`: where the model was loaded from, for the adapters' own files; `root`: where
        their folders are."""
        self.base, self.tokenizer, self.source, self.root = model, tokenizer, source, root

    def new(self, rank: int, seed: int, *, attention: bool, mlp: bool) -> Policy:
        """A policy that is the served model. ModelError: no layer of the asked kind is there."""
        model = shared_copy(self.base)
        targets = ("all-linear",) if attention and mlp else self._layers(attention, mlp)
        add_adapter(model, LoRA(rank=rank, targets=targets), self.source, seed)
        return Policy(model, rank)

    def _layers(self, attention: bool, mlp: bool) -> tuple[str, ...]:
        head = self.base.get_output_embeddings()
        named = [
            (path.rpartition(".")[2], bool(ATTENTION.search(path)))
            for path, layer in self.base.named_modules()
            if isinstance(layer, nn.Linear) and layer is not head
        ]
        return tuple(sorted({n for n, attends in named if (attention if attends else mlp)}))

    def save(self, uri: str, policy: Policy, *, overwrite: bool = True, state: bool = True) -> None:
        """Write a policy whole or not at all; with `state` also what its training goes on from.

        RequestError: the folder is there, and must not be overwritten.
        """
        folder = self.folder(uri)
        if folder.exists() and not overwrite:
            raise RequestError(f"path: expected a name that is not in use, got {uri!r}")
        with replacing(folder) as part:
            write_model(part, policy.model, self.tokenizer)
            if state:
                save_file(policy.moments(), part / OPTIMIZER)
        policy.saved = policy.saved or state

    def drop_old(self, uri: str) -> None:
        """Of the unnamed weights beside these only the newest stay."""
        folders = [*self.folder(uri).parent.glob(f"{UNNAMED}*")]
        folders.sort(key=lambda folder: int(folder.name.removeprefix(UNNAMED)))
        for old in folders[:-SNAPSHOTS]:
            shutil.rmtree(old)

    def load(self, uri: str, *, optimizer: bool) -> Policy:
        """A policy that was saved, with its optimizer if asked for.

        RequestError: there is no such folder, or it has no optimizer.
        """
        folder = self.found(uri)
        model = shared_copy(self.base)
        load_adapter(model, folder)
        policy = Policy(model, self.saved_rank(uri))
        if optimizer:
            if not (folder / OPTIMIZER).is_file():
                raise RequestError(
                    f"path: expected weights with an optimizer, as save_state writes them, "
                    f"got {uri!r}"
                )
            policy.restore(load_file(folder / OPTIMIZER))
        return policy

    def sampler(self, uri: str | None) -> PreTrainedModel:
        """A model to sample from: saved weights, or the served model itself."""
        model = shared_copy(self.base)
        if uri is not None:
            load_adapter(model, self.found(uri))
        return model

    def saved_rank(self, uri: str) -> int:
        """The rank of saved weights. RequestError: there are none."""
        return int(json.loads((self.found(uri) / ADAPTER).read_text())["r"])

    def folder(self, uri: str) -> Path:
        """Where a path of the protocol lies. RequestError: it is none."""
        match = URI.fullmatch(uri)
        if match is None:
            raise RequestError(
                f"path: expected tinker://MODEL/weights/NAME or tinker://MODEL/sampler_weights/NAME,"
                f" got {uri!r}"
            )
        return self.root.joinpath(*match.groups())

    def found(self, uri: str) -> Path:
        """The same for weights that are there; RequestError otherwise."""
        folder = self.folder(uri)
        if not folder.is_dir():
            raise RequestError(f"path: expected weights that were saved here, got {uri!r}", 404)
        return folder


def checked_name(name: str) -> str:
    """RequestError unless it names a folder."""
    if not NAME.fullmatch(name):
        raise RequestError(
            f"path: expected a name of letters, digits, '_', '-' and '.', at most 128, got {name!r}"
        )
    return name
