"""A sampler without vLLM: the routes of `pyrl sampler` over a small model, and faults at will."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pyrl._core import build_info
from pyrl.engine import NO_TOKENS
from pyrl.engine.sync import digest
from pyrl.engine.vllm.channel import RECORD, Frame
from pyrl.engine.vllm.table import TAP
from pyrl.engine.vllm.wire import Answer, model_shape
from pyrl.logits.sample_tokens import sample_tokens
from pyrl.logits.sampling import Exclude, Sampling


@dataclass
class Request:
    tokens: list[int]
    left: int
    stop: Sequence[int]
    ticket: int
    seed: int
    position: int
    exclude: np.ndarray


class StandIn:
    """Serves on a free port, or on `port`, from its making until `stop`."""

    def __init__(self, model: PreTrainedModel, port: int = 0, **about: Any) -> None:
        self.model = model
        self.about = {
            "pyrl": build_info()["version"],
            "vllm": "0.32.0",
            "model": "a model",
            "dtype": "float32",
            "vocabulary": model.get_input_embeddings().num_embeddings,
            "max_model_len": 64,
            "block_size": 4,
            "shape": model_shape(model.config.get_text_config()),
        } | about
        self.faults: dict[int, str] = {}
        """By the number of the step, from now on, what goes wrong in it: "die" and say nothing any
        more, "cut" the connection, be "silent", answer with "garbage" or an "error"."""
        self.missing: set[str] = set()
        """Routes that it has not."""
        self.loads: list[int] = []
        """Versions that it was brought."""
        self.drawn = 0
        self.session = ""
        self.sessions = 0
        self.version = 0
        self.told_version = "default"
        self.running: dict[str, Request] = {}
        self.sampling = Sampling()
        self.dead = False
        self.lock = Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                stand_in.answer(self)

            def do_POST(self) -> None:
                stand_in.answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.port: int = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.dead = True
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"] or 0))
        if self.dead:
            cut(handler)
            return
        where = urlsplit(handler.path)
        asked = {name: values[0] for name, values in parse_qs(where.query).items()}
        with self.lock:
            if where.path in self.missing:
                status, said = 404, b"{}"
            elif asked.get("session", self.session) != self.session:
                status, said = 409, b"it serves another run now"
            elif where.path == "/pyrl/step" and (fault := self.fault()):
                if fault in ("die", "cut", "silent"):
                    self.dead = fault == "die"
                    time.sleep(0.6 if fault == "silent" else 0)
                    cut(handler)
                    return
                status, said = (200, b"no tokens") if fault == "garbage" else (500, b"it is full")
            else:
                status, said = 200, self.route(where.path, asked, body)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(said)))
        handler.end_headers()
        handler.wfile.write(said)

    def fault(self) -> str | None:
        self.faults = {at - 1: fault for at, fault in self.faults.items()}
        return self.faults.pop(0, None)

    def route(self, path: str, asked: dict[str, str], body: bytes) -> bytes:
        if path == "/pyrl/open":
            self.running.clear()
            self.sessions += 1
            self.session = f"{self.port}-{self.sessions}"
            return json.dumps(self.about | {"session": self.session}).encode()
        if path == "/pyrl/step":
            return self.step(json.loads(body)).to_bytes()
        if path == "/pyrl/weights":
            weights = load_tensors(body)
            self.model.load_state_dict(weights)
            self.version = int(asked["version"])
            self.loads.append(self.version)
            return json.dumps({name: digest(tensor) for name, tensor in weights.items()}).encode()
        if path == "/update_weight_version":
            self.told_version = json.loads(body)["new_version"]
        return json.dumps({"weight_version": self.told_version}).encode()

    def step(self, asked: dict[str, Any]) -> Answer:
        """One token for each request."""
        if asked["sampling"] is not None:
            self.sampling = Sampling(*asked["sampling"])
        for name in asked["abort"]:
            self.running.pop(name, None)
        for name, tokens, limit, stop, extra in asked["add"]:
            ticket, seed, first, _, exclude = extra[TAP]
            tokens_E = np.array(exclude, np.int32)
            self.running[name] = Request(tokens, limit, stop, ticket, seed, first, tokens_E)
        rows = list(self.running.values())
        if not rows:
            return Answer([], 0, (0, 0, 0, 0))
        frame = Frame(self.version, self.draw(rows))
        self.drawn += len(rows)
        ended = [name for name, row in self.running.items() if not row.left]
        for name in ended:
            del self.running[name]
        return Answer([frame], len(self.running), (len(ended), 0, 0, len(ended)))

    def draw(self, rows: Sequence[Request]) -> np.ndarray:
        length_B = torch.tensor([len(row.tokens) for row in rows])
        paths = [torch.tensor(row.tokens) for row in rows]
        with torch.no_grad():  # no token sees those after it
            logits_BTV = self.model(input_ids=pad_sequence(paths, True), use_cache=False).logits
        logits_BV = logits_BTV[torch.arange(len(rows)), length_B - 1].contiguous()
        drawn = sample_tokens(
            logits_BV,
            np.array([row.seed for row in rows], np.uint64),
            np.array([row.position for row in rows], np.int64),
            self.sampling,
            Exclude.of_rows([row.exclude for row in rows]),
        )
        records_B = np.zeros(len(rows), RECORD)
        records_B["ticket"] = [row.ticket for row in rows]
        records_B["position"] = [row.position for row in rows]
        for name in RECORD.names[2:] if RECORD.names else ():
            records_B[name] = getattr(drawn, f"{name}_B")
        for row, token in zip(rows, drawn.token_B.tolist(), strict=True):
            row.tokens.append(token)
            row.position += 1
            row.left = 0 if token in row.stop else row.left - 1
            row.exclude = NO_TOKENS
        return records_B


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port
