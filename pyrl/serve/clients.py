"""Clients: sessions, which SDK releases this server knows, and who may speak to it."""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict

from pyrl.remote.releases import TESTED, tested
from pyrl.serve.body import RequestError

SESSIONS = 4096
"""Sessions at most; the one that was silent longest is forgotten for a new one."""
SILENCE = 120.0
"""Seconds without a heartbeat after which a session's models may be put away."""


def check_release(version: str) -> None:
    """RequestError unless the SDK is one that this server was tested with, or lies between."""
    if not tested(version):
        raise RequestError(
            f"sdk_version: expected a tinker SDK from {TESTED[0]} to {TESTED[1]}, which this "
            f"server was tested with, got {version}; pip install tinker=={TESTED[1]}"
        )


def check_token(expected: str, got: str) -> None:
    """RequestError unless the client has the server's token."""
    if not hmac.compare_digest(expected.encode(), got.encode()):
        raise RequestError(
            "X-API-Key: expected the token that pyrl serve was started with (TINKER_API_KEY)", 401
        )


class Sessions:
    """When each session was last heard of."""

    def __init__(self) -> None:
        self._heard: OrderedDict[str, float] = OrderedDict()

    def new(self) -> str:
        session = f"s-{secrets.token_hex(8)}"
        while len(self._heard) >= SESSIONS:
            self._heard.popitem(last=False)
        self._heard[session] = time.monotonic()
        return session

    def hear(self, session: str) -> None:
        """RequestError for a session that is not one of this server's."""
        if session not in self._heard:
            raise RequestError(
                f"session_id: expected a session of this server, got {session!r}; make a new "
                f"ServiceClient after the server was started anew",
                404,
            )
        self._heard[session] = time.monotonic()
        self._heard.move_to_end(session)

    def end(self, session: str) -> None:
        """Its client has said that it leaves."""
        self._heard.pop(session, None)

    def silent(self, session: str) -> bool:
        """Whether the client has left, as far as one can tell."""
        heard = self._heard.get(session)
        return heard is None or time.monotonic() - heard > SILENCE
