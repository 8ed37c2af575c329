"""Types of the C++ core, a module a folder of csrc/; csrc/bindings/ makes them."""

from typing import Any

from pyrl._core import logits as logits
from pyrl._core import loss as loss
from pyrl._core import tree as tree

class StaleHandleError(LookupError):
    """A branch handle that was pruned, or that this forest never gave out."""

def build_info() -> dict[str, Any]:
    """How this extension was compiled; `cuda` is None without kernels."""
