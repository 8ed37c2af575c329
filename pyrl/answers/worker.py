"""The process behind `VerifierPool`: runs one function call after the other, within its limits.

Run by path, so that it loads neither pyrl nor torch nor the parent's script:
`python -P worker.py DESCRIPTOR SOURCE MEMORY_BYTES CPU_SECONDS`. Messages are JSON: the answers of
a model are data for this process, and its replies are data for the parent.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
from multiprocessing.connection import Connection
from types import TracebackType


def _limit_cpu(seconds: int) -> None:
    """Stop this process even if the parent, which keeps the wall-clock limit, was killed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(
        resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, hard)
    )


def _serve(connection: Connection, source: str, cpu_seconds: int) -> None:
    functions = runpy.run_path(source)
    connection.send_bytes(b"{}")
    while True:
        try:
            name, *arguments = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        _limit_cpu(cpu_seconds)
        value = functions[name](*arguments)
        connection.send_bytes(json.dumps({"value": value}).encode())


def main(descriptor: str, source: str, memory_bytes: str, cpu_seconds: str) -> None:
    """Answer the calls that come through the descriptor, within the limits, until it closes."""
    connection = Connection(int(descriptor))

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """A verifier that raises ends its process: the parent learns why and starts a fresh one."""
        connection.send_bytes(json.dumps({"error": f"{kind.__name__}: {error}"[:500]}).encode())

    sys.excepthook = report
    limit = int(memory_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(connection, source, int(cpu_seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
