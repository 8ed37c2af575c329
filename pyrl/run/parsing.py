"""Parsing: the settings of a run from the command line, from YAML and from Python, and back."""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from tyro import MISSING
from tyro.conf import AvoidSubcommands, FlagConversionOff
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from pyrl.methods.fields import classes, has_stages, is_record, leaves, stages
from pyrl.methods.registry import Registry
from pyrl.run.config import Run
from pyrl.run.names import (
    ConfigError,
    Given,
    Names,
    check_owners,
    first_pass,
    flatten,
    make_choices,
    owned,
    take_names,
    take_plugins,
    without_replaced,
)

CHOICES = "choices"
"""Where a settings file has the class of each choice: PPO and CISPO can have the same numbers."""


def parse_train(argv: Sequence[str]) -> Run:
    """Settings from all that follows `pyrl train`: METHOD, unless the file names it, and options.

    ValueError: there is no such method, or what `parse_run` raises.
    """
    if argv[0].startswith("-"):
        argv = [method_of(argv), *argv]
    method, *options = argv
    given = first_pass(options)
    plugins = given.plugins
    if plugins is None and given.config is not None:
        plugins = take_plugins(_read(given.config), given.config)
    return parse_run(options, method, Registry(plugins or ()).method(method))


def parse_run(argv: Sequence[str], method: str, algorithm: object) -> Run:
    """Settings from the options of `pyrl train METHOD`; `algorithm` holds the method's defaults.

    Choices by name (`--loss gspo`) come first: they say which settings there are. Any nested frozen
    dataclass works: `--loss.kl.coef 0` sets algorithm.loss.kl.coef, and a stage of a tuple goes by
    its class: `--advantage.group-baseline.scale`. `--config FILE` reads YAML before the options,
    except for the settings of choices that the options replace by name. A wrong option exits with
    code 2 after naming the nearest right one; ConfigError: wrong file; ValueError: there is no such
    name, or an option belongs to another choice.
    """
    given = first_pass(argv)
    settings = _read(given.config) if given.config else {}
    run = _begin(method, algorithm, given, settings)
    check_owners(given.options, run.algorithm, Registry(run.plugin))
    return _parse(run, given.options)


def settings(method: str, /, **values: Any) -> Run:
    """A run's settings from Python, by the names that options and YAML have:

    settings("ettrl", model="demo", data="demo:train", loss="gspo", fork={"max_width": 3})

    `model` and `data` may be left to the objects that a Trainer is given. ConfigError names a
    setting that does not exist or cannot have its value; ValueError: there is no such name.
    """
    where, flat = Path("settings"), dict(flatten(values))
    registry = Registry(take_plugins(dict(flat), where))
    return _begin(method, registry.method(method), Given(where, None, {}, []), flat)


def _begin(method: str, algorithm: object, given: Given, settings: dict[str, Any]) -> Run:
    """The run before its options are read: with the choices by name, and the file's settings."""
    path = given.config or Path()
    named = settings.pop("method", method)
    if named != method:
        raise ConfigError(f"{path}: method: expected {method!r}, got {named!r}")
    of_file, plugins = take_names(settings, path), take_plugins(settings, path)
    names = of_file | given.names
    registry = Registry(plugins if given.plugins is None else given.plugins)
    run = Run(
        MISSING,
        MISSING,
        method,
        make_choices(algorithm, names, registry, path, of_file),
        Path("runs") / method,
        Names(**names),
        registry.plugins,
    )
    settings = without_replaced(settings, of_file, given.names)
    return _apply(run, settings, path, registry) if settings else run


def method_of(argv: Sequence[str]) -> str:
    """The method that the file of `--config` names; ConfigError: no such file, or it names none."""
    path = first_pass(argv).config
    if path is None:
        raise ConfigError(f"expected a method before the options of pyrl train, got {argv[0]!r}")
    method = _read(path).get("method")
    if not isinstance(method, str):
        raise ConfigError(f"{path}: expected the setting 'method', or a method before the options")
    return method


def settings_of(run: Run) -> dict[str, Any]:
    """All settings, nested as on the command line, names first, and the class of each choice."""
    nested: dict[str, Any] = {"method": run.method}
    nested |= {kind: {"name": name} for kind, name in run.names.chosen.items()}
    for name, value in _leaves(run):
        *groups, last = name.split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        target[last] = _plain(value)
    nested[CHOICES] = dict(classes(run.algorithm))
    return nested


