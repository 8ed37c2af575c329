"""Write pyrl/completion/words.json: the words of every command, for completion in shells.

python tests/tabulate_words.py
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pyrl.answers import EQUIVALENCES
from pyrl.cli import COMMANDS
from pyrl.compare.settings import Settings
from pyrl.completion import FOLDER, Words
from pyrl.demo.run import METHODS as DEMO_METHODS
from pyrl.engine.launch import ENGINES
from pyrl.methods import METHODS
from pyrl.methods.fields import has_stages, stages, with_owners
from pyrl.methods.registry import KINDS
from pyrl.run.plan import Room

BARE = ("doctor",)
"""Commands that take no options but --help."""
BESIDE = {"plan": Room(), "compare": Settings()}
"""What commands take beside methods and the options of `train`."""


def options_of(command: str, *words: str) -> list[dict[str, Any]]:
    """The options of a command line, of `train` after its method, as tyro tells them to shells."""
    method, names = (words[:1], words[1:]) if command == "train" else ((), words)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(io.StringIO()):
            COMMANDS[command]([*method, "--tyro-write-completion", "bash", "-", *names])
    except SystemExit:
        pass
    found = re.search(r"^COMPLETION_SPEC = (.*)$", said.getvalue(), re.M)
    assert found, f"tyro writes its completion in another form: {said.getvalue()[:200]}"
    options: list[dict[str, Any]] = ast.literal_eval(found[1])["options"]
    return options


def flags(options: Iterable[dict[str, Any]]) -> list[str]:
    """Long names."""
    return [flag for option in options for flag in option["flags"] if flag.startswith("--")]


def line(words: Iterable[str]) -> str:
    """Each word once."""
    return " ".join(dict.fromkeys(words))


def settings(record: Any, prefix: str) -> Iterator[tuple[str, list[str] | None]]:
    """The options of a choice, an advantage or a whole method, and the names that each may be; None
    for an option without a value. Fields that are None or () may be choices that are left out."""
    if has_stages(record):
        for name, stage in stages(record):
            yield from settings(stage, f"{prefix}{name}.")
        return
    for name, value, owner in with_owners(record, prefix):
        hint = get_type_hints(owner)[name.rpartition(".")[2]]
        kinds = [hint, *get_args(hint)]
        names = [x for kind in kinds if get_origin(kind) is Literal for x in get_args(kind)]
        if value in (None, ()) and not names and not {int, float, str, Path} & set(kinds):
            continue
        group, _, last = name.replace("_", "-").rpartition(".")
        start = f"--{group}." if group else "--"
        if isinstance(value, bool):
            yield from ((start + last, None), (f"{start}no-{last}", None))
        else:
            yield start + last, [str(x) for x in names]


@cache
def tabulate() -> Words:
    """All words of the package; those of other installed packages are not among them."""
    package = {kind: [*of.table] for kind, of in KINDS.items()}
    plain = {c: options_of(c) for c in COMMANDS if c not in ("train", *BARE, *BESIDE)}
    beside = {command: dict(settings(record, "")) for command, record in BESIDE.items()}
    train = options_of("train", "ttrl")
    methods = {name: dict(settings(make(), "")) for name, make in METHODS.items()}
    choices = {
        f"{kind} {name}": dict(settings(of.table[name](), f"{kind}."))
        for kind, of in KINDS.items()
        if kind != "method"
        for name in of.table
    }
    common = [flag for flag in flags(train) if flag not in methods["ttrl"]]
    told = [o for options in (*plain.values(), train) for o in options]
    # Sorted, because tyro keeps some of them in sets.
    values = {flag: sorted(o["choices"]) for o in told if "choices" in o for flag in flags([o])}
    values |= {"--engine": [*ENGINES], "--equivalence": [*EQUIVALENCES]}
    bare = flags(o for o in told if o["type"] in ("flag", "boolean"))
    for options in (*methods.values(), *choices.values(), *beside.values()):
        values |= {flag: names for flag, names in options.items() if names}
        bare += [flag for flag, names in options.items() if names is None]
    return Words(
        options={command: line(flags(options)) for command, options in plain.items()}
        | {command: line(options) for command, options in beside.items()}
        | dict.fromkeys(BARE, "--help")
        | {"train": line(common)},
        methods={method: line(options) for method, options in methods.items()},
        choices={choice: line(options) for choice, options in choices.items()},
        names={kind: line(names) for kind, names in package.items()} | {"demo": line(DEMO_METHODS)},
        plurals={kind: of.plural for kind, of in KINDS.items() if kind != "method"},
        values={flag: line(names) for flag, names in values.items()},
        flags=line(bare),
    )


def text() -> str:
    """The file: a line for each entry, so that a change of one option is read at a glance."""
    return json.dumps(asdict(tabulate()), indent=1) + "\n"


if __name__ == "__main__":
    (FOLDER / "words.json").write_text(text(), "utf-8")
