"""Names from outside of the package: entry points of installed packages, and files of --plugin."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_run import make_trainer, stepped, tiny, tiny_run

from pyrl import cli
from pyrl.methods.registry import KINDS, Registry
from pyrl.methods.ttrl import ttrl
from pyrl.run.config import Run
from pyrl.run.parsing import load_run, parse_train, save_run

NEEDED = ["--model", "M", "--data", "D"]

PARTS = '''
from dataclasses import dataclass, replace

from pyrl.methods.ttrl import ttrl
from pyrl.presets import dapo


@dataclass(frozen=True)
class Halved:
    """A / by (arXiv:2601.00001). It halves."""

    by: float = 2.0
    needs = ("advantage_T",)

    def __call__(self, scored, advantage_T):
        return advantage_T / self.by

    def metrics(self, scored, advantage_T):
        return {"advantage/halved": float((advantage_T != 0).mean())}


def outer_loss():
    """DAPO with a wider bound."""
    parent = dapo()
    return replace(parent, bounds=replace(parent.bounds, high=0.5))


def outer():
    """TTRL with half of its advantages and another loss (arXiv:2601.00002)."""
    parent = ttrl()
    return replace(parent, advantage=(*parent.advantage, Halved()), loss=outer_loss())
'''

TABLES = """
METHODS = {"outer": outer}
LOSSES = {"outer_loss": outer_loss}
ADVANTAGES = {"halved": Halved}
"""

POINTS = """
[pyrl.methods]
outer = outside:outer
[pyrl.losses]
outer_loss = outside:outer_loss
[pyrl.advantages]
halved = outside:Halved
"""


def install(folder: Path, points: str, module: str, code: str, name: str = "outside") -> None:
    """A package as an installer leaves it: a module, and what says that it is there."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture(params=["entry points", "plugin"])
