"""Registry: methods and choices by name, those of the package and those of others.

Others add theirs by an entry point of an installed package (group `pyrl.losses`, name, and what
gives the loss), or by a file of `--plugin` with a table of the group's name: `LOSSES = {...}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from sys import modules
from types import ModuleType
from typing import Any

from pyrl.advantage import Stage
from pyrl.algorithm import Algorithm
from pyrl.checks import described, one_of
from pyrl.foreign import TIME_LIMIT, Foreign
from pyrl.fork import Fork
from pyrl.loss import Loss
from pyrl.methods import METHODS
from pyrl.methods.choices import ADVANTAGES, FORKS, PRUNES, REWARDS, SELECTS, VOTES
from pyrl.methods.fields import fields, is_record
from pyrl.presets import PRESETS
from pyrl.prune import Prune
from pyrl.reward import Reward
from pyrl.select import Select
from pyrl.vote import Vote

Factory = Callable[[], Any]


@dataclass(frozen=True)
class Kind:
    """What a name can be the name of."""

    name: str
    """"method", or the field of an `Algorithm` that holds such a choice."""
    plural: str
    """Entry points are in the group pyrl.PLURAL; a plugin's table is PLURAL in capitals."""
    table: Mapping[str, Factory]
    """Those of the package."""
    contract: type
    """The class of such a choice, or the protocol whose methods it has."""

    @property
    def described(self) -> str:
        """With its article."""
        return f"an {self.name}" if self.name[0] in "aeiou" else f"a {self.name}"

    def usage(self, name: str) -> str:
        """How the command line chooses such a name."""
        return f"pyrl train {name if self.name == 'method' else f'METHOD --{self.name} {name}'}"


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("method", "methods", METHODS, Algorithm),
        Kind("loss", "losses", PRESETS, Loss),
        Kind("advantage", "advantages", ADVANTAGES, Stage),
        Kind("fork", "forks", FORKS, Fork),
        Kind("prune", "prunes", PRUNES, Prune),
        Kind("vote", "votes", VOTES, Vote),
        Kind("select", "selects", SELECTS, Select),
        Kind("reward", "rewards", REWARDS, Reward),
    )
}


@dataclass(frozen=True)
class Entry:
    """A name, and who gives it."""

    kind: Kind
    name: str
    origin: str
    """Empty for the package itself; else "the package foo" or "the plugin foo.py"."""
    source: Factory | EntryPoint

    def __str__(self) -> str:
        return f"the {self.kind.name} {self.name}" + (f" of {self.origin}" if self.origin else "")

    @cached_property
    def factory(self) -> Factory:
        """What gives the choice; a package of others is imported only here.

        ForeignError: the import failed.
        """
        if isinstance(self.source, EntryPoint):
            with Foreign(str(self), TIME_LIMIT, None):
                source: Factory = self.source.load()
                return source
        return self.source

    def make(self) -> Any:
        """The choice. ValueError: what others give is no such choice; ForeignError: it failed."""
        if not self.origin:
            return self.factory()
        if is_record(self.factory) or not callable(self.factory):
            raise ValueError(
                f"{self}: expected a class or a function without parameters, "
                f"got {described(self.factory)}"
            )
        with Foreign(str(self), TIME_LIMIT, None):
            choice = self.factory()
        parts = choice if self.kind.name == "advantage" and isinstance(choice, tuple) else [choice]
        for part in parts:
            self._check(part)
        return choice

    def _check(self, choice: Any) -> None:
        contract = self.kind.contract
        if contract in (Algorithm, Loss):
            if not isinstance(choice, contract):
                raise ValueError(
                    f"{self}: expected a function that returns a pyrl {contract.__name__}, "
                    f"which returned {described(choice)}"
                )
            return
        public = [name for name in vars(contract) if name == "__call__" or name[0] != "_"]
        missing = [name for name in public if not hasattr(choice, name)]
        if missing or not is_record(choice):
            raise ValueError(
                f"{self}: expected an instance of a dataclass with the methods of "
                f"{contract.__module__}.{contract.__name__} ({', '.join(public)}), "
                f"got {described(choice)}"
            )
        if "name" in dict(fields(choice)):
            raise ValueError(
                f"{self}: expected a field with another name than 'name', by which settings "
                f"choose {self.kind.described}"
            )


