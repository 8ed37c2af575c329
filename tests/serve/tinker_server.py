"""`pyrl serve` in a process of its own, and the official SDK as its client."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import tinker
from tinker import types

TOKEN = "tml-test"


class Server:
    """Runs while it is entered; `output` is where its weights are."""

    def __init__(self, output: Path, model: str = "demo") -> None:
        self.output, self.model = output, model

    def __enter__(self) -> Server:
        # -P: not the source tree, where it is the working directory.
        command = [
            sys.executable,
            "-P",
            "-m",
            "pyrl",
            "serve",
            "--model",
            self.model,
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(
            [*command, "--token", TOKEN, "--output", str(self.output), "--max-models", "64"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if found := re.search(r"TINKER_BASE_URL=(http://([\d.]+):(\d+))", line):
                self.url, self.host, self.port = found[1], found[2], int(found[3])
                return self
        raise AssertionError(said)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> str:
        """What it says when it is told to stop; it must end by itself."""
        if self.process.poll() is None:
            self.process.terminate()
        said = self.process.communicate(timeout=30)[0]
        assert self.process.returncode == 0, said
        return said

    def client(self, token: str = TOKEN) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=token)

    def post(
        self,
        path: str,
        body: object,
        *,
        token: str = TOKEN,
        kind: str = "application/json",
    ) -> tuple[int, Any]:
        """A request without the SDK, as broken as a test wants it."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"x-api-key": token, "content-type": kind}
        connection.request("POST", f"/api/v1/{path}", data, headers)
        answer = connection.getresponse()
        said = json.loads(answer.read())
        connection.close()
        return answer.status, said


def ready(future: Any) -> Any:
    """A client that some releases return at once and others in a future."""
    return future.result() if hasattr(future, "result") else future


def served_name() -> str:
    from pyrl import demo

    return str(demo.MODEL)


def trainee(client: tinker.ServiceClient, rank: int = 4, seed: int = 3) -> tinker.TrainingClient:
    return ready(client.create_lora_training_client(served_name(), rank=rank, seed=seed))


def datum(prompt: list[int], response: list[int], **columns: list[float]) -> types.Datum:
    """A response that trains; each column has a number for each of its tokens."""
    full, before = prompt + response, [0.0] * (len(prompt) - 1)
    inputs: dict[str, Any] = {name: before + values for name, values in columns.items()}
    return types.Datum(
        model_input=types.ModelInput.from_ints(full[:-1]),
        loss_fn_inputs={"target_tokens": full[1:], **inputs},
    )


def prompt(ids: list[int]) -> types.ModelInput:
    return types.ModelInput.from_ints(ids)
