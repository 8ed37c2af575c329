"""Worker: the methods by which vLLM's worker processes set up a tap and take weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pyrl.engine.sync import digest
from pyrl.engine.vllm import release
from pyrl.engine.vllm.channel import Channel
from pyrl.engine.vllm.tap import UNCLAIMED, Drawing
from pyrl.logits.sampling import Sampling


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), called by name."""

    rank: int
    model_runner: Any
    pyrl_drawing: Drawing
    """The drawing of this worker's tap."""

    def pyrl_open(self, path: str, patience: float, owner: int) -> None:
        """Let the first rank write the tokens that it draws into a channel.

        `patience`: seconds to wait for the reader. `owner`: the process that this one works for and
        ends with; 0: it is this one.
        """
        self.pyrl_drawing = drawing = UNCLAIMED.pop()
        drawing.patience = patience
        drawing.discarded = release.discarded_rows(self.model_runner)
        if self.rank == 0:
            drawing.channel = Channel(path)
        if owner:
            # Ctrl-C reaches every process of a terminal; the owner decides what follows.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            Thread(target=_end_with, args=(owner,), daemon=True).start()

    def pyrl_sampling(self, values: Sequence[Any]) -> None:
        """Draw from this distribution, as its fields in their order, from now on."""
        self.pyrl_drawing.sampling = Sampling(*values)

    def pyrl_load(
        self, weights: Iterable[tuple[str, Tensor]] | str, version: int
    ) -> dict[str, int]:
        """Take weights, named as in a checkpoint, from memory or a file; returns their digests."""
        received: dict[str, int] = {}
        plain = release.plain_weights(self.model_runner.get_model())
        taken: dict[int, int] = {}

        def passing() -> Iterator[tuple[str, Tensor]]:
            pairs = _read(Path(weights)) if isinstance(weights, str) else weights
            for name, tensor in pairs:
                weight = plain.get(name)
                if weight is None or weight.shape != tensor.shape:  # packed, sharded or padded
                    received[name] = digest(tensor)
                    yield name, tensor
                    continue
                if id(weight) not in taken:
                    weight.data.copy_(tensor)
                    taken[id(weight)] = digest(tensor)
                received[name] = taken[id(weight)]  # a tied one is written by its first name

        self.model_runner.reload_weights(weights_iterator=passing())
        self.pyrl_drawing.version = version
        return received


def _end_with(owner: int) -> None:
    """End this process when its owner has ended, in whatever way, to free its memory."""
    status = Path(f"/proc/{owner}/stat")
    while True:
        try:
            state = status.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            state = "X"
        if state in "XZ":  # gone, or dead and not yet reaped
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        # A safe_open file is no dictionary: it cannot be iterated itself.
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)
