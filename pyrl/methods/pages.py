"""Pages: methods and choices as a person reads them, in a terminal and in docs/methods.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pyrl.methods.about import About, known
from pyrl.methods.registry import KINDS, Kind, Registry

HEAD = """# Methods and choices

A method is its parent with some choices replaced (`pyrl train METHOD`), and any of its choices can
be replaced by name: `pyrl train ttrl --loss gspo --advantage grpo,ear`. What begins with a dash is
derived from what stands above it; the last column is how. `pyrl methods` prints these tables, and
`pyrl methods show NAME` one row with its options and what it needs.

Written by `python tests/tabulate_methods.py`.
"""


@dataclass(frozen=True)
class Lookup:
    """Methods and choices by name, with their papers."""

    show: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[show NAME]")
    ] = ()
    """Nothing for the list; "show NAME" for what one is, what it needs, and its options."""
    plugin: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Files of Python code with further methods and choices."""

    def __post_init__(self) -> None:
        if self.show and (len(self.show) == 1 or self.show[0] != "show"):
            raise ValueError(f"expected nothing or show NAME, got {' '.join(self.show)}")


def listing(registry: Registry) -> Group:
    """All names by kind and family, with their papers, a line each."""
    tables: list[RenderableType] = []
    for kind in KINDS:
        table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
        table.title = f"{KINDS[kind].plural}: {KINDS[kind].usage('NAME')}"
        for column, wide in (("name", True), ("arXiv", True), ("from", True), ("", False)):
            table.add_column(column, no_wrap=wide, header_style="dim")
        depth = {"": -1}
        for entry, found, error in known(registry, kind):
            origin = f" ({entry.origin})" if entry.origin else ""
            if found is None:
                table.add_row(entry.name, "", "", escape(error), style="red")
            else:
                depth[entry.name] = depth[found.parent] + 1
                name = "  " * depth[entry.name] + entry.name
                cells = (name, found.paper, found.parent, found.first + origin)
                table.add_row(*map(escape, cells))
        tables.append(Padding(table, (0, 0, 1, 0)))
    return Group(*tables)


def page(found: About) -> Group:
    """One method or choice: what it is, how it differs, what it needs, its options."""
    entry = found.entry
    title = Text.assemble((entry.name, "bold"), f", {entry.kind.described}")
    if entry.origin:
        title.append(f" of {entry.origin}")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    facts.add_row("choose by", escape(entry.kind.usage(entry.name)))
    if found.paper:
        facts.add_row("paper", f"arXiv:{found.paper}")
    if found.parent:
        facts.add_row("from", found.parent)
    for place, phrase in enumerate(found.needs):
        facts.add_row("" if place else "needs", escape(phrase))
    parts: list[RenderableType] = [title, Text(found.text), Padding(facts, (1, 0, 0, 0))]
    if found.changes:
        parts.append(_table(("differs in", found.parent, entry.name), found.changes))
    if found.options:
        parts.append(_table(("option", "default", ""), found.options))
    return Group(*parts, "")


def markdown(registry: Registry) -> str:
    """The page of all names of the package."""
    lines = [HEAD]
    for kind in KINDS.values():
        lines.append(f"\n## {kind.plural.capitalize()}\n\n`{kind.usage('NAME')}`\n\n")
        lines.append(
            "| name | paper | what it is | differs from its parent in |\n|---|---|---|---|\n"
        )
        lines += _rows(registry, kind)
    return "".join(lines)


def _rows(registry: Registry, kind: Kind) -> Iterator[str]:
    depth = {"": -1}
    for entry, found, _ in known(registry, kind.name):
        if found is None or entry.origin:
            continue
        depth[entry.name] = depth[found.parent] + 1
        paper = f"[{found.paper}](https://arxiv.org/abs/{found.paper})" if found.paper else ""
        changed = ", ".join(f"`{name}`: {old} → {new}" for name, old, new in found.changes)
        name = f"{'– ' * depth[entry.name]}`{entry.name}`"
        cells = (name, paper, found.first, changed)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _table(head: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> Padding:
    table = Table(box=None, pad_edge=False)
    for name in head:
        table.add_column(name, header_style="dim")
    for row in rows:
        table.add_row(*map(escape, row))
    return Padding(table, (1, 0, 0, 0))
