"""Choices by name: on the command line, in a settings file and in what a run leaves."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from short_run import SETTINGS, write_questions
from tiny_run import same_bits, trained, weights

from pyrl import advantage, cli
from pyrl.advantage import EntropyReshape
from pyrl.fork import EntropyConfidence, TopEntropy
from pyrl.loss import KL, Clip
from pyrl.methods.registry import KINDS, Registry, choose
from pyrl.methods.ttrl import ttrl
from pyrl.presets import PRESETS
from pyrl.reward import TrueReward
from pyrl.run.config import Run
from pyrl.run.directory import RunError, claim, find_start
from pyrl.run.names import ConfigError
from pyrl.run.parsing import load_run, parse_train
from pyrl.vote import Weighted

NEEDED = ["--model", "M", "--data", "D"]


def parse(*options: str, method: str = "ttrl") -> Run:
    return parse_train([method, *NEEDED, *options])


UNIQUE = {"fork": "without_replacement", "vote": "mass"}
"""Choices that are only made together."""


@pytest.mark.parametrize("name", PRESETS)
def test_every_loss_is_chosen_by_its_name(name: str) -> None:
    assert parse("--loss", name).algorithm == replace(ttrl(), loss=PRESETS[name]())


def test_every_other_choice_is_made_by_its_name() -> None:
    for kind in KINDS.keys() - {"method", "loss"}:
        before = "grpo," if kind == "advantage" else ""
        made = []
        for name in Registry().names(kind):
            both = UNIQUE if UNIQUE.get(kind) == name else {}
            made.append(vars(choose(ttrl(), **(both | {kind: before + name})))[kind])
        assert all(a != b for i, a in enumerate(made) for b in made[:i]), kind


def test_the_fields_of_a_named_choice_are_options() -> None:
    algorithm = parse(
        *("--loss", "gspo", "--loss.bounds.high", "3e-4", "--advantage=grpo,ear"),
        *("--advantage.entropy-reshape.y-max", "1.5", "--vote", "confidence"),
    ).algorithm
    loss = PRESETS["gspo"]()
    assert algorithm.loss == replace(loss, bounds=Clip(3e-4, 3e-4))
    assert algorithm.advantage == (*advantage.grpo(), EntropyReshape(y_max=1.5))
    assert algorithm.vote == Weighted("confidence")
    assert algorithm.sample == ttrl().sample


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--loss gpso", "there is no loss 'gpso'; the nearest is 'gspo'"),
        ("--loss grpo", "grpo is a method and an advantage, not a loss: `pyrl train grpo` or `py"),
        ("--fork icepop", "icepop is a loss, not a fork: `pyrl train METHOD --loss icepop`"),
        ("--advantage grpo,ear_clp", "no advantage 'ear_clp'; the nearest is 'ear_clip'"),
        ("--advantage ear", "EntropyReshape needs advantage_T, expected the result of a stage be"),
        ("--fork.rounds 2", "--fork.rounds is a setting of the fork ep_tree, which --fork NAME "),
        ("--fork ep_tree --fork.max-width=2", "fork entropy_confidence, entropy_confidence_fi"),
        ("--advantage.hybrid.no-whiten", "advantage hybrid, which --advantage NAME chooses; thi"),
        ("--loss dapo --loss.surrogate.cap 3", "reinforce, dro, dppo, dppo_kl, minirl, which -"),
        ("--loss.surrogate.cap 3", "--loss NAME chooses; this run has Clipped"),
        ("--loss.keep.top-entropy.share 0.1", "top_entropy, which --loss NAME chooses; this run h"),
        ("--reward vote --reward-function f.py:f", "expected a name or a reward_function, got"),
    ],
)
def test_a_wrong_name_or_a_setting_of_another_choice_says_what_would_be_right(
    options: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "ttrl", *NEEDED, *options.split()])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2
    assert says in said


def test_a_loss_is_no_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "icepop", *NEEDED])
    assert "icepop is a loss, not a method: `pyrl train METHOD --loss" in capsys.readouterr().err


def test_in_python_too() -> None:
    chosen = choose(ttrl(), loss="dapo", fork="top_entropy")
    assert chosen == replace(ttrl(), loss=PRESETS["dapo"](), fork=TopEntropy())
    with pytest.raises(ValueError, match="no choice of a method 'lose'; the nearest is 'loss'"):
        choose(ttrl(), lose="dapo")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_a_settings_file_names_choices_alone_or_with_their_settings(tmp_path: Path) -> None:
    short = write(tmp_path, "loss: gspo\nadvantage: [grpo, ear]\nreward: true\nfork: null\n")
    run = parse("--config", str(short))
    assert run == parse("--loss", "gspo", "--advantage", "grpo,ear", "--reward", "true")
    assert run.algorithm.reward == TrueReward()
    long = write(tmp_path, "loss: {name: gspo, bounds: {high: 3.e-4}}\nfork.name: top_entropy\n")
    bounds = ["--loss.bounds.high", "3e-4"]
    same = parse("--loss", "gspo", *bounds, "--fork", "top_entropy")
    assert parse("--config", str(long)) == same
    assert parse("--config", str(long), "--loss", "gspo", "--loss.bounds.low", "1") == parse(
        "--loss", "gspo", *bounds, "--fork", "top_entropy", "--loss.bounds.low", "1"
    )
    # Another name on the command line: the file's settings were those of the other choice.
    assert parse("--config", str(long), "--loss", "dapo") == parse(
        "--loss", "dapo", "--fork", "top_entropy"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("loss: gpso", "loss: there is no loss 'gpso'; the nearest is 'gspo'"),
        ("loss: {name: treerl}", "treerl is a method and an advantage, not a loss"),
        ("loss: 3", "loss: expected the name of a choice, got 3"),
        ("loss: gspo\nloss.name: dapo", "loss: expected one name, got 'gspo' and 'dapo'"),
        ("fork: {rounds: 2}", "fork.rounds is a setting of the fork ep_tree, which --fork"),
        ("loss: gspo\nchoices: {loss.bounds: Range}", "expected Clip, as the loss 'gspo' has it"),
        ("plugin: 3", "plugin: expected a file or a list of files, got 3"),
    ],
)
def test_wrong_names_in_a_settings_file_are_said_with_the_file(
    tmp_path: Path, text: str, says: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parse("--config", str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)


def test_a_run_of_named_choices_comes_back_from_its_settings(tmp_path: Path) -> None:
    run = parse("--loss", "hispo", "--advantage", "treepo", "--fork", "top_entropy", "--resume")
    run = replace(run, output=tmp_path / "run")
    claim(run)
    path = run.output / "run.yaml"
    assert load_run(path) == replace(run, resume=False)
    content = yaml.safe_load(path.read_text())
    assert [content[kind]["name"] for kind in ("loss", "advantage", "fork")] == [
        *("hispo", "treepo", "top_entropy"),
    ]
    assert "name" not in content["vote"]
    # Resumed without the names, but with the same classes and numbers: the same run.
    assert find_start(replace(run, names=parse().names)) is None
    other = replace(run.algorithm, fork=EntropyConfidence())
    with pytest.raises(RunError, match=r"choices\.fork \(was 'TopEntropy', is 'EntropyConfidence'"):
        find_start(replace(run, algorithm=other))


def test_the_demo_has_the_same_names() -> None:
    from pyrl.demo.run import METHODS, parse_demo

    run = parse_demo(["ttrl", "--loss", "gspo", "--vote", "confidence", "--updates", "3"])
    parent = METHODS["ttrl"]()
    assert run.algorithm == replace(
        parent, loss=PRESETS["gspo"](), vote=Weighted("confidence"), updates_per_step=3
    )
    assert run.names.chosen == {"loss": "gspo", "vote": "confidence"}
    assert parent.loss.kl == KL(coef=0.0)


def test_named_choices_train_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl", answers=False)
    names = "--loss tis --advantage grpo,ear --fork top_entropy --vote confidence --reward random"
    given = [*SETTINGS, *names.split(), "--fork.mask-tail", "1", "--data", str(data)]
    run = parse_train(["ttrl", *given, "--output", str(tmp_path / "run")])
    whole, rows = trained(replace(run, output=tmp_path / "whole"), 2)
    assert rows[-1]["tree/forks"] > 0
    assert rows[-1]["advantage/ear_factor_max"] > 1
    assert "old_logprobs/tokens" in rows[-1]
    first, _ = trained(run, 1)
    claim(run)
    first.save()
    first.close()
    # The settings that the run has left, and nothing else, give it again.
    again = parse_train(["--config", str(run.output / "run.yaml"), "--resume"])
    resumed, _ = trained(again, 1)
    assert same_bits(weights(resumed), weights(whole))
    assert resumed.step == 2
    recorded = re.findall(r"^  name: (.*)$", (run.output / "run.yaml").read_text(), re.M)
    assert sorted(recorded) == sorted(names.split()[1::2])
