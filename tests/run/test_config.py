from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyrl.methods import METHODS
from pyrl.run.config import Run
from pyrl.run.names import ConfigError
from pyrl.run.parsing import load_run, method_of, parse_run, save_run


class Fork(Protocol):
    def __call__(self, branches: int) -> int: ...


class Stage(Protocol):
    def __call__(self, advantage_T: float) -> float: ...


@dataclass(frozen=True)
class Sample:
    """How many answers are sampled."""

    votes: int = 64
    """Leaves that vote."""
    train: int | None = None
    """Leaves that train; None means all."""

    def __post_init__(self) -> None:
        if self.train is not None and self.votes < self.train:
            raise ValueError(f"sample.votes: expected >= train {self.train}, got {self.votes}")


@dataclass(frozen=True)
class AdaptiveFork:
    """Forks where the model is unsure."""

    width: int = 4
    """Branches of a fork."""

    def __call__(self, branches: int) -> int:
        return branches


@dataclass(frozen=True)
class NoFork:
    """Never forks."""

    def __call__(self, branches: int) -> int:
        return branches


@dataclass(frozen=True)
class GroupNorm:
    """(R - mean) / std."""

    whiten: bool = True
    """Divide by the standard deviation."""

    def __call__(self, advantage_T: float) -> float:
        return advantage_T


@dataclass(frozen=True)
class Reshape:
    """Scales by entropy."""

    a: float = 0.1

    def __call__(self, advantage_T: float) -> float:
        return advantage_T


@dataclass(frozen=True)
class Kl:
    coef: float = 0.001
    """Weight of the penalty."""
    kind: Literal["k1", "k2", "k3"] = "k3"


@dataclass(frozen=True)
class Loss:
    kl: Kl | None = field(default_factory=Kl)
    penalty: Kl | None = None
    clip: tuple[float, float] = (0.2, 0.2)
    dual: float | None = None


@dataclass(frozen=True)
class Choices:
    sample: Sample
    fork: Fork
    prune: NoFork | AdaptiveFork
    advantage: tuple[Stage, ...]
    loss: Loss


ECHO = Choices(Sample(), AdaptiveFork(), NoFork(), (GroupNorm(), Reshape(), Reshape(a=0.5)), Loss())
NEEDED = ["--model", "M", "--data", "D"]


def parse(options: str = "") -> Run:
    return parse_run([*NEEDED, *options.split()], "echo", ECHO)


