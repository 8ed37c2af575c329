"""Releases: those of the Tinker SDK that pyrl is tested with, as a client and as a server."""

from __future__ import annotations

import re

TESTED = ("0.25.0", "0.38.0")
"""The oldest and the newest."""


def tested(version: str) -> bool:
    """Whether a release of the SDK is one that pyrl is tested with, or lies between."""
    low, high = (_numbers(release) for release in TESTED)
    found = _numbers(version)
    return bool(found and low and high and low <= found <= high)


def _numbers(version: str) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match and tuple(map(int, match.groups()))
