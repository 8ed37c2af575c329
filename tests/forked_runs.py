"""Runs in processes of their own, each forked off a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

PRELOAD = [
    "pyrl.train",
    "pyrl.methods",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rich.console",
    "peft",
]
"""What a run imports, so that a process for it starts in a moment."""


def fork_server(elsewhere: Path) -> Any:
    """The context that starts such processes.

    The server looks for modules in its working directory first: it starts away from the source
    tree, whose pyrl/ has no compiled part after an install from a wheel.
    """
    before, directory = os.environ.get("OMP_NUM_THREADS"), Path.cwd()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(elsewhere)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    first = context.Process(target=int)
    first.start()
    first.join()
    os.chdir(directory)
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context
