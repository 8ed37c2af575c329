from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leaf_records import Question, leaves_of
from numpy.typing import NDArray

from pyrl.answers import Answers, Equivalence, Exact, MathEquivalence, Whole, classify
from pyrl.foreign import ForeignError
from pyrl.leaves import Leaves
from pyrl.report.step import label_metrics, vote_metrics
from pyrl.reward import (
    FunctionReward,
    LengthReward,
    OverlongReward,
    RandomReward,
    Reward,
    TrueReward,
    VoteReward,
    check_answers,
    rewards,
)
from pyrl.vote import Majority, Votes

TEXT_N = ["a", "b", "a", "", "c", "d", "", ""]
GROUP_N = [0, 0, 0, 0, 1, 1, 2, 2]


class Unsure:
    """An equivalence whose verifier fails on "d"."""

    unknown = 0

    def classes(self, answer_N: Sequence[str | None]) -> NDArray[np.int64]:
        return Exact().classes(answer_N)

    def same(self, a: str, b: str) -> bool | None:
        return None if "d" in a + b else a == b

    def close(self) -> None: ...


def step(
    tie: str = "first", equivalence: Equivalence | None = None
) -> tuple[Leaves, Answers, Votes]:
    leaves = leaves_of(TEXT_N, group_N=GROUP_N)
    answers = classify(leaves, Whole(), equivalence or Exact())
    return leaves, answers, Majority(tie=tie)(leaves, answers)


def questions(*answers: str | None) -> list[Question]:
    return [Question(index=i, text=f"q{i}", answer=answer) for i, answer in enumerate(answers)]


UNLABELLED = questions(None, None, None)


def test_the_reward_is_one_for_the_class_of_the_label() -> None:
    reward_N = VoteReward()(*step(), UNLABELLED)
    assert reward_N.tolist() == [1, 0, 1, 0, 1, 0, 0, 0]
    assert reward_N.dtype == np.float64


def test_a_prompt_without_a_label_rewards_nobody() -> None:
    assert VoteReward()(*step(tie="skip"), UNLABELLED).tolist() == [1, 0, 1, 0, 0, 0, 0, 0]


def test_no_answer_can_have_its_own_reward_or_be_unknown() -> None:
    reward_N = VoteReward(no_answer=-0.5)(*step(), UNLABELLED)
    assert reward_N.tolist() == [1, 0, 1, -0.5, 1, 0, -0.5, -0.5]
    unknown_N = np.isnan(VoteReward(no_answer=None)(*step(), UNLABELLED))
    assert np.flatnonzero(unknown_N).tolist() == [3, 6, 7]


def test_an_answer_that_nobody_could_compare_with_the_label_is_unknown() -> None:
    """In group 1 "c" is the label, and the verifier fails on "d"."""
    leaves, answers, votes = step(equivalence=Unsure())
    asked = replace(answers, unknown=1)
    expected = [1, 0, 1, 0, 1, math.nan, 0, 0]
    np.testing.assert_array_equal(VoteReward()(leaves, asked, votes, UNLABELLED), expected)
    assert VoteReward()(leaves, answers, votes, UNLABELLED).tolist() == [1, 0, 1, 0, 1, 0, 0, 0]


def test_a_supervised_reward_needs_questions_with_answers(functions: str) -> None:
    given = FunctionReward(f"{functions}:truth", pass_answers=True)
    for reward in (TrueReward(), given):
        with pytest.raises(ValueError, match=r"q\.jsonl: expected questions with true answers"):
            check_answers(reward, UNLABELLED, "q.jsonl")
        check_answers(reward, questions(None, "1"), "q.jsonl")
    for reward in (VoteReward(), FunctionReward(f"{functions}:echo")):
        check_answers(reward, UNLABELLED, "q.jsonl")


def test_true_answers_change_neither_the_votes_nor_the_rewards_of_a_vote() -> None:
    class Forbidden(Question):
        def __getattribute__(self, name: str) -> object:
            if name == "answer":
                raise AssertionError("a true answer was read")
            return super().__getattribute__(name)

    hidden = [Forbidden(index=i, text=f"q{i}") for i in range(3)]
    expected = VoteReward()(*step(), questions("b", "d", "z")).tolist()
    assert VoteReward()(*step(), hidden).tolist() == expected
    assert RandomReward()(*step(), hidden).tolist() == RandomReward()(*step(), UNLABELLED).tolist()
    with pytest.raises(AssertionError, match="true answer was read"):
        TrueReward()(*step(), hidden)