def outside(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The same parts in an installed package and in a file; options that make them known."""
    if request.param == "plugin":
        (tmp_path / "mine.py").write_text(PARTS + TABLES)
        return ["--plugin", str(tmp_path / "mine.py")]
    install(tmp_path, POINTS, "outside", PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside", raising=False)
    return []


def test_a_method_a_loss_and_a_stage_of_others_are_chosen_and_come_back(
    outside: list[str], tmp_path: Path
) -> None:
    run = parse_train(["outer", *NEEDED, *outside, "--advantage.halved.by", "4"])
    stage = run.algorithm.advantage[-1]
    assert (type(stage).__qualname__, stage.by) == ("Halved", 4)
    assert run.algorithm.loss.bounds.high == 0.5
    parent = replace(ttrl(), loss=run.algorithm.loss, advantage=run.algorithm.advantage)
    names = ["--loss", "outer_loss", "--advantage", "grpo,halved", "--advantage.halved.by", "4"]
    named = parse_train(["ttrl", *NEEDED, *outside, *names])
    assert named.algorithm == parent == run.algorithm
    for saved in (run, named):
        path = tmp_path / "run.yaml"
        save_run(saved, path)
        assert load_run(path) == saved == parse_train(["--config", str(path)])
        content = yaml.safe_load(path.read_text())
        assert content["plugin"] == outside[1:]
        whose = "plugin.mine.Halved" if outside else "outside.Halved"
        assert content["choices"]["advantage.halved"] == whose


def test_they_train_two_steps(outside: list[str], tmp_path: Path) -> None:
    method = parse_train(["outer", *NEEDED, *outside]).algorithm
    trainer = make_trainer(tiny_run(tmp_path, tiny(method, votes=4, updates=2)))
    assert [0 < stepped(trainer)["advantage/halved"] < 1 for _ in range(2)] == [True, True]


def test_they_are_listed_with_their_source_parent_and_origin(
    outside: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    listed = " ".join(said(["methods", *outside], capsys).split())
    assert listed.count("(the plugin" if outside else "(the package outside)") == 3
    shown = said(["methods", "show", "outer", "halved", *outside], capsys)
    for line in (
        r"outer, a method of the (package outside|plugin\s+\S*mine\.py)",
        r"paper +arXiv:2601\.00002",
        r"from +ttrl",
        r"loss\.bounds\.high +0\.2 +0\.5",
        r"halved, an advantage of the",
        r"needs +a stage before it that reads rewards, such as grpo",
        r"--advantage\.halved\.by +2\.0",
    ):
        assert re.search(rf"^{line}", shown, re.M), line


def said(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    printed = capsys.readouterr()
    assert stop.value.code == code, printed.err
    return printed.out + printed.err


PLUGINS = {
    "def broken(:\n": "raised SyntaxError: invalid syntax (FILE, line 1)",
    "x = 1\ny = x / 0\n": "raised ZeroDivisionError in line 2: division by zero",
    "import no_such_module\n": "ModuleNotFoundError in line 1: No module named 'no_such_module'",
    "LOSS = {}\n": "expected at least one of the tables METHODS, LOSSES, ADVANTAGES, FORKS, PRU",
    "LOSSES = []\n": "LOSSES: expected a dictionary from names to functions or classes, got list",
    'LOSSES = {"gspo": dict}\n': "loss 'gspo': expected a name that one loss has, it is a name of "
    "pyrl and the plugin FILE",
    'LOSSES = {"own": dict}\n': "the loss own of the plugin FILE: expected a function that returns "
    "a pyrl Loss, which returned dict {}",
    'LOSSES = {"own": 3}\n': "expected a class or a function without parameters, got int 3",
    'LOSSES = {"own": lambda: 1 / 0}\n': "raised ZeroDivisionError in line 1 of FILE: division by",
    'from pyrl.vote import Majority\nFORKS = {"own": Majority}\n': "the fork own of the plugin "
    "FILE: expected an instance of a dataclass with the methods of pyrl.fork.Fork (trunks, cap, ",
    "from dataclasses import dataclass\nfrom pyrl.fork import Flat\n@dataclass(frozen=True)\n"
    'class Own(Flat):\n    name: str = ""\nFORKS = {"own": Own}\n': "expected a field with another "
    "name than 'name'",
    "from dataclasses import dataclass\nfrom pyrl.advantage import WhitenTokens\n"
    "@dataclass(frozen=True)\nclass Own(WhitenTokens):\n    needs = ('length_T',)\n"
    'ADVANTAGES = {"own": Own}\n': "advantage: Own needs length_T, expected among what a run has: ",
}  # fmt: skip


@pytest.mark.parametrize(("code", "says"), PLUGINS.items())
def test_a_wrong_plugin_is_one_sentence(
    code: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.py"
    path.write_text(code)
    kind = next((k for k in KINDS.values() if k.plural.upper() in code), KINDS["loss"])
    name = "gspo" if "gspo" in code else "own"
    argv = ["train", "ttrl", *NEEDED, "--plugin", str(path), f"--{kind.name}", name]
    printed = said(argv, capsys, code=2)
    assert says.replace("FILE", str(path)) in printed.replace("(own.py", f"({path}")
    assert len(printed.splitlines()) == 1


def test_a_plugin_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "ttrl", *NEEDED, "--plugin", "none.py"]
    assert said(argv, capsys, code=2) == "pyrl: plugin none.py: there is no such file\n"


def test_a_package_that_fails_is_named_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = "[pyrl.losses]\nbroken = breaks:loss\ngspo = breaks:gspo\n"
    install(tmp_path, points, "breaks", "\nraise RuntimeError('no licence')\n", "breaks")
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_train(["ttrl", *NEEDED, "--loss", "dapo"]).algorithm.loss.bounds.high == 0.28
    line = f"in line 2 of {tmp_path / 'breaks.py'}: no licence"
    error = f"the loss broken of the package breaks raised RuntimeError {line}"
    assert error in said(["train", "ttrl", *NEEDED, "--loss", "broken"], capsys, code=2)
    assert error[:70] in " ".join(said(["methods"], capsys).split())
    both = "loss 'gspo': expected a name that one loss has, it is a name of pyrl and the package br"
    assert both in said(["train", "ttrl", *NEEDED, "--loss", "gspo"], capsys, code=2)


def test_a_plugin_may_import_the_tables_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from pyrl.methods import METHODS\nLOSSES = {'own': lambda: METHODS['echo']().loss}\n"
    )
    registry = Registry((str(tmp_path / "own.py"),))
    assert registry.method("ttrl") == ttrl()
    run: Run = parse_train(["ttrl", *NEEDED, "--plugin", *registry.plugins, "--loss", "own"])
    assert run.algorithm.loss == registry.method("echo").loss
