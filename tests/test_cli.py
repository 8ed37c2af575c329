"""The command line: help, settings from three places, and whole commands as a person runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from short_run import ECHO, SETTINGS, write_questions

import pyrl
from pyrl import cli, demo
from pyrl.answers import VerifierError
from pyrl.methods import METHODS
from pyrl.run.parsing import load_run, parse_run

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def command(argv: list[str], capsys: Captured) -> str:
    """What a command prints as it ends well."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    return said.out


@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        ([], ["pyrl demo [METHOD]", "Each command has --help"]),
        (["--help"], ["pyrl train METHOD ...", "ttrl, ettrl, echo", "pyrl eval", "pyrl info"]),
        (["--version"], [f"pyrl {pyrl.__version__}"]),
        (["train", "--help"], ["METHOD is one of ttrl"]),
        (["train", "grpo", "--help"], ["--model STR", "(required)", "--loss.bounds.low FLOAT"]),
        (["train", "echo", "--help"], ["--fork.cooldown", "--prune.tail-window"]),
        (
            ["demo", "--help"],
            ["ttrl, ettrl or echo; or a control", "--steps", "(default: runs/demo)"],
        ),
        (["eval", "--help"], ["--low-temperature FLOAT", "--limit", "Only the first questions."]),
        (["compare", "--help"], ["--budget", "tokens=N", "--seeds INT", "(default: 5)"]),
        (["serve", "--help"], ["Tinker protocol", "(default: 127.0.0.1)", "--token"]),
        (["info", "--help"], ["How pyrl was built."]),
        (["doctor", "--help"], ["each line is ok, or says what to do", "Exit code 0"]),
    ],
)
def test_every_command_explains_itself(
    argv: list[str], phrases: list[str], capsys: Captured
) -> None:
    said = command(argv, capsys)
    assert [phrase for phrase in phrases if phrase not in said] == []
    assert max(map(len, said.splitlines())) <= 100


QUICK_ANSWER = """
import sys
from pyrl.cli import main
for argv in [], ["--help"], ["--version"]:
    try:
        main(argv)
    except SystemExit as stop:
        assert stop.code == 0
print({"torch", "transformers", "numpy", "tyro", "rich"} & sys.modules.keys())
"""


