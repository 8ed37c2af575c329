"""Rooms: which folder may know which. An arrow that is not in a table is an error, and so is one
in a table that nobody needs any more."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYRL, CSRC = ROOT / "pyrl", ROOT / "csrc"

PYTHON = {
    # What is read everywhere.
    "checks": "",
    "forest": "",
    "texts": "",
    "leaves": "texts",
    "logits": "checks",
    "models": "",
    "attention": "",
    "pack": "",
    "sources": "",
    "foreign": "",  # calls of code that others wrote
    "ranks": "",  # the processes of one run
    # Questions become trees.
    "engine": "attention logits models ranks",
    "law": "",
    "fork": "checks law",
    "distilled": "checks fork",
    "prune": "checks",
    "answers": "engine leaves sources",
    "prompts": "answers foreign sources",
    "vote": "answers",
    "judger": "answers leaves vote",
    "poll": "answers leaves vote",
    "budget": "forest poll",
    "rollout": "budget engine forest fork law logits poll prune",
    # Trees become advantages, and these an update.
    "reward": "answers checks foreign vote",
    "select": "answers checks leaves",
    "advantage": "checks leaves",
    "baselines": "advantage checks leaves",
    "tempered": "checks pack",
    "replay": "checks leaves pack",
    "loss": "checks logits pack",
    "presets": "loss",
    "learner": "attention engine leaves logits loss models pack ranks",
    "algorithm": (
        "advantage answers budget fork leaves logits loss poll prune replay reward select tempered "
        "vote"
    ),
    "methods": (
        "advantage algorithm baselines checks distilled foreign fork judger leaves loss presets "
        "prune replay reward select tempered vote"
    ),
    "diagnostics": "advantage attention learner leaves pack",
    "remote": "engine learner logits loss models pack rollout",  # its model is on a server
    # A run: it is watched, set up, trained and called.
    "report": "answers budget engine forest leaves pack reward rollout texts vote",
    "evaluate": (
        "answers checks engine foreign fork leaves logits models prompts prune report rollout vote"
    ),
    "run": (
        "algorithm answers attention checks distilled engine evaluate foreign fork judger law "
        "learner leaves logits loss methods models pack prompts prune ranks remote report reward "
        "rollout sources vote"
    ),
    "train": (
        "advantage answers diagnostics engine evaluate fork leaves pack prompts prune "
        "ranks report reward rollout run select tempered vote"
    ),
    # Doors in other trainers.
    "hosts": (
        "advantage algorithm answers attention baselines checks engine forest fork "
        "learner leaves logits loss methods pack presets prompts prune report reward "
        "rollout run select train vote"
    ),
    "serve": "engine learner logits loss models pack remote run",
    "demo": "algorithm checks evaluate fork loss methods models prune reward run sources",
    "compare": "checks demo engine evaluate report reward run train",
    "completion": "",
    "doctor": "demo engine hosts models report train",
    "cli": (
        "answers checks compare completion demo doctor engine evaluate methods ranks report run "
        "serve train"
    ),
    "__init__": "",
    "__main__": "cli",
}
"""What the code of each room imports: a file at the top of pyrl/ is a room, and so is a folder.
Imports for types alone do not count. Each room stands below those that it imports."""

CORE = {
    "base": "",
    "tree": "base",
    "logits": "base",
    "logits/stats": "base logits",
    "logits/sample": "base logits",
    "loss": "base logits/stats",
    "bindings": "base logits/sample logits/stats loss tree",
}
"""What the files of each folder of csrc/ include."""

TOP_FILES = 28
"""Files at the top of pyrl/: the stations of the data path, and few others."""


def modules(path: Path) -> Iterator[str]:
    """Rooms whose code a Python file imports, its own among them."""
    tree = ast.parse(path.read_text("utf-8"), str(path))
    for_types = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("pyrl."))
        elif isinstance(node, ast.ImportFrom) and node.module == "pyrl":
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyrl."):
            yield str(node.module).split(".")[1]


def python_rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PYRL.rglob("*.py"):
        first = path.relative_to(PYRL).parts[0]
        room = first.removesuffix(".py")
        found.setdefault(room, set()).update(set(modules(path)) - {room, "_core"})
    return found


def core_rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in core_files():
        room = path.parent.relative_to(CSRC).as_posix()
        included = re.findall(r'#include "([^"]+)"', path.read_text("utf-8"))
        folders = {name.rpartition("/")[0] for name in included}
        found.setdefault(room, set()).update(folders - {room})
    return found


def core_files() -> list[Path]:
    return [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]


def arrows(table: Mapping[str, str]) -> dict[str, set[str]]:
    return {room: set(names.split()) for room, names in table.items()}


def test_python_rooms_know_whom_the_table_names() -> None:
    assert python_rooms() == arrows(PYTHON)


def test_folders_of_the_core_include_whom_the_table_names() -> None:
    assert core_rooms() == arrows(CORE)


@pytest.mark.parametrize("table", [PYTHON, CORE], ids=["pyrl", "csrc"])
def test_every_arrow_points_up_so_there_is_no_circle(table: dict[str, str]) -> None:
    seen: set[str] = set()
    for room, names in arrows(table).items():
        assert names <= seen, f"{room} stands above {sorted(names - seen)}"
        seen.add(room)


def test_a_namespace_is_a_folder() -> None:
    for path in core_files():
        folder = path.parent.relative_to(CSRC).parts
        own = "::".join(("pyrl", *folder)) if folder != ("base",) else "pyrl"
        named = re.findall(r"^namespace (pyrl[\w:]*) \{", path.read_text("utf-8"), re.M)
        # Tables of kernels that several folders read belong to the folder above.
        allowed = {own, own.rpartition("::")[0], f"{own}::device"}
        assert set(named) <= allowed, f"{path.relative_to(ROOT)}: {named}"


def test_the_top_of_the_package_is_the_data_path() -> None:
    files = [p.name for p in PYRL.iterdir() if p.is_file() and p.suffix != ".so"]
    assert len(files) <= TOP_FILES, sorted(files)
    assert [p.name for p in CSRC.iterdir() if p.is_file()] == []
