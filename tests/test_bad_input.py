"""Bad input: a clear message, exit code 2, nothing written over."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_run import SETTINGS, write_questions

from pyrl import cli, demo
from pyrl.run import checkpoint

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.jsonl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A writable copy of the packaged model."""
    return Path(shutil.copytree(demo.MODEL, tmp_path / "model"))


def short(data: Path | str, output: Path, *more: str) -> list[str]:
    kl = ["--loss.kl.coef", "0"]
    return ["train", "ttrl", *SETTINGS, *kl, "--data", str(data), "--output", str(output), *more]


def refused(argv: list[str], capsys: Captured) -> str:
    """What the command says as it ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def ran(argv: list[str]) -> None:
    ended(argv, code=0)


def ended(argv: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == code


def rows(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# -- questions --


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "bad.jsonl: no such file"),
        ("", "bad.jsonl: the data set is empty"),
        ('{"prompt": "21="}\n{"prompt": "43="\n', "bad.jsonl, line 2: malformed JSON"),
        ('{"prompt": "21="}\n\n[1]\n', "bad.jsonl, line 3: expected a JSON object, got list"),
        ('{"prompt": "21="}\n{"text": "43="}\n', "bad.jsonl, line 2: no prompt: expected one of"),
        ('{"prompt": ""}\n', "bad.jsonl, line 1: the prompt is empty"),
        ('{"prompt": "sort 21"}\n', "bad.jsonl, line 1: the tokenizer has no token"),
        (f'{{"prompt": "{"7" * 53}="}}', "bad.jsonl, line 1: prompt 0 has 54 tokens, the limit is"),
    ],
)
def test_questions_that_cannot_be_used(
    text: str | None, said: str, tmp_path: Path, capsys: Captured
) -> None:
    data = tmp_path / "bad.jsonl"
    if text is not None:
        data.write_text(text)
    assert said in refused(short(data, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_responses_that_leave_no_room_for_a_question(
    questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    said = refused(short(questions, tmp_path / "run", "--sample.max-tokens", "64"), capsys)
    assert "no room for a question" in said
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_true_answers(tmp_path: Path, capsys: Captured) -> None:
    data = write_questions(tmp_path / "unlabelled.jsonl", answers=False)
    argv = ["eval", "--model", "demo", "--data", str(data), "--max-tokens", "12"]
    assert "expected a true answer for each question, 0 has none" in refused(argv, capsys)


# -- models --


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("model.safetensors", "the checkpoint lacks weights"),
        ("tokenizer.json", "the checkpoint lacks a tokenizer"),
        ("config.json", "the checkpoint lacks config.json"),
    ],
)
def test_a_model_without_one_of_its_parts(
    lost: str, said: str, model: Path, questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    (model / lost).unlink()
    argv = short(questions, tmp_path / "run", "--model", str(model))
    assert f"{model}: {said}" in refused(argv, capsys)
    assert not (tmp_path / "run").exists()


def plant_nan(model: Path, name: str, row: int) -> None:
    weights = load_file(model / "model.safetensors")
    weights[name][row] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_a_model_with_nan_in_its_weights(
    model: Path, questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    plant_nan(model, "model.layers.1.mlp.up_proj.weight", 0)
    said = refused(short(questions, tmp_path / "run", "--model", str(model)), capsys)
    assert "the weights hold NaN or infinite values in model.layers.1.mlp.up_proj.weight" in said
    assert not (tmp_path / "run").exists()


# -- settings --


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "there is no command 'trian'; the nearest is 'train'"),
        (["train", "ehco"], "there is no method 'ehco'; the nearest is 'echo'"),
        (["demo", "ecko"], "there is no demo method 'ecko'; the nearest is 'echo'"),
        (
            ["train", "ttrl", "--model", "demo", "--data", "d", "--lerning-rate", "1"],
            "--learning-rate",
        ),
        (["train", "ttrl", "--model", "demo"], "--data"),
        (
            ["train", "ttrl", "--model", "demo", "--data", "d", "--engine", "hff"],
            "there is no engine 'hff'; the nearest is 'hf'",
        ),
        (["train", "ttrl", "--model", "demo", "--data", "d", "--steps", "many"], "steps"),
        (["train", "ttrl", "--model", "demo", "--data", "d", "--steps", "0"], "expected >= 1"),
        (["demo", "--steps", "0"], "steps: expected >= 1, got 0"),
        (["eval", "--model", "demo", "--dat", "d"], "--data"),
        (
            ["eval", "--model", "demo", "--data", "d", "--engine", "vlm"],
            "there is no engine 'vlm'; the nearest is 'vllm'",
        ),
    ],
)
def test_mistyped_settings_are_answered_with_the_nearest_right_one(
    argv: list[str], said: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(argv, capsys)
    assert list(tmp_path.iterdir()) == []


def test_more_leaves_that_train_than_vote(
    questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    said = refused(short(questions, tmp_path / "run", "--sample.votes", "4"), capsys)
    assert "train <= votes, got train=8, votes=4" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("score.py:score", "there is no file score.py"),
        ("no_such_module:score", "raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("score", "expected module:function or file.py:function"),
    ],
)
def test_a_reward_function_that_cannot_be_found(
    path: str, said: str, questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    argv = short(questions, tmp_path / "run", "--reward-function", path)
    assert said in refused(argv, capsys)
    assert not (tmp_path / "run").exists()


# -- directories --


@pytest.mark.parametrize("kept", ["run.yaml", "thesis.tex"])
def test_a_directory_that_holds_something_stays_as_it_is(
    kept: str, questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / kept).write_text("mine")
    assert "choose another --output" in refused(short(questions, tmp_path / "run"), capsys)
    assert [p.read_text() for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_one_of_several_processes_of_a_launcher(
    questions: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    said = refused(short(questions, tmp_path / "run"), capsys)
    assert "WORLD_SIZE is 2: expected torchrun's RANK, LOCAL_RANK, LOCAL_WORLD_SIZE beside" in said
    assert not (tmp_path / "run").exists()
    said = refused(["eval", "--model", "demo", "--data", str(questions)], capsys)
    assert "expected one process, got WORLD_SIZE=2" in said


@pytest.mark.parametrize("content", ["steps: [", "a: 2020-99-99", "\x9f", "- 1", ""])
def test_resuming_with_damaged_settings(
    content: str, questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    settings = tmp_path / "run" / "run.yaml"
    settings.parent.mkdir()
    settings.write_text(content, "latin-1")
    assert f"{settings}: " in refused(short(questions, tmp_path / "run", "--resume"), capsys)
    assert [path.name for path in settings.parent.iterdir()] == ["run.yaml"]


def test_nothing_to_resume(questions: Path, tmp_path: Path, capsys: Captured) -> None:
    said = refused(short(questions, tmp_path / "run", "--resume"), capsys)
    assert "nothing to resume, there is no run.yaml" in said
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file(questions: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "run").write_text("mine")
    assert "expected a directory" in refused(short(questions, tmp_path / "run"), capsys)
    assert (tmp_path / "run").read_text() == "mine"


def test_resuming_with_other_settings_names_them(
    questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "run"
    ran(short(questions, output, "--steps", "1", "--save-every", "1"))
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    changed = ["--steps", "1", "--learning-rate", "0.5", "--sample.temperature", "1.0", "--resume"]
    said = refused(short(questions, output, *changed), capsys)
    assert "these differ: learning_rate (was 0.0001, is 0.5), sample.temperature (was 1.2" in said
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before
    # How long and how it is watched may change.
    ran(short(questions, output, "--steps", "2", "--eval-samples", "1", "--resume"))
    assert [row["step"] for row in rows(output)] == [0, 1, 2]
    said = refused(short(questions, output, "--steps", "1", "--resume"), capsys)
    assert "checkpoint-2: expected at most --steps 1, it has 2" in said


def test_a_corrupted_checkpoint_is_named_and_not_loaded(
    questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "run"
    ran(short(questions, output, "--steps", "1"))
    weights = output / "checkpoint-1" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    metrics = (output / "metrics.jsonl").read_bytes()
    said = refused(short(questions, output, "--steps", "2", "--resume"), capsys)
    assert f"{weights}: expected sha256" in said
    assert "damaged" in said
    assert (output / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_at_checkpoint_time_leaves_the_old_checkpoint(
    questions: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, output = checkpoint.save_file, tmp_path / "run"
    argv = short(questions, output, "--steps", "2", "--save-every", "1")

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        said = refused(argv, capsys)
    assert "checkpoint-2: could not be written ([Errno 28] No space left on device)" in said
    found = checkpoint.latest(output)
    assert found is not None
    assert found.step == 1
    assert sorted(p.name for p in output.glob("*checkpoint*")) == ["checkpoint-0", "checkpoint-1"]
    ran([*argv, "--resume"])
    assert [row["step"] for row in rows(output)] == [0, 1, 2]


# -- numbers --


def test_nan_in_logits_stops_the_step_and_names_its_questions(
    tmp_path: Path, capsys: Captured
) -> None:
    """A rate that destroys the model: the second step samples from what is left of it."""
    data = write_questions(tmp_path / "questions.jsonl", answers=False)
    more = ["--learning-rate", "1e30", "--warmup-steps", "0", "--save-every", "1", "--steps", "3"]
    more += ["--updates-per-step", "1"]
    said = refused(short(data, tmp_path / "run", *more), capsys)
    assert "step 2: " in said
    texts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    assert sum(text in said for text in texts) == 3
    assert "and 1 more" in said
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == [
        "checkpoint-0",
        "checkpoint-1",
    ]


def test_nan_in_a_gradient_leaves_the_weights(
    questions: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyrl.learner.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    monkeypatch.delattr(torch.optim.AdamW, "step")
    said = refused(short(questions, tmp_path / "run"), capsys)
    assert "step 1: expected a finite loss and gradient" in said
    assert "Its questions: '" in said


def test_a_run_without_any_answer_changes_nothing_says_so_and_ends_with_a_code_of_its_own(
    questions: Path, tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "run"
    more = ["--extractor", "boxed", "--steps", "2", "--save-every", "1", "--keep-checkpoints", "3"]
    ended(short(questions, output, *more), code=4)
    said = capsys.readouterr().err
    assert said.endswith("pyrl: no step updated the model: it is unchanged\n")
    assert "training steps 2 (none of them updated" in (output / "report.md").read_text()
    assert said.count("! Step 1: no response can be rewarded, so there is no update") == 1
    assert "! Step 2: no response" not in said  # it still holds
    assert "The extractor in effect is boxed; two responses: '" in said
    assert said.count("(read: nothing)") == 2
    assert [row["step"] for row in rows(output)] == [0, 1, 2]
    weights = {(output / f"checkpoint-{n}/model.safetensors").read_bytes() for n in range(3)}
    weights.add((output / "model/model.safetensors").read_bytes())
    assert len(weights) == 1
    # It stays so when the run goes on.
    more += ["--resume", "--no-eval-after"]
    ended(short(questions, output, *more, "--steps", "3"), code=4)