@dataclass(frozen=True)
class Registry:
    """All names: of the package, of installed packages, and of these files."""

    plugins: tuple[str, ...] = ()
    """Files of Python code with tables such as FORKS."""

    @cached_property
    def _all(self) -> dict[str, list[Entry]]:
        points = entry_points()
        plugins = {path: _tables(path) for path in map(Path, self.plugins)}
        found = {}
        for kind in KINDS.values():
            entries = [Entry(kind, name, "", factory) for name, factory in kind.table.items()]
            for point in points.select(group=f"pyrl.{kind.plural}"):
                package = point.dist.name if point.dist else point.module
                entries.append(Entry(kind, point.name, f"the package {package}", point))
            for path, tables in plugins.items():
                table = tables.get(kind.plural, {})
                if table is not kind.table:  # a plugin may import it
                    origin = f"the plugin {path}"
                    entries += [Entry(kind, name, origin, make) for name, make in table.items()]
            found[kind.name] = entries
        return found

    def entries(self, kind: str) -> list[Entry]:
        """All of a kind. ValueError or ForeignError: a plugin cannot be loaded."""
        return self._all[kind]

    def names(self, kind: str) -> list[str]:
        """All names of a kind."""
        return list(dict.fromkeys(entry.name for entry in self.entries(kind)))

    def find(self, kind: str, name: str) -> Entry:
        """The one of this name. ValueError tells the nearest, or of which kind the name is."""
        entries = self.entries(kind)
        found = [entry for entry in entries if entry.name == name]
        if len(found) > 1:
            origins = " and ".join(entry.origin or "pyrl" for entry in found)
            raise ValueError(
                f"{kind} {name!r}: expected a name that one {kind} has, it is a name of {origins}"
            )
        if not found:
            others = [other for other in KINDS.values() if name in self.names(other.name)]
            if others:
                are = " and ".join(other.described for other in others)
                how = " or ".join(f"`{other.usage(name)}`" for other in others)
                raise ValueError(f"{name} is {are}, not {KINDS[kind].described}: {how}")
            one_of(name, (entry.name for entry in entries), kind)
        return found[0]

    def make(self, kind: str, names: str) -> Any:
        """The choice of this name; of an advantage all stages of the names between commas."""
        if kind != "advantage":
            return self.find(kind, names).make()
        stages: list[Any] = []
        for name in names.split(","):
            made = self.find(kind, name.strip()).make()
            stages += made if isinstance(made, tuple) else [made]
        return tuple(stages)

    def method(self, name: str) -> Algorithm:
        """The method of this name."""
        algorithm: Algorithm = self.find("method", name).make()
        return algorithm

    def choose(self, algorithm: Any, names: Mapping[str, str | None]) -> Any:
        """The algorithm with the choices of these names in the place of its own."""
        made = {kind: self.make(kind, name) for kind, name in names.items() if name is not None}
        return replace(algorithm, **made)


def choose(algorithm: Algorithm, **names: str) -> Algorithm:
    """The algorithm with choices by name: choose(ttrl(), loss="gspo", advantage="grpo,ear").

    ValueError names the nearest name, or the kind that a wrong name is of.
    """
    for kind in names:
        one_of(kind, (name for name in KINDS if name != "method"), "choice of a method")
    chosen: Algorithm = Registry().choose(algorithm, names)
    return chosen


def _tables(path: Path) -> dict[str, Mapping[str, Factory]]:
    """The tables of a plugin by kinds in the plural."""
    if not path.is_file():
        raise ValueError(f"plugin {path}: there is no such file")
    file = path.resolve()
    with Foreign(f"plugin {path}", TIME_LIMIT, str(file)):
        tables = _loaded(file)
    names = [kind.plural for kind in KINDS.values()]
    found = {name: tables[name.upper()] for name in names if name.upper() in tables}
    if not found:
        raise ValueError(
            f"plugin {path}: expected at least one of the tables "
            f"{', '.join(name.upper() for name in names)}, it has none"
        )
    for name, table in found.items():
        if not isinstance(table, Mapping):
            raise ValueError(
                f"plugin {path}: {name.upper()}: expected a dictionary from names to functions "
                f"or classes, got {described(table)}"
            )
    return found


@cache
def _loaded(file: Path) -> Mapping[str, Any]:
    """What a file defines. It runs once in a process, so that its classes are the same ones."""
    module = ModuleType(f"plugin.{file.stem}")
    module.__file__ = str(file)
    modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(file.read_text("utf-8"), file, "exec"), vars(module))
    return vars(module)
