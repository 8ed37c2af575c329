"""Wire: what a sampler answers to a step: frames of drawn tokens, as bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyrl.engine.vllm.channel import RECORD, Frame


def model_shape(config: Any) -> dict[str, Any]:
    """The facts of a model's text configuration that tell a model of another kind or size."""
    names = ("model_type", "num_hidden_layers", "hidden_size")
    return {name: config.to_dict().get(name) for name in names}


@dataclass(frozen=True)
class Answer:
    """What a sampler has drawn since it answered last."""

    frames: Sequence[Frame]
    running: int
    """Requests that run or wait."""
    work: Sequence[int]
    """Of requests that have drawn a token and ended meanwhile: tokens of their prompts that were
    computed, that were found in the cache, and computed ones that another request had computed
    before; and how many requests these are."""

    def to_bytes(self) -> bytes:
        """A line of JSON, then the records of all frames."""
        sizes = [[frame.version, len(frame.records_B)] for frame in self.frames]
        head = {"frames": sizes, "running": self.running, "work": self.work}
        records = [frame.records_B.tobytes() for frame in self.frames]
        return b"".join([json.dumps(head).encode(), b"\n", *records])

    @classmethod
    def from_bytes(cls, data: bytes) -> Answer:
        """ValueError, KeyError or TypeError for bytes that are no answer."""
        line, _, rest = data.partition(b"\n")
        head = json.loads(line)
        records_B = np.frombuffer(rest, RECORD)
        sizes = [int(size) for _, size in head["frames"]]
        if len(records_B) != sum(sizes):
            raise ValueError(f"{len(records_B)} records arrived, {sum(sizes)} were sent")
        parts = np.split(records_B, np.cumsum(sizes[:-1], dtype=np.int64))
        versions = [int(version) for version, _ in head["frames"]]
        frames = [Frame(*pair) for pair in zip(versions, parts, strict=False)]
        computed, cached, again, requests = map(int, head["work"])
        return cls(frames, int(head["running"]), (computed, cached, again, requests))
