"""Options: how a run asks a server of the Tinker protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteOptions:
    """How the server is asked; read with --tinker."""

    chunk: int | None = None
    """Tokens of a branch that are asked for at a time; those after a fork or the end of a branch
    that the run itself ends are waste. None: 16 where branches fork or are pruned while they grow,
    otherwise whole responses."""
    top: int = 20
    """Most probable tokens whose log-probs are told with each token: entropy and confidence come
    from them."""
    timeout: float = 600.0
    """Seconds without an answer after which a request has failed."""

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("top", 5)):
            value = vars(self)[name]
            if value is not None and value < least:
                raise ValueError(f"remote.{name}: expected at least {least}, got {value}")
        if not self.timeout > 0:
            raise ValueError(f"remote.timeout: expected > 0, got {self.timeout}")