def save_run(run: Run, path: Path) -> None:
    """Write all settings as YAML, whole or not at all; `load_run` gives an equal Run back."""
    part = path.with_name(path.name + ".part")
    # Escaped beyond ASCII: YAML folds raw line separators such as U+0085 into spaces.
    part.write_text(yaml.safe_dump(settings_of(run), sort_keys=False, allow_unicode=False), "utf-8")
    os.replace(part, path)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_plain, value))
    return str(value) if isinstance(value, Path) else value


def load_run(path: Path, methods: Mapping[str, Callable[[], object]] | None = None) -> Run:
    """Settings that `save_run` wrote; ConfigError names what is wrong with the file.

    `methods`: those that it may name; None: all that there are, the file's plugins included.
    """
    settings = _read(path)
    method: Any = settings.get("method")
    if methods is None:
        registry = Registry(take_plugins(dict(settings), path))
        methods = {entry.name: entry.make for entry in registry.entries("method")}
    if method not in methods:
        raise ConfigError(f"{path}: method: expected one of {', '.join(methods)}, got {method!r}")
    run = _begin(method, methods[method](), Given(path, None, {}, []), settings)
    if MISSING in (run.model, run.data):
        raise ConfigError(f"{path}: expected the settings 'model' and 'data'")
    return run


def _parse(run: Run, options: Sequence[str], *markers: Any) -> Run:
    about = (
        f"Train by {run.method}. --config FILE reads settings from YAML; options override it.\n"
        "`pyrl methods` lists the names of choices; --loss gspo --help has that loss's settings."
    )
    return tyro.cli(
        Run,
        prog=f"pyrl train {run.method}",
        description=about,
        args=options,
        default=run,
        registry=_registry(),
        config=(AvoidSubcommands, *markers),
    )


def _registry() -> ConstructorRegistry:
    """Rules that let a field be whatever dataclass its default is, also behind a Protocol."""
    registry = ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def narrow(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True
        spec = ConstructorRegistry.get_struct_spec(info)
        asking = False
        assert isinstance(spec, StructConstructorSpec)
        return replace(spec, fields=tuple(map(_narrowed, spec.fields)))

    @registry.struct_rule
    def tuples(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not has_stages(info.default):
            return None
        return StructConstructorSpec(
            instantiate=lambda **parts: tuple(parts.values()),
            fields=tuple(
                StructFieldSpec(name, type(stage), stage) for name, stage in stages(info.default)
            ),
        )

    return registry


def _narrowed(field: StructFieldSpec) -> StructFieldSpec:
    value = field.default
    if not (is_record(value) or has_stages(value)):
        return field
    metadata = getattr(field.type, "__metadata__", ())
    kind: Any = Annotated[(type(value), *metadata)] if metadata else type(value)
    return replace(field, type=kind)


def _leaves(run: Run) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all settings; the algorithm's stand beside the run's."""
    yield from leaves(run, without=("method", "algorithm", "names"))
    yield from leaves(run.algorithm)


def _read(path: Path) -> dict[str, Any]:
    """Dotted names and values of a YAML file."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, yaml.YAMLError) as error:  # a date such as 2020-99-99 is a ValueError
        raise ConfigError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings `name: value`, got {content!r}")
    return dict(flatten(content))


def _apply(run: Run, settings: Mapping[str, Any], path: Path, registry: Registry) -> Run:
    """The run with the settings of a file, read by the same parser as options."""
    current, own = dict(_leaves(run)), dict(classes(run.algorithm))
    options = []
    for name, value in settings.items():
        head, _, choice = name.partition(".")
        if head == CHOICES:
            if value != own.get(choice):
                kind = choice.partition(".")[0]
                whose = f"{kind} {vars(run.names)[kind]!r}" if kind in run.names.chosen else ""
                raise ConfigError(
                    f"{path}: {choice}: expected {own.get(choice)}, as the "
                    f"{whose or f'method {run.method!r}'} has it, got {value}"
                )
            continue
        if name not in current:
            if owners := owned(name, run.algorithm, registry):
                raise ConfigError(f"{path}: {name}{owners}")
            near = difflib.get_close_matches(name, current, n=1, cutoff=0)[0]
            raise ConfigError(f"{path}: there is no setting {name!r}; the nearest is {near!r}")
        if value in ([], None) and current[name] == ():
            continue  # choices that a method leaves out are no option
        if isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        elif value is not None or current[name] is not None:
            # A choice that a method leaves out (None) is no option, so it is not given back as one.
            options.append(f"--{name}={value}")
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            read = _parse(replace(run, model="", data=""), options, FlagConversionOff)
    except SystemExit as stop:
        raise ConfigError(f"{path}:\n{said.getvalue().rstrip()}") from stop
    return replace(read, **{n: MISSING for n in ("model", "data") if n not in settings})
