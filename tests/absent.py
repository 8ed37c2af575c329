"""Stands in for what a host imports and its adapters never call, such as clusters and servers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


def remote(*classes: Any, **options: Any) -> Any:
    """`ray.remote` without a cluster: classes stay as they are."""
    return classes[0] if classes and not options else lambda decorated: decorated


GIVEN: dict[str, dict[str, Any]] = {"ray": {"remote": remote}}
"""What a stand-in has beside names that stand for anything."""


class StandIn(ModuleType):
    """A module of which every name is a mock, and every submodule a stand-in."""

    __path__: Sequence[str] = ()
    __version__ = "999"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = GIVEN.get(self.__name__, {}).get(name)
        value = type(name, (), {}) if value is None and name[0].isupper() else value
        value = MagicMock(name=f"{self.__name__}.{name}") if value is None else value
        setattr(self, name, value)
        return value


class Finder(MetaPathFinder, Loader):
    """Finds a stand-in for each module of the packages named."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        found = name.partition(".")[0] in self.packages
        return ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stand_ins(*packages: str) -> Iterator[None]:
    """While modules are imported, these packages are stand-ins; afterwards all is as before."""
    finder = Finder(packages)
    real = _taken(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _taken(packages)
        sys.modules.update(real)


def _taken(packages: Sequence[str]) -> dict[str, ModuleType]:
    """The modules of these packages, which are no longer among those that are imported."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}