def test_the_true_reward_grades_and_is_unknown_without_truth_or_verdict() -> None:
    reward_N = TrueReward()(*step(equivalence=Unsure()), questions("b", "c", None))
    np.testing.assert_array_equal(reward_N, [0, 1, 0, 0, 1, math.nan, math.nan, math.nan])
    signs = TrueReward(wrong=-1.0)
    reward_N = signs(*step(equivalence=Unsure()), questions("b", "c", None))
    np.testing.assert_array_equal(reward_N, [-1, 1, -1, -1, 1, math.nan, math.nan, math.nan])
    assert signs.values == {-1.0, 1.0}


def test_a_good_length_earns_a_part_of_its_own() -> None:
    """The trapezoid of 100, 200, 600 and 900 of 1,000 tokens at 150, 400 and 750."""
    leaves = leaves_of(["x" * n for n in (150, 400, 750, 950, 50)], limit=1000)
    answers = classify(leaves, Whole(), Exact())
    asked = leaves, answers, Majority()(leaves, answers), questions("x" * 150)
    reward = LengthReward(rise=(0.1, 0.2), fall=(0.6, 0.9), weight=0.2)
    np.testing.assert_allclose(reward(*asked), [1.1, 0.2, 0.1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(reward.metrics(*asked[:3])["reward/length"], 0.4 / 5)
    assert replace(reward, weight=0.0)(*asked).tolist() == TrueReward()(*asked).tolist()
    with pytest.raises(ValueError, match="LengthReward: expected 0 <= rise < rise <= fall < fall"):
        LengthReward(rise=(0.5, 0.2))


def test_overlong_answers_are_punished_as_in_dapo() -> None:
    """Section 3.4 of arXiv:2503.14476 at a thousandth: the last 4 of 20 tokens."""
    leaves = leaves_of(["x" * n for n in (1, 16, 17, 18, 20)], limit=20)
    answers = classify(leaves, Whole(), Exact())
    asked = leaves, answers, Majority()(leaves, answers), questions("x" * 18)
    reward = OverlongReward(wrong=-1.0)
    np.testing.assert_allclose(reward(*asked), [-1, -1, -1.25, 0.5, -2], atol=1e-12)
    np.testing.assert_allclose(reward.metrics(*asked[:3])["reward/overlong"], 1.75 / 5)
    assert replace(reward, penalty=0)(*asked).tolist() == TrueReward(wrong=-1.0)(*asked).tolist()
    assert min(reward.values) == -2
    with pytest.raises(ValueError, match=r"Leaves\.limit: expected >= 1, got 0"):
        reward(replace(leaves, limit=0), *asked[1:])
    with pytest.raises(
        ValueError, match=r"OverlongReward\.buffer: expected a share above 0, got 0"
    ):
        OverlongReward(buffer=0)


# -- functions


FUNCTIONS = """
calls = []
def score(prompts, completions, level, **columns):
    assert set(columns) <= {"completion_ids"}, columns
    return [None if not c else len(c) + l for c, l in zip(completions, level)]
def truth(prompts, completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer)]
def echo(prompts, completions, **columns): return prompts
def short(prompts, completions, **columns): return [1.0]
def one(prompts, completions, **columns): return 1.0
def infinite(prompts, completions, **columns): return [float("inf")] * len(prompts)
def broken(prompts, completions, **columns): return {}["missing"]
constant = 3
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return str(path)


def with_columns(**columns: object) -> list[Question]:
    return [Question(index=i, text=f"q{i}", answer="a", columns=columns) for i in range(3)]


def test_a_function_sees_one_entry_per_leaf_and_none_is_unknown(functions: str) -> None:
    prompts = [Question(text=f"q{i}", answer="a", columns={"level": 10 * i}) for i in range(3)]
    reward_N = FunctionReward(f"{functions}:score")(*step(), prompts)
    np.testing.assert_array_equal(reward_N, [1, 1, 1, math.nan, 11, 11, math.nan, math.nan])


def test_a_function_sees_the_true_answers_only_if_asked_to(functions: str) -> None:
    reward_N = FunctionReward(f"{functions}:truth", pass_answers=True)(*step(), with_columns())
    assert reward_N.tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"\(prompts, completions, answer, \*\*columns\); true"):
        check_answers(FunctionReward(f"{functions}:truth"), with_columns(), "q.jsonl")


def test_a_function_can_come_from_a_module(functions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(functions).parent))
    reward = FunctionReward("my_rewards:score")
    assert reward(*step(), with_columns(level=1))[0] == 2
    sys.modules.pop("my_rewards")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("score", "expected module:function or file.py:function"),
        (":score", "expected module:function or file.py:function"),
        ("missing.py:score", "there is no file missing.py"),
        ("no_such_package.rewards:score", "ModuleNotFoundError: No module named 'no_such_packag"),
        ("math:no_such_function", "math has no function no_such_function"),
    ],
)
def test_a_function_that_does_not_exist_is_an_error_at_once(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionReward(path)


def test_a_name_that_is_no_function_is_an_error(functions: str) -> None:
    with pytest.raises(ValueError, match="has no function constant"):
        FunctionReward(f"{functions}:constant")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"my_rewards.py:short: expected 8 values, one per completion, got 1"),
        ("one", r"my_rewards.py:one: expected a list of numbers, got float"),
        ("infinite", r"expected a finite number or None, got inf for completion 0"),
        ("echo", r"expected a finite number or None, got 'q0' for completion 0"),
    ],
)
def test_what_a_function_returns_is_checked(functions: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionReward(f"{functions}:{name}")(*step(), UNLABELLED)


def test_an_exception_of_a_function_names_it(functions: str) -> None:
    with pytest.raises(ForeignError) as caught:
        FunctionReward(f"{functions}:broken")(*step(), UNLABELLED)
    assert str(caught.value) == f"reward {functions}:broken raised KeyError in line 12: 'missing'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_column_may_not_hide_the_prompts(functions: str) -> None:
    with pytest.raises(ValueError, match="column completions is reserved"):
        FunctionReward(f"{functions}:score")(*step(), with_columns(level=1, completions="x"))


# -- control


def test_random_rewards_have_the_right_rate_and_depend_on_seed_and_texts_only() -> None:
    texts = [str(i) for i in range(4000)]
    leaves = leaves_of(texts)
    answers = classify(leaves, Whole(), Exact())
    votes = Majority()(leaves, answers)

    def draw(reward: Reward, leaves: Leaves = leaves) -> NDArray[np.float64]:
        return reward(leaves, answers, votes, UNLABELLED)

    first = draw(RandomReward(p=0.3, seed=1))
    assert set(first) == {0.0, 1.0}
    assert abs(first.mean() - 0.3) < 0.03
    assert (first == draw(RandomReward(p=0.3, seed=1))).all()
    assert 0.3 < (first != draw(RandomReward(p=0.3, seed=2))).mean() < 0.54
    later = leaves_of([*texts[:-1], "another"])
    assert 0.3 < (first != draw(RandomReward(p=0.3, seed=1), later)).mean() < 0.54
    with pytest.raises(ValueError, match=r"p: expected a probability, got 1.5"):
        RandomReward(p=1.5)


# -- metrics


def test_label_metrics_are_means_over_prompts() -> None:
    leaves, answers, votes = step()
    reward_N = VoteReward()(leaves, answers, votes, UNLABELLED)
    metrics = label_metrics(leaves, answers, votes, reward_N, questions("a", "d", "z"))
    assert metrics == {
        "vote/majority_ratio": pytest.approx((0.5 + 0.5 + 0) / 3),
        "vote/answered": pytest.approx((0.75 + 1 + 0) / 3),
        "vote/majority_voting_reward": pytest.approx((0.5 + 0.5 + 0) / 3),
        "vote/label_accuracy": pytest.approx(1 / 3),
        "vote/reward_accuracy": pytest.approx((1 + 0 + 1) / 3),
        "vote/ground_truth_reward": pytest.approx((0.5 + 0.5 + 0) / 3),
        "vote/pass_any": pytest.approx(2 / 3),
    }


def test_metrics_without_truth_are_those_of_the_vote_alone() -> None:
    leaves, answers, votes = step()
    reward_N = VoteReward()(leaves, answers, votes, UNLABELLED)
    metrics = label_metrics(leaves, answers, votes, reward_N, UNLABELLED, prefix="vote/post_")
    names = ("majority_ratio", "answered", "majority_voting_reward")
    assert set(metrics) == {f"vote/post_{name}" for name in names}


def test_what_a_verifier_leaves_unknown_is_left_out_of_the_metrics() -> None:
    leaves, answers, votes = step()
    reward_N = VoteReward(no_answer=None)(leaves, answers, votes, UNLABELLED)
    metrics = label_metrics(
        leaves, replace(answers, equivalence=Unsure()), votes, reward_N, questions("a", "c", "d")
    )
    assert metrics["vote/label_accuracy"] == pytest.approx((1 + 1 + 0) / 3)
    assert metrics["vote/reward_accuracy"] == 1
    assert metrics["vote/ground_truth_reward"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert metrics["vote/pass_any"] == pytest.approx(2 / 3)


def test_a_wrong_label_still_rewards_most_wrong_answers_rightly() -> None:
    """The closed form: 1 minus the shares of the label and of the truth."""
    texts = ["w"] * 4 + ["t"] * 2 + [f"x{i}" for i in range(14)]
    leaves = leaves_of(texts)
    answers = classify(leaves, Whole(), Exact())
    votes = Majority()(leaves, answers)
    reward_N = VoteReward()(leaves, answers, votes, questions("t"))
    metrics = label_metrics(leaves, answers, votes, reward_N, questions("t"))
    assert metrics["vote/label_accuracy"] == 0
    assert metrics["vote/reward_accuracy"] == pytest.approx(1 - 4 / 20 - 2 / 20)


def test_vote_metrics_describe_the_votes_without_the_truth() -> None:
    texts = ["1", "1.0", "1/1", "", "2", "4/4", "", "3", "1", "3"]
    leaves = leaves_of(texts, group_N=[0, 0, 0, 0, 1, 1, 2, 3, 3, 3], groups=5)
    with MathEquivalence() as equivalence:
        answers = classify(leaves, Whole(), equivalence)
        votes = Majority()(leaves, answers)
        metrics = vote_metrics(leaves, answers, votes)
    assert votes.label_G == ("1", "2", None, "3", None)
    assert metrics["vote/majority_ratio_min"] == 0
    assert metrics["vote/margin"] == pytest.approx((0.75 + 0 + 0 + 1 / 3) / 4)
    assert metrics["vote/distinct_labels"] == 1
    assert metrics["vote/unknown"] == 0
    assert math.isnan(metrics["vote/icc"])
    one_label = Votes(**(vars(votes) | {"label_G": ("1", "2/2", None, "3", None)}))
    distinct = vote_metrics(leaves, answers, one_label)["vote/distinct_labels"]
    assert distinct == pytest.approx(2 / 3)


def test_a_step_in_which_nothing_could_be_read_is_not_usable() -> None:
    for texts, usable in [(["", ""], False), (["", "a"], True)]:
        leaves = leaves_of(texts)
        answers = classify(leaves, Whole(), Exact())
        votes = Majority()(leaves, answers)
        for reward in (VoteReward(), TrueReward()):
            reward_N = reward(leaves, answers, votes, questions("a"))
            assert reward.usable(answers, votes, reward_N) is usable
        assert RandomReward().usable(answers, votes, np.array([1.0, 0.0]))
    unknown_N = TrueReward()(leaves, answers, votes, questions(None))
    assert not TrueReward().usable(answers, votes, unknown_N)
    assert not FunctionReward("math:fsum").usable(answers, votes, np.full(2, np.nan))
    assert FunctionReward("math:fsum").usable(answers, votes, np.array([math.nan, 0.0]))


def test_a_reward_function_of_a_file_survives_a_pickle(tmp_path: Path) -> None:
    source = tmp_path / "rewards.py"
    source.write_text("def length(prompts, completions): return [len(c) for c in completions]\n")
    reward = FunctionReward(f"{source}:length")
    again = pickle.loads(pickle.dumps(reward))
    assert again == reward
    assert again.function(prompts=["p"], completions=["four"]) == [4]


@dataclass(frozen=True)
class Given(VoteReward):
    """Returns what it is made from."""

    value: Any = None

    def __call__(self, leaves: Any, answers: Any, votes: Any, prompts: Any) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (np.zeros(2), r"got a numpy array float64\[2\]"),
        ([0.0, 1.0, 2.0], r"got list \[0.0, 1.0, 2.0\]"),
        (np.array([0, -np.inf, 1]), "got -inf for leaf 1"),
    ],
)
def test_a_reward_that_is_no_number_for_each_leaf_is_named(value: Any, got: str) -> None:
    leaves = leaves_of(["1", "2", "3"])
    answers = classify(leaves, Whole(), Exact())
    says = f"reward: Given: expected a finite number, or NaN, for each of 3 leaves, {got}"
    with pytest.raises(ValueError, match=says):
        rewards(Given(value=value), leaves, answers, Majority()(leaves, answers), [Question()])
