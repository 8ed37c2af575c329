"""Versions: which releases of a host its adapter works with, said in one sentence."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

logger = logging.getLogger(__name__)

RELEASES = {"trl": ("1.14", "1.17"), "verl": ("0.9", "0.10"), "openrlhf": ("0.10.4", "0.12")}
"""The first release of each host that an adapter works with, and the first one after them."""


def require(package: str) -> None:
    """ImportError unless a release of the host is installed that its adapter works with.

    The sentence is logged as well: a host that loads plugins may hide what they raise.
    """
    least, below = RELEASES[package]
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    if found == "none" or not Version(least) <= Version(found) < Version(below):
        message = (
            f"pyrl.hosts.{package}: expected {package} >={least},<{below} to be installed, got "
            f"{found} (pip install '{package}>={least},<{below}')"
        )
        logger.error(message)
        raise ImportError(message, name=package)
