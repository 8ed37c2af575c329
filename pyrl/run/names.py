"""Names: choices that a run makes by name, on the command line and in a settings file."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pyrl.methods.fields import is_record, leaves, stages
from pyrl.methods.registry import Registry


class ConfigError(ValueError):
    """A settings file that cannot be used; the message names the file and the setting."""


def _default(value: str) -> str:
    return "(default: the method's own)" if value == "None" else f"(default: {value})"


Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_default)]

Plugins = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")]


@dataclass(frozen=True)
class Names:
    """Choices by name, in the place of the method's own; `pyrl methods` lists the names."""

    loss: Name = None
    """The policy loss, such as gspo."""
    advantage: Name = None
    """Stages of the advantage; several in their order with commas, such as grpo,ear."""
    fork: Name = None
    """Where trees fork, such as top_entropy; flat: nowhere."""
    prune: Name = None
    """Which branches stop early, such as doubt; keep: none."""
    vote: Name = None
    """How the label is elected, such as inverse_width."""
    select: Name = None
    """Which leaves train, such as stratified."""
    reward: Name = None
    """What a leaf earns: vote, true, random, or one of a plugin."""

    @property
    def chosen(self) -> dict[str, str]:
        """The names that there are."""
        return {kind: name for kind, name in vars(self).items() if name is not None}


KEYS = tuple(field.name for field in dataclasses.fields(Names))
"""The kinds of choices."""


@dataclass(frozen=True)
class Given:
    """What the other options depend on: it is read from the command line before them."""

    config: Path | None
    """The file of --config."""
    plugins: tuple[str, ...] | None
    names: dict[str, str]
    options: list[str]
    """All options but --config."""


def first_pass(argv: Sequence[str]) -> Given:
    """Look for --config, --plugin and names among the options; the last of each counts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    config, options = parser.parse_known_args(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", nargs="*")
    for kind in KEYS:
        parser.add_argument(f"--{kind}", nargs="?")  # without a value the next parser complains
    known = vars(parser.parse_known_args(options)[0])
    plugins = known.pop("plugin")
    names = {kind: name for kind, name in known.items() if name is not None}
    return Given(config.config, None if plugins is None else tuple(plugins), names, options)


def take_names(settings: dict[str, Any], path: Path) -> dict[str, str]:
    """Take the names out of the settings of a file: `loss: gspo`, or `loss: {name: gspo, ...}`."""
    names = {}
    for kind in KEYS:
        keys = [key for key in (kind, f"{kind}.name") if key in settings]
        values = [settings.pop(key) for key in keys]
        if len(values) > 1:
            both = " and ".join(map(repr, values))
            raise ConfigError(f"{path}: {kind}: expected one name, got {both}")
        if not values or values[0] is None:
            continue
        name = values[0]
        if kind == "advantage" and isinstance(name, list):
            name = ",".join(map(str, name))
        if name is True:  # YAML's own reading of the word
            name = "true"
        if not isinstance(name, str):
            raise ConfigError(f"{path}: {kind}: expected the name of a choice, got {name!r}")
        names[kind] = name
    return names


def take_plugins(settings: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Take the plugins out of the settings of a file: one, or a list."""
    value = settings.pop("plugin", ())
    files = [value] if isinstance(value, str) else value
    if not (isinstance(files, list | tuple) and all(isinstance(file, str) for file in files)):
        raise ConfigError(f"{path}: plugin: expected a file or a list of files, got {value!r}")
    return tuple(files)


def without_replaced(
    settings: Mapping[str, Any], before: Mapping[str, str], names: Mapping[str, str]
) -> dict[str, Any]:
    """The settings of a file without those of choices that the command line replaces."""
    replaced = [kind for kind, name in names.items() if before.get(kind) != name]
    gone = tuple(f"{prefix}{kind}" for kind in replaced for prefix in ("", "choices."))
    return {
        key: value
        for key, value in settings.items()
        if not any(key == kind or key.startswith(f"{kind}.") for kind in gone)
    }


def check_owners(options: Sequence[str], algorithm: Any, registry: Registry) -> None:
    """ValueError names the choice that an option belongs to, if it is not the algorithm's own."""
    known = dict(leaves(algorithm))
    for option in options:
        if not option.startswith("--"):
            continue
        name = option[2:].partition("=")[0].replace("-", "_").replace(".no_", ".")
        kind = name.partition(".")[0]
        if kind in KEYS and "." in name and name not in known:
            said = owned(name, algorithm, registry)
            if said:
                raise ValueError(f"{option.partition('=')[0]}{said}")


def owned(setting: str, algorithm: Any, registry: Registry) -> str:
    """Of which choices this is a setting, and which one the run has; empty for none."""
    kind = setting.partition(".")[0]
    if kind not in KEYS:
        return ""
    # An installed package is not imported for a guess.
    entries = [e for e in registry.entries(kind) if not e.origin.startswith("the package")]
    owners = [e.name for e in entries if setting in _settings(kind, e.make())]
    if not owners:
        return ""
    return (
        f" is a setting of the {kind} {', '.join(owners)}, which --{kind} NAME chooses; "
        f"this run has {_own(setting, algorithm)}"
    )


def _own(setting: str, algorithm: Any) -> str:
    """What the algorithm has in the place of the choice with this setting."""
    place = algorithm
    for name in setting.split(".")[:-1]:
        if is_record(place) and name in vars(place):
            place = vars(place)[name]
    parts = place if isinstance(place, tuple) else (place,)
    return ", ".join(type(part).__name__ for part in parts if part is not None) or "none"


def _settings(kind: str, choice: Any) -> Iterator[str]:
    parts = stages(choice) if isinstance(choice, tuple) else [("", choice)]
    if kind == "advantage" and not isinstance(choice, tuple):
        parts = stages((choice,))
    for part, record in parts:
        yield from (name for name, _ in leaves(record, f"{kind}.{part}." if part else f"{kind}."))


def make_choices(
    algorithm: Any,
    names: Mapping[str, str],
    registry: Registry,
    path: Path | None = None,
    of_file: Mapping[str, str] | None = None,
) -> Any:
    """The algorithm with choices by name; the message about a wrong one names its file."""
    for kind, name in names.items():
        try:
            algorithm = registry.choose(algorithm, {kind: name})
        except ValueError as error:
            if of_file and of_file.get(kind) == name:
                raise ConfigError(f"{path}: {kind}: {error}") from error
            raise
    return algorithm


def flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested settings."""
    for key, value in content.items():
        name = f"{prefix}{key}".replace("-", "_")
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value
