"""What a verifier process knows about reasoning_gym: the scorers of its tasks.

Loaded by file in the workers of a `VerifierPool`, never imported by the training process: some
scorers evaluate what a model wrote as an expression. Such an answer may read, but it cannot write a
file, start a process or open a connection.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
from functools import lru_cache
from typing import Any

from reasoning_gym.factory import create_dataset

_STUMBLES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HARMLESS = {"os.listdir", "os.scandir", "os.walk"}  # imports look around


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    room = event.partition(".")[0]
    acts = room in {"os", "subprocess", "socket", "shutil", "ctypes", "signal", "pty", "fcntl"}
    writes = event == "open" and bool(arguments[2] & _WRITING)
    if writes or (acts and event not in _HARMLESS):
        raise PermissionError(f"{event}: a scorer of answers only reads")


sys.addaudithook(_refuse)


@lru_cache(maxsize=64)
def _dataset(task: str, options: str) -> Any:
    return create_dataset(task, **json.loads(options))


def score(task: str, options: str, entry: str, answer: str) -> float:
    """The task's score of an answer; 0 where its scorer cannot read it.

    `entry`: the record that the training process got from the task, as a pickle in base64.
    """
    dataset = _dataset(task, options)
    try:
        return float(dataset.score_answer(answer, pickle.loads(base64.b64decode(entry))))
    except _STUMBLES:
        return 0.0
