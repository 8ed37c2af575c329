"""Completion: what may stand next on a command line, and what a shell makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tabulate_words import flags, options_of, tabulate, text

from pyrl import cli
from pyrl.completion import FOLDER, SHELLS, complete, script


def after(line: str) -> list[str]:
    """What completes a line; one that ends with a space begins another word."""
    return complete(line.split(" "), cli.COMMANDS)


def test_the_words_are_those_of_the_package() -> None:
    assert (FOLDER / "words.json").read_text() == text(), "run python tests/tabulate_words.py"


@pytest.mark.parametrize("method", ["ttrl", "ettrl", "treerl", "clip_cov"])
def test_the_options_of_a_method_are_those_of_its_parser(method: str) -> None:
    words = tabulate()
    table = f"{words.options['train']} {words.methods[method]}".split()
    assert sorted(table) == sorted(flags(options_of("train", method)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tr", ["train"]),
        ("--com", ["--completion"]),
        ("--completion ", [*SHELLS]),
        ("train tt", ["ttrl", "ttrl_unique", "ttrl_guard"]),
        ("train ttrl --loss gsp", ["gspo"]),
        ("train ttrl --loss=gsp", ["--loss=gspo"]),
        ("train ttrl --loss = gsp", ["gspo"]),
        ("train ttrl --advantage grpo,ear", ["grpo,ear", "grpo,ear_clip"]),
        ("train ttrl --optimizer n", ["n_harpg", "n_pg_igt"]),
        ("train ttrl --engine ", ["hf", "vllm"]),
        ("train ttrl --resume --max-r", ["--max-rows"]),
        ("train ttrl --model ", []),
        ("train ttrl --loss.bounds.l", ["--loss.bounds.low"]),
        ("train ttrl --loss.keep", []),
        ("train ttrl --loss clip_cov --loss.keep.clip-cov.shr", ["--loss.keep.clip-cov.shrink"]),
        ("train --conf", []),
        ("demo ec", ["echo"]),
        ("methods show dr_", ["dr_grpo"]),
        ("report ", []),
        ("doctor -", ["--help"]),
        ("nothing ", []),
    ],
)
def test_words_that_may_come_next(line: str, words: list[str]) -> None:
    assert after(line) == words


def test_a_method_is_followed_by_all_of_its_options() -> None:
    offered = after("train ettrl ")
    assert {"--model", "--engine", "--loss", "--fork.mask-tail", "--sample.votes"} <= {*offered}
    assert len(offered) == len(set(offered)) > 100
    assert "--fork.mask-tail" not in after("train ttrl ")
    assert "--fork.mask-tail" in after("train ttrl --fork top_entropy --fork.")


def test_names_of_other_packages_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pyrl.methods]\nzz = a:b\n[pyrl.forks]\nzf = a:b\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert after("train z") == ["zz"]
    assert after("train zz --fork z") == ["zf"]
    assert after("demo z") == []


BASH = """
source <("$PYRL" --completion bash)
tab() {
  COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
  _pyrl "$PYRL" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
  echo "${COMPREPLY[*]}"
}
tab pyrl fit
tab pyrl train ettrl --fork.m
tab pyrl train ttrl --loss = gsp
tab pyrl report ""
complete -p pyrl
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The command, as pip installs it."""
    path = tmp_path / "pyrl"
    path.write_text(f"#!{sys.executable}\nfrom pyrl.cli import main\nmain()\n")
    path.chmod(0o755)
    return path


def test_bash_completes(program: Path) -> None:
    said = subprocess.run(
        ["bash", "--norc", "-c", BASH],
        env=os.environ | {"PYRL": str(program)},
        capture_output=True,
        text=True,
    )
    assert said.stderr == ""
    assert said.stdout.splitlines() == [
        "fit-judger",
        "--fork.min-gap --fork.mask-tail",
        "gspo",
        "",
        "complete -o default -F _pyrl pyrl",
    ]


def test_every_shell_reads_its_script(tmp_path: Path) -> None:
    here = [shell for shell in SHELLS if shutil.which(shell)]
    assert "bash" in here
    for shell in here:
        file = tmp_path / f"pyrl.{shell}"
        file.write_text(script(shell))
        assert subprocess.run([shell, "-n", str(file)], capture_output=True).stderr == b""


QUICK_ANSWER = """
import sys
from pyrl.cli import main
try:
    main(["--complete", "train", "ttrl", "--loss", "gspo"])
except SystemExit as stop:
    assert stop.code == 0
print({"torch", "transformers", "numpy", "tyro", "rich"} & sys.modules.keys())
"""


def test_an_answer_waits_for_no_library() -> None:
    said = subprocess.run(
        [sys.executable, "-P", "-c", QUICK_ANSWER], capture_output=True, text=True, check=True
    )
    assert said.stdout == "gspo\nset()\n"


@pytest.mark.parametrize(("argv", "got"), [([], "nothing"), (["tcsh"], "tcsh")])
def test_a_shell_that_is_not_known_is_refused(
    argv: list[str], got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--completion", *argv])
    assert stop.value.code == 2
    assert f"--completion: expected bash, zsh, fish, got {got}" in capsys.readouterr().err
