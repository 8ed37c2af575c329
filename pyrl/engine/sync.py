"""Sync: carry the learner's weights to the engine, and prove that they arrived."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.engine import Branches, Engine, EngineFailure
from pyrl.logits.sampling import Sampling
from pyrl.models import checkpoint_weights

TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest difference (nats) between a probe's log-prob or entropy and those of the learner in
float32, by `Engine.dtype`. A float32 engine is off by 1e-4 at most, one in bfloat16 by 0.2."""


class SyncError(EngineFailure):
    """The engine does not compute with the learner's weights; the message has the numbers."""


class Remote(Engine, Protocol):
    """An engine that has a copy of the weights."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of its cache."""

    def received(self) -> dict[str, int]:
        """The `digest` of each tensor that arrived last, by name."""


class Shared:
    """The sync of an engine that computes with the learner's own tensors: nothing is carried."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, version: int) -> dict[str, float]:
        """Tell the engine that the weights have changed."""
        self._engine.load_weights(None, version)
        return {}


class Copied:
    """The sync of an engine in this process whose model is a copy: the weights that train."""

    def __init__(self, engine: Engine, model: PreTrainedModel, copy: PreTrainedModel) -> None:
        """`model` is the learner's, `copy` the engine's."""
        self._engine = engine
        both = zip(model.parameters(), copy.parameters(), strict=True)
        self._pairs = [(own, its) for own, its in both if own.requires_grad]

    def __call__(self, version: int) -> dict[str, float]:
        """Copy them on the device."""
        with torch.no_grad():
            for own, its in self._pairs:
                its.copy_(own)
        self._engine.load_weights(None, version)
        return {}


class Sync:
    """Carries all weights of `model` to an engine that has its own, and probes it.

    Every tensor is compared bit by bit (by a digest that the receiver computes), which finds one
    that is stale or damaged on the way. Then the engine draws the next token after two beginnings
    of `probe_T` (token ids, longer than a block of its cache), and log-prob and entropy are
    compared with the model's, which finds tensors that arrived and are not used, such as the head
    of tied embeddings, and prefixes cached from older weights. The drawn tokens differ with each
    version. The learner's share of both checks runs in a second thread while the engine loads.
    """

    def __init__(self, engine: Remote, model: PreTrainedModel, probe_T: NDArray[np.int32]) -> None:
        self._engine, self._model = engine, model
        # A whole block and one more, so that a cached prefix that outlived its weights shows.
        self._probe_T = np.resize(probe_T, engine.block_size + 1).astype(np.int32)
        self._length_B = np.array([min(4, self._probe_T.size), self._probe_T.size])

    def __call__(self, version: int) -> dict[str, float]:
        """Sync; seconds and the largest difference of the probe (nats). SyncError if it failed."""
        started = time.monotonic()
        weights = checkpoint_weights(self._model)
        with ThreadPoolExecutor(1) as beside:
            sent = beside.submit(digests, weights)
            learned = beside.submit(self._logprobs)
            self._engine.load_weights(weights.items(), version)
            self._compare(sent.result(), version)
            difference = self._probe(version, learned)
        return {
            "sync/seconds": time.monotonic() - started,
            "sync/difference": difference,
        }

    def _compare(self, sent: dict[str, int], version: int) -> None:
        received = self._engine.received()
        wrong = [name for name in sent if received.get(name) != sent[name]]
        if wrong or self._engine.weight_version() != version:
            raise SyncError(
                f"sync of version {version} (the engine says {self._engine.weight_version()}): "
                f"{len(wrong)} of {len(sent)} tensors arrived stale or damaged: "
                f"{', '.join(wrong[:8])}"
            )

    def _probe(self, version: int, learned: Future[Tensor]) -> float:
        branch_B = np.arange(len(self._length_B))
        self._engine.start(Sampling())
        self._engine.submit(
            Branches(
                prompts=[self._probe_T[:length] for length in self._length_B],
                prompt_B=branch_B,
                branch_B=branch_B,
                seed_B=np.array([version, version + 1], np.uint64),
                limit_B=np.ones(len(branch_B), np.int64),
            )
        )
        largest, tolerance = 0.0, TOLERANCE[self._engine.dtype]
        while len((sampled := self._engine.step()).branch_B):
            expected_BV = learned.result()[sampled.branch_B]
            chosen_B = expected_BV[np.arange(len(expected_BV)), sampled.token_B]
            entropy_B = torch.special.entr(expected_BV.exp()).sum(-1)
            expected_B2 = torch.stack([chosen_B, entropy_B], dim=1).numpy()
            drawn_B2 = np.stack([sampled.logprob_B, sampled.entropy_B], axis=1)
            difference_B2 = np.abs(drawn_B2 - expected_B2)
            if not (difference_B2 <= tolerance).all():
                raise SyncError(
                    f"sync of version {version}: all tensors arrived, and the engine computes with "
                    "others (a tied head, or a cached prefix?). Log-prob and entropy of its tokens "
                    f"{drawn_B2.tolist()}, of the learner {expected_B2.tolist()}: they differ by "
                    f"{difference_B2.max():.2g} nats, at most {tolerance} is right for "
                    f"{self._engine.dtype}"
                )
            largest = max(largest, float(difference_B2.max()))
        return largest

    def _logprobs(self) -> Tensor:
        """Log-probs [B, V] of the token after each beginning of the probe, by the learner."""
        device = self._model.device
        training = self._model.training
        self._model.eval()
        # A new thread is on the first device, and Triton looks at the thread's, not the tensor's.
        with torch.no_grad(), torch.accelerator.device_index(device.index):
            logits_BV: Tensor = self._model(
                input_ids=torch.from_numpy(self._probe_T).to(device, torch.int64)[None],
                use_cache=False,
                logits_to_keep=torch.from_numpy(self._length_B - 1).to(device),
            ).logits[0]
        self._model.train(training)
        return logits_BV.cpu().double().log_softmax(-1)


def digest(tensor: Tensor) -> int:
    """The sum of all 8-byte words of a tensor, which does not depend on the order of summation."""
    data = tensor.detach().contiguous().view(torch.uint8).flatten()
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    return int(words.sum()) + int(data[words.numel() * 8 :].sum())


def digests(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The `digest` of each weight; a tied one is computed once."""
    known: dict[tuple[object, ...], int] = {}
    found = {}
    for name, tensor in weights.items():
        memory = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if memory not in known:
            known[memory] = digest(tensor)
        found[name] = known[memory]
    return found