def rejected(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_run(options, "echo", ECHO)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_without_options_a_run_is_its_method() -> None:
    run = parse()
    assert (run.model, run.data, run.method) == ("M", "D", "echo")
    assert run.algorithm == ECHO
    assert run.output == Path("runs/echo")


def test_options_reach_every_depth_of_the_method() -> None:
    run = parse(
        "--fork.width 3 --sample.votes 16 --sample.train 8 --loss.kl.coef 0 --loss.clip "
        "0.1 0.3 --loss.dual 3 --learning-rate 1e-5 --betas 0.8 0.9 "
        "--advantage.group-norm.no-whiten --advantage.reshape.a 0.7 --resume "
        "--advantage.reshape-2.a 0.9 --loggers wandb trackio --chat False"
    )
    assert run.algorithm == Choices(
        Sample(16, 8),
        AdaptiveFork(3),
        NoFork(),
        (GroupNorm(whiten=False), Reshape(0.7), Reshape(0.9)),
        Loss(kl=Kl(coef=0.0), clip=(0.1, 0.3), dual=3.0),
    )
    assert (run.learning_rate, run.betas, run.resume) == (1e-5, (0.8, 0.9), True)
    assert (run.loggers, run.chat) == (("wandb", "trackio"), False)


def test_underscores_and_an_equals_sign_are_the_same_option() -> None:
    assert parse("--learning_rate=1e-5") == parse("--learning-rate 1e-5")


def test_help_lists_every_setting_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_run(["--help"], "echo", ECHO)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model", "--fork.width", "--loss.kl.coef", "--advantage.group-norm.whiten"):
        assert option in text
    assert "Branches of a fork. (default: 4)" in text
    assert "Forks where the model is unsure." in text
    assert "--config FILE" in text
    assert "--method" not in text
    assert "--algorithm" not in text


@pytest.mark.parametrize(
    ("mistyped", "right"),
    [
        ("--fork.widht", "--fork.width"),
        ("--learning-rat", "--learning-rate"),
        ("--sample.vote", "--sample.votes"),
        ("--advantage.reshap.a", "--advantage.reshape.a"),
    ],
)
def test_a_mistyped_option_names_the_nearest_right_one(
    capsys: pytest.CaptureFixture[str], mistyped: str, right: str
) -> None:
    text = rejected(capsys, *NEEDED, mistyped, "3")
    assert mistyped in text
    assert right in text.split("Perhaps you meant")[1]


def test_a_wrong_value_is_named_with_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps" in (text := rejected(capsys, *NEEDED, "--steps", "ten"))
    assert "ten" in text
    assert "cosine" in rejected(capsys, *NEEDED, "--schedule", "sine")
    assert "expected >= 1, got 0" in rejected(capsys, *NEEDED, "--steps", "0")
    assert "expected > 0, got nan" in rejected(capsys, *NEEDED, "--learning-rate", "nan")
    assert "expected >= train 70" in rejected(capsys, *NEEDED, "--sample.train", "70")


def test_a_missing_model_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = rejected(capsys, "--data", "D")
    assert "--model" in text
    assert "--data" not in text


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_yaml_nested_or_dotted_gives_the_settings_of_the_options(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        model: M
        data: D
        learning-rate: 1e-5
        resume: true
        suffix: "--answer in:\\n{}"
        loggers: []
        chat: off
        fork.width: 3
        sample: {votes: 16, train: null}
        advantage: {group-norm: {whiten: false}, reshape_2.a: 2}
        loss:
          kl.coef: 0
          clip: [0.1, 0.3]
        """,
    )
    run = parse_run(["--config", str(path)], "echo", ECHO)
    assert run == replace(
        parse(
            "--learning-rate 1e-5 --resume --fork.width 3 --sample.votes 16 "
            "--advantage.group-norm.no-whiten --advantage.reshape-2.a 2 --chat False "
            "--loss.kl.coef 0 --loss.clip 0.1 0.3"
        ),
        suffix="--answer in:\n{}",
        loggers=(),
    )


def test_options_override_yaml_and_complete_it(tmp_path: Path) -> None:
    path = write(tmp_path, "model: M\nsteps: 5\nresume: true\nfork: {width: 3}\n")
    options = ["--data", "D", "--steps", "7", "--no-resume", "--sample.votes", "9"]
    run = parse_run([f"--config={path}", *options], "echo", ECHO)
    assert run == parse("--steps 7 --fork.width 3 --sample.votes 9")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lerning_rate: 1", "'lerning_rate'; the nearest is 'learning_rate'"),
        ("fork: {widht: 1}", "'fork.widht'; the nearest is 'fork.width'"),
        ("algorithm: {fork: {width: 1}}", "'algorithm.fork.width'; the nearest is 'fork.width'"),
        ("fork: {width: wide}", "--fork.width"),
        ("resume: perhaps", "--resume"),
        ("steps: 0", "steps: expected >= 1, got 0"),
        ("betas: [0.9]", "--betas"),
        ("method: ttrl", "expected 'echo', got 'ttrl'"),
        ("- steps", "expected settings `name: value`"),
        ("steps: [", "no valid YAML"),
        ("steps: 2020-99-99", "no valid YAML"),
        ("", "expected settings `name: value`"),
    ],
)
def test_a_wrong_yaml_file_is_named_with_what_is_wrong(
    tmp_path: Path, text: str, says: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parse_run([*NEEDED, "--config", str(path)], "echo", ECHO)
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        parse_run(["--config", str(tmp_path / "absent.yaml")], "echo", ECHO)


words = st.text(st.characters(codec="utf-8"), max_size=12)
runs = st.builds(
    Run,
    model=words,
    data=words,
    method=st.just("echo"),
    algorithm=st.builds(
        Choices,
        sample=st.builds(Sample, votes=st.integers(), train=st.none()),
        fork=st.builds(AdaptiveFork, width=st.integers()),
        prune=st.just(NoFork()),
        advantage=st.tuples(
            st.builds(GroupNorm, whiten=st.booleans()),
            st.builds(Reshape, a=st.floats(allow_nan=False)),
            st.builds(Reshape, a=st.floats(allow_nan=False)),
        ),
        loss=st.builds(
            Loss,
            kl=st.builds(Kl, coef=st.floats(allow_nan=False), kind=st.sampled_from(["k1", "k2"])),
            penalty=st.none(),
            clip=st.tuples(st.floats(0, 1), st.floats(0, 1)),
            dual=st.none() | st.floats(0, 9),
        ),
    ),
    output=st.just(Path("runs") / "x y"),
    prefix=words,
    suffix=words,
    learning_rate=st.floats(0, exclude_min=True),
    chat=st.none() | st.booleans(),
    threads=st.none() | st.integers(1),
    loggers=st.lists(st.sampled_from(["tensorboard", "wandb"]), unique=True).map(tuple),
    resume=st.booleans(),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(run=runs)
def test_a_saved_run_loads_back_equal(tmp_path_factory: Any, run: Run) -> None:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    save_run(run, path)
    assert load_run(path, {"echo": lambda: ECHO}) == run
    assert [entry.name for entry in path.parent.iterdir()] == ["run.yaml"]


def test_a_saved_run_is_a_config_of_the_command_line(tmp_path: Path) -> None:
    run = parse("--fork.width 3 --suffix Box")
    save_run(run, tmp_path / "run.yaml")
    assert parse_run(["--config", str(tmp_path / "run.yaml")], "echo", ECHO) == run
    content = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert content["fork"] == {"width": 3}


def test_a_settings_file_knows_its_method(tmp_path: Path) -> None:
    save_run(parse(), tmp_path / "run.yaml")
    assert method_of(["--steps", "3", "--config", str(tmp_path / "run.yaml")]) == "echo"
    path = write(tmp_path, "model: M\n")
    with pytest.raises(ConfigError, match=rf"{path.name}: expected the setting 'method', or a"):
        method_of([f"--config={path}"])
    with pytest.raises(ConfigError, match=r"expected a method before .* got '--steps'"):
        method_of(["--steps", "3"])


def test_a_damaged_saved_run_is_named(tmp_path: Path) -> None:
    methods = {"echo": lambda: ECHO}
    path = write(tmp_path, "model: M\nsteps: 5\n")
    with pytest.raises(ConfigError, match="method: expected one of echo, got None"):
        load_run(path, methods)
    with pytest.raises(ConfigError, match="expected the settings 'model' and 'data'"):
        load_run(write(tmp_path, "method: echo\nmodel: M\n"), methods)


def test_the_settings_in_the_documentation_are_settings() -> None:
    path = Path(__file__).parents[2] / "docs" / "smollm2.yaml"
    run = parse_run(["--config", str(path)], "echo", METHODS["echo"]())
    assert run.model == "smollm2"
    assert run.algorithm.loss.kl.coef == 0
    assert run.algorithm.fork.cooldown == 2
