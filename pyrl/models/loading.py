"""Loading: what is said of a model that cannot be loaded, and what is not said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as transformers_logging

UNLOADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    UnpicklingError,
    ValueError,
)
"""What libraries raise for a configuration, weights or a tokenizer that makes no sense."""


class ModelError(ValueError):
    """A model that cannot be loaded; the message says what is missing."""


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Switch off transformers' progress bars, not its warnings."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
