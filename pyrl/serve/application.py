"""Application: the protocol's addresses, and what of a request is checked before it is queued."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyrl.serve.body import Body, RequestError
from pyrl.serve.clients import check_release, check_token
from pyrl.serve.futures import Futures, Job, Outcome
from pyrl.serve.service import Creation, Service, sampler_writing, writing
from pyrl.serve.training import Adam
from pyrl.serve.wire import PROTOBUF, read_pass

BODY = 64 << 20
"""Bytes of a request at most."""
BODIES = 512 << 20
"""Bytes of all requests that are being received at most."""

CONFIG = {"parallel_fwdbwd_chunks": False, "create_model_via_load_weights": True}
"""What clients are told to do: parts of a batch come in their order, and saved weights make a
model in one request."""

Answer = Callable[[Body], Awaitable[Any]]


class Application:
    """Answers requests; what computes is queued, and its result is fetched later."""

    def __init__(self, service: Service, token: str) -> None:
        self._service, self._token, self._futures = service, token, Futures()
        self._receiving = 0
        self._last: dict[str, int] = {}
        """The number of each model's newest request."""

    def starlette(self) -> Starlette:
        """The application as a web server runs it."""
        posts: dict[str, Answer] = {
            "client/config": self._config,
            "client/dynamic_config": self._dynamic_config,
            "create_session": self._create_session,
            "session_heartbeat": self._heartbeat,
            "telemetry": self._telemetry,
            "create_model": self._create_model,
            "get_info": self._get_info,
            "weights_info": self._weights_info,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_for_sampler,
            "load_weights": self._load_weights,
            "create_sampling_session": self._create_sampling_session,
            "asample": self._sample,
            "retrieve_future": self._retrieve,
        }
        routes = [_route(path, self._json(answer)) for path, answer in posts.items()]
        routes += [
            _route("forward_backward", self._forward_backward),
            _route("sessions/{session}/finish", self._finish),
            _route("healthz", self._health, "GET"),
            _route("get_server_capabilities", self._capabilities, "GET"),
            _route("samplers/{sampler_id}", self._sampler, "GET"),
            Route("/{path:path}", self._unknown, methods=["GET", "POST", "PUT", "DELETE"]),
        ]
        return Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={RequestError: _refused, ClientDisconnect: _left},
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        serving = asyncio.create_task(self._futures.serve())
        yield
        serving.cancel()
        self._futures.close()
        for path in self._service.put_away():
            print(f"saved    {path}", flush=True)

    # Who asks, and what.

    def _json(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            body = Body.read(await self._body(request))
            found = await answer(body)
            return found if isinstance(found, Response) else JSONResponse(found)

        return respond

    async def _body(self, request: Request) -> bytes:
        """RequestError: the client has no token, or its request is too large."""
        check_token(self._token, request.headers.get("x-api-key", ""))
        size, parts = 0, []
        try:
            async for part in request.stream():
                size += len(part)
                self._receiving += len(part)
                if size > BODY:
                    raise RequestError(f"body: expected at most {BODY >> 20} MiB", 413)
                if self._receiving > BODIES:
                    raise RequestError(f"body: expected at most {BODIES >> 20} MiB in all", 429)
                parts.append(part)
        finally:
            self._receiving -= size
        return b"".join(parts)

    async def _unknown(self, request: Request) -> Response:
        check_token(self._token, request.headers.get("x-api-key", ""))
        raise RequestError(
            f"path: expected an address that pyrl serves, got {request.url.path!r}", 404
        )

    # Sessions.

    async def _config(self, body: Body) -> Any:
        check_release(body.text("sdk_version"))
        return CONFIG

    async def _dynamic_config(self, body: Body) -> Any:
        return {"refresh_interval_sec": 3600}

    async def _create_session(self, body: Body) -> Any:
        check_release(body.text("sdk_version"))
        told = "adapters are of all linear layers but the head, whatever train_unembed says"
        session = self._service.sessions.new()
        return {"type": "create_session", "session_id": session, "info_message": told}

    async def _heartbeat(self, body: Body) -> Any:
        self._service.sessions.hear(body.text("session_id"))
        return {"type": "session_heartbeat"}

    async def _finish(self, request: Request) -> Response:
        await self._body(request)
        self._service.sessions.end(request.path_params["session"])
        return JSONResponse({})

    async def _telemetry(self, body: Body) -> Any:
        """Nothing is kept of it."""
        return {"status": "accepted"}

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _capabilities(self, request: Request) -> Response:
        check_token(self._token, request.headers.get("x-api-key", ""))
        model = {
            "model_name": self._service.name,
            "max_context_length": self._service.positions,
            "trainable": True,
            "sampleable": True,
        }
        return JSONResponse({"supported_models": [model]})

    # Models.

    async def _create_model(self, body: Body) -> Any:
        work = self._service.creation(body, self._new_model(body))
        return self._queued(f"{work.model_id}:0", work, self._service.create, work.model_id)

    async def _load_weights(self, body: Body) -> Any:
        path, optimizer = body.text("path"), body.flag("optimizer")
        if body.has("session_id"):
            work = Creation(self._new_model(body), path=path, optimizer=optimizer)
            return self._queued(f"{work.model_id}:0", work, self._service.create, work.model_id)
        work = Creation(self._model(body), path=path, optimizer=optimizer)
        return self._turn(body, work.model_id, work, self._service.create)

    def _new_model(self, body: Body) -> str:
        session = body.text("session_id")
        self._service.sessions.hear(session)
        return f"{session}:train:{body.whole('model_seq_id', least=0, most=1 << 62)}"

    def _model(self, body: Body) -> str:
        model_id = body.text("model_id")
        self._service.known(model_id)
        return model_id

    async def _get_info(self, body: Body) -> Any:
        return self._service.info(body.text("model_id")) | {"type": "get_info"}

    async def _weights_info(self, body: Body) -> Any:
        return self._service.weights_info(body.text("tinker_path"))

    async def _forward_backward(self, request: Request) -> Response:
        data = await self._body(request)
        if PROTOBUF not in request.headers.get("content-type", ""):
            raise RequestError(f"body: expected the content type {PROTOBUF}")
        work = read_pass(data)
        self._service.check_pass(work)
        name = work.model_id
        run = self._service.forward_backward
        return JSONResponse(self._numbered(work.seq_id, name, work, run, len(data)))

    async def _optim_step(self, body: Body) -> Any:
        model_id = self._model(body)
        work = model_id, Adam.read(body)
        return self._turn(body, model_id, work, self._service.optim_step)

    async def _save_weights(self, body: Body) -> Any:
        work = writing(body, self._model(body))
        return self._turn(body, work.model_id, work, self._service.save)

    async def _save_for_sampler(self, body: Body) -> Any:
        work = sampler_writing(body, self._model(body))
        return self._turn(body, work.model_id, work, self._service.save)

    # Samples.

    async def _create_sampling_session(self, body: Body) -> Any:
        session = body.text("session_id")
        self._service.sessions.hear(session)
        path = body.text("model_path") if body.has("model_path") else None
        if path is None:
            self._service.check_name(body.text("base_model"))
        number = body.whole("sampling_session_seq_id", least=0, most=1 << 62)
        name = f"{session}:sample:{number}"
        self._service.name_sampler(name, path)
        return {"type": "create_sampling_session", "sampling_session_id": name}

    async def _sampler(self, request: Request) -> Response:
        check_token(self._token, request.headers.get("x-api-key", ""))
        name = request.path_params["sampler_id"]
        path = self._service.sampler(name)
        answer = {"sampler_id": name, "base_model": self._service.name, "model_path": path}
        return JSONResponse(answer)

    async def _sample(self, body: Body) -> Any:
        if body.has("sampling_session_id"):
            session = body.text("sampling_session_id")
            path = self._service.sampler(session)
            request_id = f"{session}:{body.whole('seq_id', least=0, most=1 << 62)}"
        else:
            path = body.text("model_path") if body.has("model_path") else None
            if path is None:
                self._service.check_name(body.text("base_model"))
            request_id = f"sample-{secrets.token_hex(8)}"
        work = self._service.request(body, path)
        names = [f"{request_id}:{n}" for n in range(work.count)]
        mate = path, work.sampling
        answer = self._queued(request_id, work, self._service.sample, mate=mate)
        return answer | {"sample_sequence_ids": names}

    # Queue and results.

    def _turn(
        self,
        body: Body,
        model_id: str,
        work: Any,
        run: Callable[[Sequence[Any]], Sequence[Outcome]],
    ) -> dict[str, Any]:
        number = body.whole("seq_id", least=1, most=1 << 31)
        return self._numbered(number, model_id, work, run, 1024)

    def _numbered(
        self,
        number: int,
        model_id: str,
        work: Any,
        run: Callable[[Sequence[Any]], Sequence[Outcome]],
        size: int,
    ) -> dict[str, Any]:
        """Queue a model's request, each number once: a client that lost the answer asks again."""
        request_id = f"{model_id}:{number}"
        if number <= self._last.get(model_id, 0):
            return {"request_id": request_id, "model_id": model_id}
        answer = self._queued(request_id, work, run, model_id, size=size)
        self._last[model_id] = number
        return answer

    def _queued(
        self,
        request_id: str,
        work: Any,
        run: Callable[[Sequence[Any]], Sequence[Outcome]],
        model_id: str | None = None,
        *,
        size: int = 1024,
        mate: Any = None,
    ) -> dict[str, Any]:
        if not self._futures.knows(request_id):
            self._futures.submit(Job(request_id, work, run, size, mate))
        return {"request_id": request_id, "model_id": model_id}

    async def _retrieve(self, body: Body) -> Any:
        request_id = body.text("request_id")
        outcome = await self._futures.result(request_id)
        if outcome is None:
            later = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
            return JSONResponse(later, 408)
        return Response(outcome, media_type=PROTOBUF) if isinstance(outcome, bytes) else outcome


def _route(
    path: str, respond: Callable[[Request], Awaitable[Response]], method: str = "POST"
) -> Route:
    return Route(f"/api/v1/{path}", respond, methods=[method])


async def _refused(request: Request, error: Exception) -> Response:
    """The protocol's error."""
    assert isinstance(error, RequestError)
    return JSONResponse({"detail": str(error)}, error.status)


async def _left(request: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=400)
