"""Server: the application on a socket of this machine, until it is told to stop."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress

import uvicorn

from pyrl.models import find_device, load_model
from pyrl.run.lock import Lock
from pyrl.serve.application import Application
from pyrl.serve.service import Service
from pyrl.serve.settings import ServeSettings

GRACE = 5
"""Seconds that open requests have when the server is told to stop."""


def serve(settings: ServeSettings) -> None:
    """Serve until Ctrl-C or SIGTERM; models that have changed since they were saved are saved.

    OSError for an address that is in use; ModelError for a model that cannot be served.
    """
    with Lock(settings.output), _socket(settings) as listening:
        model, tokenizer = load_model(settings.model, dtype=settings.dtype)
        model.to(find_device(settings.device))
        token = settings.token or f"tml-{secrets.token_urlsafe(24)}"
        application = Application(Service(settings, model, tokenizer), token).starlette()
        host, port = listening.getsockname()[:2]
        print(f"serving  {settings.model}", flush=True)
        print(f"export TINKER_BASE_URL=http://{host}:{port} TINKER_API_KEY={token}", flush=True)
        config = uvicorn.Config(
            application, log_level="warning", timeout_graceful_shutdown=GRACE, ws="none"
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _socket(settings: ServeSettings) -> socket.socket:
    """Bound before the model is loaded: an address that is in use is known at once."""
    try:
        return socket.create_server((settings.host, settings.port), backlog=1024)
    except OSError as error:
        raise OSError(
            f"{settings.host}:{settings.port}: expected an address of this machine that is free "
            f"(--host, --port): {error}"
        ) from error
