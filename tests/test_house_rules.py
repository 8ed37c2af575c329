"""The rules that keep the code readable, checked on every file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyrl.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES, FUNCTION_LINES = 500, 60
CODE = sorted(
    path
    for folder in ("pyrl", "csrc", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".sh")
)
PYTHON = [path for path in CODE if path.suffix == ".py"]
PACKAGE = [path for path in PYTHON if path.is_relative_to(ROOT / "pyrl")]
CORE = [path for path in CODE if path.is_relative_to(ROOT / "csrc")]

LOOSE = {
    "pyrl/run/parsing.py": "fields are found by name: that is what reading settings is",
    "pyrl/run/directory.py": "fields are found by name: that is what reading settings is",
}
"""Files that may read attributes by name."""

PASSED_ON = {
    "pyrl/learner/recompute.py _recomputed": "a layer is called as its model calls it",
    "pyrl/hosts/openrlhf.py _experience": "the host's method has these parameters",
    "pyrl/hosts/openrlhf.py _eval_samples": "the host's method has these parameters",
    "pyrl/hosts/openrlhf.py held": "the host's method has these parameters",
    "pyrl/hosts/verl_trees.py __init__": "a loop is made as its host makes it",
    "pyrl/hosts/verl_trees.py run": "a row of the host's data has columns of any name",
}
"""Functions that may pass options through, with the reason."""

MIRRORS = (
    "tree/forest",
    "tree/signals",
    "tree/advantage",
    "tree/pack",
    "tree/pack_tree",
    "logits/stats/token_stats",
    "logits/sample/sample_tokens",
    "loss/policy_loss",
    "loss/fused_loss",
)
"""csrc/FOLDER/STEM.{h,cpp} and the tests that prove it: tests/FOLDER/test_STEM*.py."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text("utf-8"), str(path)))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in nodes(path) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_files_that_the_rules_are_about_are_found() -> None:
    assert len(PACKAGE) > 30
    assert len(CORE) > 20
    assert set(LOOSE) <= {name(path) for path in CODE}


def test_files_fit_on_a_few_screens() -> None:
    lines = {name(path): len(path.read_text("utf-8").splitlines()) for path in CODE}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


def test_functions_fit_on_a_screen() -> None:
    long = {
        f"{name(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in PYTHON
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno >= FUNCTION_LINES
    }
    assert long == {}


def test_file_names_say_what_is_inside() -> None:
    empty = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [name(path) for path in CODE if empty & set(path.stem.split("_"))] == []


def test_only_bindings_know_python_and_nothing_knows_torch() -> None:
    wrong = re.compile(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)")
    for path in CORE:
        found = {match.group(1) for match in wrong.finditer(path.read_text("utf-8"))}
        allowed = {"pybind11"} if path.parent.name == "bindings" else set()
        assert found <= allowed, name(path)


@pytest.mark.parametrize(
    ("package", "file"),
    [("vllm", "pyrl/engine/vllm/release.py"), ("tinker", "pyrl/remote/service.py")],
)
def test_one_file_imports(package: str, file: str) -> None:
    importing = re.compile(rf"^\s*(import {package}|from {package})\b", re.M)
    found = {name(path) for path in PACKAGE if importing.search(path.read_text("utf-8"))}
    assert found == {file}


def test_no_exception_is_caught_without_its_kind() -> None:
    broad = [
        f"{name(path)}:{node.lineno}"
        for path in PYTHON
        for node in nodes(path)
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or {"Exception", "BaseException"}
            & {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        )
    ]
    assert broad == []


def test_attributes_have_no_fallbacks() -> None:
    loose = [
        f"{name(path)}:{node.lineno}"
        for path in PACKAGE
        for node in nodes(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 3
        and name(path) not in LOOSE
    ]
    assert loose == []


def test_options_are_named_and_not_passed_through() -> None:
    through = [
        f"{name(path)}:{node.lineno} {node.name}"
        for path in PACKAGE
        for node in functions(path)
        if node.args.kwarg is not None
        and f"{name(path)} {node.name}" not in PASSED_ON
        and any(
            isinstance(n, ast.keyword)
            and n.arg is None
            and isinstance(n.value, ast.Name)
            and n.value.id == node.args.kwarg.arg
            for n in ast.walk(node)
        )
    ]
    assert through == []


@pytest.mark.parametrize("root", ["work", "root", "home", "tmp", "Users"])
def test_no_path_of_a_machine_is_written_down(root: str) -> None:
    path_in_text = re.compile(rf"(?<![\w.~/{{}}\"'$-])/{root}/\w|[\"']/{root}/\w")
    texts = [*CODE, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *(ROOT / "docs").rglob("*.md")]
    assert [name(p) for p in texts if path_in_text.search(p.read_text("utf-8"))] == []


def test_every_method_names_its_source() -> None:
    for method, function in METHODS.items():
        said = function.__doc__ or ""
        module = ast.get_docstring(ast.parse(Path(function.__code__.co_filename).read_text())) or ""
        assert said, method
        assert re.search(r"arXiv:\d{4}\.\d{4,5}", said + module), method


def test_everything_public_says_what_it_is() -> None:
    silent = []
    for path in PACKAGE:
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree), f"{name(path)} has no docstring"
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and not ast.get_docstring(node):
                silent.append(f"{name(path)}:{node.lineno} {node.name}")
    assert silent == []


@pytest.mark.parametrize("part", MIRRORS)
def test_every_part_of_the_core_has_its_tests(part: str) -> None:
    wing, stem = part.split("/")[0], part.split("/")[-1]
    assert (ROOT / "csrc" / f"{part}.h").is_file()
    assert (ROOT / "csrc" / f"{part}.cpp").is_file()
    assert list((ROOT / "tests" / wing).glob(f"test_{stem}*.py"))