def test_help_and_version_wait_for_no_library() -> None:
    said = subprocess.run(
        [sys.executable, "-P", "-c", QUICK_ANSWER], capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith(cli.USAGE)
    assert said.stdout.endswith(f"pyrl {pyrl.__version__}\nset()\n")
    assert {"ttrl", "ettrl", "echo"} <= METHODS.keys()  # which the help names


def test_what_the_package_offers_is_there_at_its_first_use() -> None:
    for name in pyrl.__all__:
        assert name in dir(pyrl)
        assert getattr(pyrl, name).__name__.removeprefix("pyrl.") == name
    with pytest.raises(AttributeError, match="module 'pyrl' has no attribute 'forest_'"):
        _ = pyrl.forest_


def test_a_source_tree_without_its_compiled_part_says_what_to_do(tmp_path: Path) -> None:
    tree = Path(pyrl.__file__).parent
    (tmp_path / "pyrl" / "_core").mkdir(parents=True)
    (tmp_path / "pyrl" / "__init__.py").write_bytes((tree / "__init__.py").read_bytes())
    said = subprocess.run(
        [sys.executable, "-c", "import pyrl"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert f"ImportError: pyrl: the source tree {tmp_path} has no compiled part" in said.stderr
    assert "`pip install -e .`" in said.stderr


def options_of(said: str) -> list[tuple[str, str]]:
    """Each option of a help and its text, without its default."""
    text = "\n".join(line.strip("│ ") for line in said.splitlines())
    found = re.findall(r"^(--[a-z][\w.-]*)(.*?)(?=^(?:-|╰)|\Z)", text, re.MULTILINE | re.DOTALL)
    # The kind of a value stands before the text, two spaces or a line away.
    split = [(name, re.split(r"  +|\n", rest, maxsplit=1)) for name, rest in found]
    known = re.compile(r"\((default|fixed to|required)")
    return [(name, known.split(" ".join(rest[1:]))[0].strip()) for name, rest in split]


KINDS_OF_METHODS = (
    *("ttrl", "ettrl", "echo", "treerl", "grpo_unique", "dr_grpo", "hispo", "hapo", "calibrl"),
)
"""Methods whose options differ; others have those of one of them."""


@pytest.mark.parametrize(
    "command_line", [["demo"], ["eval"], ["compare"], *(["train", m] for m in KINDS_OF_METHODS)]
)
def test_every_option_has_a_name_of_its_own_and_a_text(
    command_line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    options = options_of(command([*command_line, "--help"], capsys))
    assert len(options) > (35 if command_line[0] == "train" else 3)
    assert len(options) == len(dict(options))
    assert [name for name, text in options if not text] == []


def test_info_says_how_pyrl_was_built(capsys: Captured) -> None:
    said = command(["info"], capsys)
    assert re.search(r"^version: \d+\.\d+", said, re.MULTILINE)


@pytest.mark.parametrize("method", KINDS_OF_METHODS)
def test_options_yaml_and_dotted_overrides_give_the_same_run(method: str, tmp_path: Path) -> None:
    options = shlex.split("""
        --model demo --data demo:train --learning-rate 3e-5 --betas 0.8 0.9 --steps 7
        --sample.votes 40 --sample.max-tokens 99 --loss.kl.coef 0.25 --loggers
    """)
    yaml = tmp_path / "settings.yaml"
    yaml.write_text(
        "model: demo\ndata: demo:train\nlearning-rate: 3.0e-5\nbetas: [0.8, 0.9]\nsteps: 7\n"
        "loggers: []\nsample: {votes: 40, max_tokens: 99}\nloss:\n  kl: {coef: 0.25}\n"
    )
    dotted = tmp_path / "dotted.yaml"
    dotted.write_text("model: demo\ndata: demo:train\nsample.votes: 8\nsteps: 90\n")
    more = options[4:]
    algorithm = METHODS[method]
    run = parse_run(options, method, algorithm())
    assert run.algorithm.sample.votes == 40
    assert parse_run(["--config", str(yaml)], method, algorithm()) == run
    small = ["--sample.train", "8"]  # dotted.yaml alone has fewer votes than the method trains on
    dotted.write_text(dotted.read_text() + "sample.train: 8\n")
    assert parse_run(["--config", str(dotted), *more], method, algorithm()) == parse_run(
        [*options, *small], method, algorithm()
    )


def test_a_run_leaves_settings_that_give_it_again(tmp_path: Path, capsys: Captured) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    output = tmp_path / "run"
    argv = [*SETTINGS, *ECHO, "--data", str(data), "--output", str(output), "--steps", "1"]
    said = command(["train", "echo", *argv], capsys)
    assert str(output / "curves.png") in said
    run = parse_run(argv, "echo", METHODS["echo"]())
    assert load_run(output / "run.yaml", METHODS) == run
    again = ["--config", str(output / "run.yaml"), "--output", str(tmp_path / "again")]
    command(["train", *again], capsys)  # the file names the method
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == (
        output / "model" / "model.safetensors"
    ).read_bytes()


def test_a_reward_function_of_ones_own_trains(tmp_path: Path, capsys: Captured) -> None:
    """It is called as TRL calls it, on every response of every step, and its values train."""
    (tmp_path / "shorter.py").write_text(
        "import json, pathlib\n"
        "calls = pathlib.Path(__file__).with_name('calls.jsonl')\n"
        "def score(prompts, completions, answer, **columns):\n"
        "    with calls.open('a') as file:\n"
        "        print(json.dumps([prompts, completions, answer]), file=file)\n"
        "    return [float(text[:1] == '0') for text in completions]\n"
    )
    data = write_questions(tmp_path / "questions.jsonl")
    output = tmp_path / "run"
    reward = ["--reward-function", f"{tmp_path / 'shorter.py'}:score", "--reward-answers"]
    argv = ["--data", str(data), "--output", str(output), "--steps", "2", *reward]
    command(["train", "grpo", *SETTINGS, *argv], capsys)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == 2
    for prompts, completions, answers in calls:
        assert len(prompts) == len(completions) == len(answers) == 4 * 8
        assert all("".join(sorted(p[:-1])) == a for p, a in zip(prompts, answers, strict=True))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    means = [sum(text[:1] == "0" for text in completions) / 32 for _, completions, _ in calls]
    assert [row["reward"] for row in rows[1:]] == pytest.approx(means)
    trained = (output / "model" / "model.safetensors").read_bytes()
    assert trained != (demo.MODEL / "model.safetensors").read_bytes()


def test_eval_scores_a_model(tmp_path: Path, capsys: Captured) -> None:
    argv = shlex.split("""
        eval --model demo --data demo:heldout --limit 8 --samples 4 --extractor whole
        --equivalence exact --max-tokens 21 --device cpu
    """)
    output = tmp_path / "scores"
    said = command([*argv, "--output", str(output)], capsys)
    for score in ("greedy", "pass@1, T=0.6", "maj@4", "pass@4", "sampled tokens"):
        assert re.search(rf"{re.escape(score)} +│ +[\d.,]+ │", said), said
    assert "untrained" not in said
    assert "In brackets" not in said
    report = json.loads((output / "report.json").read_text())
    assert report["facts"]["questions"] == 8
    assert (
        f"greedy | {report['evaluations'][0]['metrics']['greedy']:.3f} |"
        in (output / "report.md").read_text()
    )
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--output", str(output)])
    assert stop.value.code == 2
    assert "expected no report in" in capsys.readouterr().err


QUICK_DEMO = """
import sys
from dataclasses import replace
import pyrl.demo.run
from pyrl.cli import main
quick = replace(pyrl.demo.run.SCORING, samples=2, exact=2)
pyrl.demo.run.SCORING = quick
main(["demo", "ttrl", "--steps", "2", "--output", sys.argv[1]])
"""
"""`pyrl demo ttrl --steps 2`, scored by few samples: its real scores take minutes."""


def test_the_demo_in_a_pipe_says_what_it_does_and_leaves_its_report(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    said = subprocess.run(
        [sys.executable, "-P", "-c", QUICK_DEMO, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "100"},
    )
    text = said.stdout
    assert said.returncode == 0, text.decode()
    # No bars, colours or carriage returns, and no words of the libraries underneath.
    assert re.findall(rb"[\x00-\x09\x0b-\x1f\x7f]", text) == []
    for noise in (b"Loading weights", b"Writing model shards", b"Warning", b"warning"):
        assert noise not in text
    sets = ["evaluating trained questions", "evaluating held-out", "evaluating length 18"]
    lines = text.decode().splitlines()
    assert [line.split("  ")[0] for line in lines[:9]] == [
        "loading", *sets, "step 1/2", "step 2/2", *(f"{name}, step 2/2" for name in sets)
    ]  # fmt: skip
    assert lines[9].startswith("ttrl on demo, demo:train")
    assert [n for n, line in enumerate(lines) if "left" in line or line[0] == "!"] == [4]
    assert lines[-1] == f"report   {output / 'report.html'}"
    check_report(output)


def check_report(output: Path) -> None:
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "| untrained: greedy |" in (output / "report.md").read_text()
    assert '"title":"ttrl on demo, demo:train"' in (output / "report.html").read_text()
    assert {path.name for path in (output / "trees").iterdir()} == {
        "1.safetensors",
        "2.safetensors",
    }
    report = json.loads((output / "report.json").read_text())
    sets = {evaluation["set"] for evaluation in report["evaluations"]}
    assert sets == {"trained questions", "held-out", "length 18"}
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert (output / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (VerifierError("the judge cannot be loaded"), 2, "pyrl: the judge cannot be loaded"),
        (KeyboardInterrupt(), 130, "pyrl: interrupted; nothing was saved"),
    ],
)
def test_what_ends_an_evaluation_is_a_sentence(
    error: BaseException, code: int, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def ended(*_: object) -> None:
        raise error

    monkeypatch.setattr("pyrl.evaluate.evaluate_model", ended)
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--model", "demo", "--data", "demo:heldout"])
    assert stop.value.code == code
    assert said in capsys.readouterr().err


def test_sigterm_while_nothing_is_saved_ends_a_command_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        "pyrl.evaluate.evaluate_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--model", "demo", "--data", "demo:heldout"])
    assert stop.value.code == 130
    assert "pyrl: interrupted; nothing was saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_server_without_its_libraries_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "--model", "demo"])
    assert stop.value.code == 2
    assert "needs starlette, uvicorn, peft; pip install 'pyrl[serve]'" in capsys.readouterr().err
