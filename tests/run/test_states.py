"""What choices read of a run, and what they remember in it: parts of a plugin in tiny runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading_parts import Largest
from short_run import SETTINGS, write_questions
from tiny_run import make_trainer, same_bits, stepped, tiny, tiny_run, trained, weights

from pyrl import cli
from pyrl.demo.run import ttrl
from pyrl.learner import Learner
from pyrl.leaves import collect
from pyrl.methods.registry import Registry
from pyrl.run.config import Run
from pyrl.run.directory import claim
from pyrl.run.parsing import parse_train
from pyrl.run.states import States
from pyrl.train import Trainer

PLUGIN = Path(__file__).parents[1] / "reading_parts.py"
NAMES = ["--plugin", str(PLUGIN), "--advantage", "grpo,drift", "--select", "largest"]
STEPS = 3


def reading_run(folder: Path) -> Run:
    """Three steps of which each part reads all that there is."""
    data = write_questions(folder / "questions.jsonl", answers=False)
    given = [*SETTINGS, *NAMES, "--reward", "calm", "--data", str(data), "--loss.kl.coef", "0"]
    given += ["--prompts-per-step", "2", "--steps", str(STEPS), "--output", str(folder / "run")]
    return parse_train(["ttrl", *given])


def kept(states: States) -> dict[str, Any]:
    """All that they are, with types and bits of arrays."""
    arrays = states.arrays().items()
    return {"record": states.state_dict()} | {k: (v.dtype, v.tolist()) for k, v in arrays}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[dict[str, Any]]]:
    return trained(reading_run(tmp_path_factory.mktemp("whole")), STEPS)


def test_parts_of_a_plugin_read_tokens_texts_progress_and_passes_of_the_learner(
    uninterrupted: tuple[Trainer, list[dict[str, Any]]],
) -> None:
    trainer, rows = uninterrupted
    for row in rows:
        assert row["drift/spelled"] == 1
        assert row["drift/sampler"] < 1e-4
        assert 0.45 < row["select/tokens"] < 0.55
        assert 0.2 < row["select/leaves"] <= 1
        assert 0 < row["reward"] < 1
        assert row["grad_norm"] > 0
    # The first model is that of the first step, and then no more.
    assert rows[0]["drift/away"] < 1e-6 < rows[1]["drift/away"]
    assert [row["drift/known"] for row in rows] == [0, 64, 64]
    shares = [step / STEPS for step in range(STEPS)]
    assert trainer.states.reward == {"progress": shares}
    record = trainer.states.state_dict()
    assert record["advantage.drift"]["log"] == {"progress": shares}
    assert record["select"]["tokens"] > 0


class Killed(BaseException):
    """The process ends here: nothing may catch it."""


def test_a_run_with_states_that_was_killed_goes_on_bit_for_bit(
    uninterrupted: tuple[Trainer, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = reading_run(tmp_path)
    first, _ = trained(run, 1)
    claim(run)
    first.save()

    def killed(*given: Any, **named: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", killed)  # the states have moved by then
        with pytest.raises(Killed):
            first.train_step()
    assert first.states.reward == {"progress": [0.0, 1 / STEPS]}
    first.close()
    second = make_trainer(replace(run, resume=True))
    assert second.states.reward == {"progress": [0.0]}
    rows = [stepped(second) for _ in range(STEPS - 1)]
    whole, expected = uninterrupted
    assert kept(second.states) == kept(whole.states)
    assert same_bits(weights(second), weights(whole))
    for row, other in zip(rows, expected[1:], strict=True):
        assert {k: v for k, v in row.items() if "time" not in k and "timing" not in k} == {
            k: v for k, v in other.items() if "time" not in k and "timing" not in k
        }


# -- what is refused at the start --


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            [*NAMES, "--old-logprobs", "engine"],
            "expected 'auto' or 'learner' (--old-logprobs auto), got 'engine': Drift needs "
            "old_logprob_T, which a pass of the learner gives",
        ),
        (
            [*NAMES, "--advantage", "drift,grpo"],
            "Drift needs advantage_T, expected the result of a stage",
        ),
        (
            ["--plugin", "OWN", "--reward", "late"],
            "reward: Late needs old_logprob_T, expected among what a run has: confidence_N, decode",
        ),
        (
            ["--plugin", "OWN", "--advantage", "grpo,keeper"],
            "advantage.keeper: state 'seen': expected what a checkpoint can hold (a NumPy array of "
            "numbers; or a text, a number of Python, None, and lists and dictionaries of these), "
            "got set {1, 2}",
        ),
        (
            ["--plugin", "OWN", "--select", "failing"],
            "select: Failing.initial raised ZeroDivisionError in line",
        ),
    ],
)
def test_what_a_run_does_not_have_is_named_at_the_start(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from dataclasses import dataclass\n"
        "from pyrl.advantage import AdvantageClip\n"
        "from pyrl.reward import VoteReward\n"
        "from pyrl.select import First\n\n"
        "@dataclass(frozen=True)\n"
        "class Late(VoteReward):\n    needs = ('old_logprob_T',)\n\n"
        "@dataclass(frozen=True)\n"
        "class Keeper(AdvantageClip):\n    def initial(self):\n        return {'seen': {1, 2}}\n\n"
        "@dataclass(frozen=True)\n"
        "class Failing(First):\n    def initial(self):\n        return {'share': 1 / 0}\n\n"
        "REWARDS, SELECTS = {'late': Late}, {'failing': Failing}\n"
        "ADVANTAGES = {'keeper': Keeper}\n"
    )
    data = write_questions(tmp_path / "questions.jsonl")
    given = [*SETTINGS, "--data", str(data), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "ttrl", *given, *[str(own) if m == "OWN" else m for m in more]])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_the_first_model_is_there_for_those_that_name_it_alone(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(ttrl()))
    trainer = make_trainer(run)
    assert trainer.learner.reference is None
    asked = trainer.prompts[:1]
    forest = trainer.sampler.rollout(asked, trainer.algorithm, trainer.signals, trainer.step).run()
    look = trainer.learner.before(collect(forest, trainer.decode).rows)
    with pytest.raises(ValueError, match=r"ref_logprob_T: expected an advantage stage or a sel"):
        look("ref_logprob_T")
    trainer.close()


# -- what a checkpoint can hold --


@dataclass(frozen=True)
class Holds:
    """A stage that remembers a value."""

    value: Any

    def initial(self) -> Any:
        return self.value

    def __call__(self, scored: Any, advantage_T: Any) -> Any:
        return advantage_T

    def metrics(self, scored: Any, advantage_T: Any) -> dict[str, float]:
        return {}


def states_of(*values: Any) -> States:
    return States(replace(ttrl(), advantage=tuple(Holds(value) for value in values)))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "advantage.holds: expected a dictionary as state, got None"),
        ({1: "a"}, "state 1: expected what a checkpoint can hold"),
        ({"a": (1, 2)}, r"got tuple \(1, 2\)"),
        ({"a": {"b": [{2: 3}]}}, "state 'a': .*got int 2"),
        ({"a": np.float64(1)}, "got float64 "),
        ({"a": np.array(["b"])}, "got a numpy array <U1"),
        ({"a": np.array([None])}, "got a numpy array object"),
    ],
)
def test_a_state_that_no_checkpoint_could_hold_is_named(value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        states_of(value)


def test_what_a_stage_writes_later_is_checked_after_each_step(tmp_path: Path) -> None:
    algorithm = replace(tiny(ttrl(), votes=2), select=Largest())
    trainer = make_trainer(tiny_run(tmp_path, algorithm, prompts_per_step=1))
    state = trainer.states.select
    assert state is not None
    state["seen"] = {1}
    with pytest.raises(ValueError, match=r"select: state 'seen': expected .* got set \{1\}"):
        stepped(trainer)
    trainer.close()


def test_states_come_back_with_types_and_bits(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    array = np.array([[0.1, np.nan, -0.0], [np.inf, 1e-45, 3]], np.float32).T  # not in C order
    value = {"x": array, "scalar": np.array(7, np.uint8), "none": np.zeros((0, 3)), "on": True}
    plain = {"a.b": [1, 2.5, None, {"c": "é"}], "holds_2.x": 1, "nan": float("nan")}
    states, again = states_of(value, plain), states_of(value, {})
    save_file(states.arrays(), tmp_path / "arrays")
    again.load_state_dict(states.state_dict(), load_file(tmp_path / "arrays"))
    one, two = again.advantage
    assert one is not None
    assert two == plain | {"nan": two["nan"]}
    for name in ("x", "scalar", "none"):
        assert one[name].dtype == value[name].dtype
        assert one[name].shape == value[name].shape
        assert one[name].tobytes() == value[name].tobytes()
    with pytest.raises(ValueError, match="expected those of no choice, the checkpoint has those"):
        States(ttrl()).load_state_dict(states.state_dict(), {})


def test_a_stage_of_which_there_are_two_has_two_states() -> None:
    stages = Registry((str(PLUGIN),)).make("advantage", "grpo,drift,drift")
    first, second, third = States(replace(ttrl(), advantage=stages)).advantage
    assert first is None
    assert second is not None
    assert second is not third
