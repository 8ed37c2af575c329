"""Door: pyrl's routes in vLLM's server, by which a run samples there (`pyrl sampler` opens it).

vLLM loads it as a middleware. Requests of the run come and tokens go in one exchange for a step, as
arrays; what vLLM's own routes do (pause, resume, the version of the weights) is asked of them.
"""

from __future__ import annotations

import asyncio
import json
from asyncio import Task
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pyrl._core import build_info
from pyrl.engine.vllm import release
from pyrl.engine.vllm.channel import CHANNEL_RECORDS, Channel, Frame
from pyrl.engine.vllm.memory import shared_folder
from pyrl.engine.vllm.table import FORK, TAP
from pyrl.engine.vllm.wire import Answer

PATIENCE = 60.0
"""Seconds that the worker waits for room in the channel, which is read while requests run."""
PAUSE = 0.001
"""Seconds between two looks into the channel; less would be none at all to uvloop's timers."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Door:
    """ASGI middleware. A run opens a session; a later one ends it and the requests that it left."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._routes = {
            "/pyrl/open": self._open,
            "/pyrl/step": self._step,
            "/pyrl/weights": self._weights,
        }
        self._session = ""
        self._channel: Channel | None = None
        self._running: dict[str, Task[None]] = {}
        self._failed: list[BaseException] = []
        self._reader: Task[None] | None = None
        self._frames: list[Frame] = []
        self._news = asyncio.Event()
        """There are frames, or no request runs any more."""
        self._work = [0, 0, 0, 0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        if route != self._open and request.query_params["session"] != self._session:
            response = Response("it serves another run now", status_code=409)
        else:
            response = await route(request, request.app.state.engine_client)
        await response(scope, receive, send)

    async def _open(self, request: Request, client: Any) -> Response:
        """Begin a session: end what runs, try the tap, and tell what is served."""
        self._session = ""
        await client.abort([*self._running])
        await asyncio.gather(*self._running.values())
        await client.resume_generation()  # a run that ended in a sync has left it paused
        if self._channel is None:
            with shared_folder() as folder:
                channel = Channel.create(folder / "channel", CHANNEL_RECORDS)
                values = (str(folder / "channel"), PATIENCE, 0)
                await client.collective_rpc("pyrl_open", args=values)
            self._channel = channel
        await self._try(client)
        self._session = uuid4().hex
        about = {"session": self._session, "pyrl": build_info()["version"]}
        return JSONResponse(about | release.served(client.vllm_config))

    async def _try(self, client: Any) -> None:
        """RuntimeError unless vLLM takes the token that the tap has drawn and written."""
        self._drain()
        self._forget()
        params = release.sampling(1, [], {TAP: [-1, 0, 0, 1, []], FORK: ["", 0]})
        given = await _finished(await client.add_request("try", release.prompt([0]), params))
        self._drain()
        drawn = [frame.records_B["token"].tolist() for frame in self._frames]
        taken = given.outputs[0].token_ids
        if drawn != [[*taken]]:
            raise RuntimeError(f"the tap has drawn {drawn}, and vLLM has taken {[*taken]}")
        self._forget()

    async def _step(self, request: Request, client: Any) -> Response:
        """Drop and queue requests; the tokens drawn since the last answer, when there are some."""
        asked = json.loads(await request.body())
        if asked["sampling"] is not None:
            await client.collective_rpc("pyrl_sampling", args=(asked["sampling"],))
        if asked["abort"]:
            await client.abort(asked["abort"])
        for name, tokens, max_tokens, stop, extra in asked["add"]:
            params = release.sampling(max_tokens, stop, extra)
            queue = await client.add_request(name, release.prompt(tokens), params)
            again = extra[FORK][1]
            self._running[name] = asyncio.create_task(self._follow(name, queue, again))
        if self._running and (self._reader is None or self._reader.done()):
            self._reader = asyncio.create_task(self._read())
        if self._running and not self._frames and asked["wait"]:
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), asked["wait"])
        if self._failed:
            raise RuntimeError(f"a request has failed: {self._failed.pop()}")
        self._drain()
        answer = Answer(self._frames, len(self._running), self._work)
        self._forget()
        return Response(answer.to_bytes(), media_type="application/octet-stream")

    async def _weights(self, request: Request, client: Any) -> Response:
        """Take the body, a safetensors file, as the weights; digests of what has arrived."""
        with shared_folder() as folder:
            path = folder / "weights.safetensors"
            with path.open("wb") as file:
                async for part in request.stream():
                    file.write(part)
            values = (str(path), int(request.query_params["version"]))
            received = (await client.collective_rpc("pyrl_load", args=values))[0]
        if not await client.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset: requests still hold its blocks")
        self._drain()
        self._forget()
        return JSONResponse(received)

    async def _follow(self, name: str, queue: Any, shared: int) -> None:
        """Wait for the end of a request, and count the tokens of its prompt."""
        try:
            output = await _finished(queue)
        except release.ENGINE_ERRORS as error:
            self._failed.append(error)
        else:
            if output.outputs[0].token_ids:
                size, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
                counts = (size - cached, cached, max(0, shared - cached), 1)
                self._work = [a + b for a, b in zip(self._work, counts, strict=True)]
        del self._running[name]
        if not self._running:
            self._news.set()

    async def _read(self) -> None:
        """Empty the channel while requests run: a full one would stop the worker."""
        while self._running:
            self._drain()
            await asyncio.sleep(PAUSE)

    def _drain(self) -> None:
        assert self._channel is not None
        while (frame := self._channel.read()) is not None:
            self._frames.append(frame)
            self._news.set()

    def _forget(self) -> None:
        self._frames, self._work = [], [0, 0, 0, 0]


async def _finished(queue: Any) -> Any:
    """The last output of a request."""
    while not (output := await queue.get()).finished:
        pass
    return output
