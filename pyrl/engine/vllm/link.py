"""Link: the connection to one sampler, and the requests that run there."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import astuple
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode, urlsplit

from pyrl._core import build_info
from pyrl.engine import EngineError, EngineFailure
from pyrl.engine.vllm.channel import Frame
from pyrl.engine.vllm.wire import Answer
from pyrl.logits.sampling import Sampling

START = "start it with `pyrl sampler --model MODEL --host HOST --port PORT`"
WAIT = 2.0
"""Seconds after which a sampler answers a step without a token."""
REACH = 10.0
"""Seconds to reach one, and beyond WAIT for such an answer: longer and it is lost."""
OPEN = 60.0
"""Seconds to begin a session, in which a sampler ends what runs and draws a token."""
IDLE = 1.0
"""Seconds after which a connection is made anew: servers close those that are idle."""

FACTS = ("pyrl", "model", "dtype", "vocabulary", "max_model_len", "block_size", "shape", "vllm")
"""What a sampler tells of itself."""


class TakenError(EngineFailure):
    """A sampler that serves another run now."""


class Link:
    """A sampler at `url`; EngineFailure from each method if it does not answer, or says no.

    `seconds`: how long it may take for weights, or be without a token.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url = url.rstrip("/")
        self.tickets: set[int] = set()
        """Branches that run or wait there."""
        self.about: dict[str, Any] = {}
        self.work = [0, 0, 0, 0]
        """As in `Answer`, of all answers."""
        self._seconds = seconds
        self._frames: deque[Frame] = deque()
        self._version = 0
        self._add: list[Any] = []
        self._abort: list[str] = []
        self._sampling: tuple[Any, ...] | None = None
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port, timeout=REACH)
        self._used = 0.0

    def open(self, shape: Mapping[str, Any]) -> None:
        """Begin a session. EngineError for what is no sampler, is of another release, or runs a
        model of another `shape` than the learner's."""
        self.forget()
        data = self._call("POST", "/pyrl/open", patience=min(OPEN, self._seconds))
        try:
            said = json.loads(data)
            self.about = {name: said[name] for name in FACTS}
            self._session = said["session"]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self.url} is no sampler: it answers {data[:80]!r}") from error
        ours = build_info()["version"]
        if said["pyrl"] != ours:
            raise EngineError(
                f"{self.url}: expected a sampler of pyrl {ours}, as here, got pyrl {said['pyrl']}"
            )
        if said["shape"] != dict(shape):
            raise EngineError(
                f"{self.url}: expected a model like the learner's, {_told(shape)}, got "
                f"{said['model']}, {_told(said['shape'])}: both must load the same base model"
            )
        self._call(
            "GET",
            "/weight_info",
            missing="its vLLM has no routes for trainers: it was started without "
            f"VLLM_SERVER_DEV_MODE=1, or is of a release without them (vLLM {said['vllm']}); "
            + START,
        )

    def forget(self) -> None:
        """Know of no request any more."""
        self._connection.close()
        self.tickets.clear()
        self._frames.clear()
        self._add, self._abort = [], []

    def start(self, sampling: Sampling) -> None:
        """Draw from this distribution, from the next step on."""
        self._sampling = astuple(sampling)

    def add(self, ticket: int, request: tuple[Any, ...]) -> None:
        """Queue a request with the next step; its name is the ticket."""
        self.tickets.add(ticket)
        self._add.append((str(ticket), *request))

    def abort(self, ticket: int) -> None:
        """Drop a request with the next step."""
        self.tickets.discard(ticket)
        self._abort.append(str(ticket))

    @property
    def due(self) -> bool:
        """Whether a step has something to ask or to wait for here."""
        return bool(self.tickets or self._add or self._abort)

    def step(self) -> Frame | None:
        """Make the calls that wait; the next tokens, None if no request is left."""
        deadline = time.monotonic() + self._seconds
        if not self._frames or self._add or self._abort:
            self._exchange()
        while not self._frames and self.tickets:
            if time.monotonic() > deadline:
                raise EngineFailure(f"{self.url} has drawn no token for {self._seconds:g} s")
            self._exchange()
        return self._frames.popleft() if self._frames else None

    def put_back(self, frame: Frame) -> None:
        """Give the frame back that the last step took."""
        self._frames.appendleft(frame)

    def load(self, path: Path, version: int) -> dict[str, int]:
        """Bring a file of weights: digests of what arrived."""
        size = path.stat().st_size
        self._call("POST", "/pause?mode=abort", patience=self._seconds)
        where = "/pyrl/weights?" + urlencode({"session": self._session, "version": version})
        with path.open("rb") as file:
            said = self._call("POST", where, file, size=size, patience=self._seconds)
        named = json.dumps({"new_version": str(version)}).encode()
        self._call("POST", "/update_weight_version", named)
        self._call("POST", "/resume")
        told = json.loads(self._call("GET", "/weight_info"))["weight_version"]
        if told != str(version):
            raise EngineFailure(f"{self.url}: expected weights of version {version}, got {told}")
        self._version = version
        self._frames.clear()
        received: dict[str, int] = json.loads(said)
        return received

    def close(self) -> None:
        """Stop what runs there."""
        if self.tickets:
            for ticket in [*self.tickets]:
                self.abort(ticket)
            self._add = []
            self._exchange()
        self._connection.close()

    def _exchange(self) -> None:
        """One step there; its frames are kept."""
        wait = 0.0 if self._frames or not self.tickets else min(WAIT, self._seconds)
        asked = {
            "sampling": self._sampling,
            "add": self._add,
            "abort": self._abort,
            "wait": wait,
        }
        body = json.dumps(asked).encode()
        where = "/pyrl/step?" + urlencode({"session": self._session})
        data = self._call("POST", where, body, patience=wait + REACH)
        self._sampling, self._add, self._abort = None, [], []
        try:
            answer = Answer.from_bytes(data)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFailure(f"{self.url}: expected tokens, got {data[:80]!r}") from error
        for frame in answer.frames:
            if frame.version != self._version:
                raise EngineFailure(
                    f"{self.url}: tokens were drawn with weights of version {frame.version}, "
                    f"expected {self._version}"
                )
        self._frames.extend(answer.frames)
        self.work = [a + b for a, b in zip(self.work, answer.work, strict=True)]
        if self.tickets and not answer.running and not self._frames:
            raise EngineFailure(f"{self.url}: {len(self.tickets)} requests ended before their end")

    def _call(
        self,
        method: str,
        where: str,
        body: bytes | IO[bytes] = b"",
        *,
        size: int | None = None,
        patience: float = REACH,
        missing: str = START,
    ) -> bytes:
        """The body of the answer. `missing`: what is said where there is no such route."""
        path = where.partition("?")[0]
        headers = {"Content-Type": "application/json"}
        if size is not None:
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        try:
            if time.monotonic() - self._used > IDLE:
                self._connection.close()
            if self._connection.sock is None:
                self._connection.timeout = REACH
                self._connection.connect()
            self._connection.sock.settimeout(patience)
            self._connection.request(method, where, body, headers)
            response = self._connection.getresponse()
            said = response.read()
        except (OSError, HTTPException) as error:
            self._connection.close()
            told = str(error) or type(error).__name__
            raise EngineFailure(f"{self.url} does not answer {path}: {told}") from error
        self._used = time.monotonic()
        if response.status in (404, 405):
            raise EngineError(f"{self.url} has no {path}: {missing}")
        if response.status == 409:
            raise TakenError(f"{self.url} serves another run now")
        if response.status != 200:
            told = said.decode(errors="replace")[:400]
            raise EngineFailure(f"{self.url} answers {path} with {response.status}: {told}")
        return said


def _told(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
