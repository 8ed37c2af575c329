"""Reward functions as TRL and verl call them, and every way in which one can fail: a sentence."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from leaf_records import Question, leaves_of
from numpy.typing import NDArray

from pyrl.answers import Exact, Whole, classify
from pyrl.foreign import Foreign, ForeignError
from pyrl.reward import FunctionReward, check_answers
from pyrl.vote import Majority

TEXT_N = ["13", "31", "13"]
GROUP_N = [0, 0, 1]
CHAT = [{"role": "user", "content": "Sort 31"}]
PLAIN = [
    Question(index=0, text="31=", answer="13", columns={"level": 2}, truth={"solution": 13}),
    Question(index=1, text="2=", answer="2", truth={"solution": 2}),
]


def made(folder: Path, source: str, **options: Any) -> FunctionReward:
    path = folder / "rewards.py"
    path.write_text(source)
    return FunctionReward(f"{path}:f", **options)


def call(reward: FunctionReward, prompts: list[Question] = PLAIN) -> NDArray[np.float64]:
    leaves = leaves_of(TEXT_N, group_N=GROUP_N)
    answers = classify(leaves, Whole(), Exact())
    check_answers(reward, prompts, "q.jsonl")
    return reward(leaves, answers, Majority()(leaves, answers), prompts)


# -- signatures


@pytest.mark.parametrize(
    "head",
    [
        "def f(prompts, completions, completion_ids, **columns):",
        "def f(completion_ids, completions, prompts):",
        "def f(completions, completion_ids, prompts, level, log_metric=None, trainer_state=None):",
        "async def f(prompts, completions, completion_ids, **kwargs):",
        "class F:\n  def __call__(self, prompts, completions, completion_ids):",
    ],
)
def test_trl_s_functions_get_what_they_have_parameters_for(tmp_path: Path, head: str) -> None:
    body = (
        "\n    assert prompts == ['31=', '31=', '2=']"
        "\n    assert [''.join(map(chr, c)) for c in completion_ids] == completions"
        "\n    return [float(c) for c in completions]\n"
    )
    source = head + body + ("f = F()\n" if head.startswith("class") else "")
    assert call(made(tmp_path, source)).tolist() == [13, 31, 13]


def test_a_column_that_no_question_of_a_step_has_is_none(tmp_path: Path) -> None:
    reward = made(tmp_path, "def f(completions, level): return [float(x is None) for x in level]\n")
    assert call(reward).tolist() == [0, 0, 1]
    leaves = leaves_of(["2"])
    answers = classify(leaves, Whole(), Exact())
    reward_N = reward(leaves, answers, Majority()(leaves, answers), PLAIN[1:])
    assert reward_N.tolist() == [1]


def test_chat_data_gives_messages(tmp_path: Path) -> None:
    source = (
        "def f(prompts, completions, **columns):\n"
        "    assert prompts[2] == '2='\n"
        "    prompts[0][0]['content'] = 'changed'\n"
        "    return [float(c[0]['content']) if isinstance(c, list) else 0. for c in completions]\n"
    )
    prompts = [Question(text="Sort 31", messages=CHAT), PLAIN[1]]
    assert call(made(tmp_path, source), prompts).tolist() == [13, 31, 0]
    assert CHAT[0]["content"] == "Sort 31"


def test_true_answers_go_by_the_names_of_their_columns_too(tmp_path: Path) -> None:
    source = (
        "def f(completions, answer, solution):\n"
        "    return [float(c == a and int(c) == s)"
        " for c, a, s in zip(completions, answer, solution)]\n"
    )
    assert call(made(tmp_path, source, pass_answers=True)).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match=r"got \(completions, answer, solution\); true answers ar"):
        call(made(tmp_path, source))
    kept = made(tmp_path, "def f(completions, **columns):\n    assert 'solution' not in columns\n")
    with pytest.raises(ValueError, match="expected a list of numbers, got NoneType"):
        call(kept)


@pytest.mark.parametrize("result", ["score", "{'score': score, 'format': 1}"])
def test_verl_s_function_is_called_for_each_response(tmp_path: Path, result: str) -> None:
    source = (
        "def f(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    assert data_source in ('sort', '') and not kwargs\n"
        "    assert extra_info in ({'split': 'train'}, {})\n"
        f"    score = float(solution_str == ground_truth)\n    return {result}\n"
    )
    truth = {"reward_model": {"ground_truth": "31"}, "ground_truth": "31"}
    columns = {"data_source": "sort", "extra_info": {"split": "train"}}
    prompts = [Question(answer="31", truth=truth, columns=columns), Question(answer="13")]
    assert call(made(tmp_path, source, pass_answers=True), prompts).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"rewards.py:f: its parameter ground_truth is the true"):
        call(made(tmp_path, source), prompts)


def test_a_truth_that_is_no_text_is_a_truth_for_a_function(tmp_path: Path) -> None:
    source = "def f(solution_str, ground_truth): return solution_str in ground_truth['target']\n"
    prompts = [Question(truth={"ground_truth": {"target": ["31"]}})] * 2
    assert call(made(tmp_path, source, pass_answers=True), prompts).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "head",
    [
        "def f(x, y):",
        "def f():",
        "def f(completions, levels):",
        "def f(completions, /):",
        "f = lambda *completions:",
        "def f(prompts):",
        "def f(data_source, solution_str, ground_truth, extra_info, weight):",
    ],
)
def test_another_signature_is_refused_before_the_run(tmp_path: Path, head: str) -> None:
    reward = made(tmp_path, f"{head} 1\n", pass_answers=True)
    with pytest.raises(
        ValueError, match=r"rewards.py:f: expected parameters by name among .*, got"
    ):
        check_answers(reward, PLAIN, "q.jsonl")


# -- failures


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(completions:\n", r"raised SyntaxError: .*rewards.py, line 1"),
        (
            "import no_such_package\n",
            r"raised ModuleNotFoundError in line 1: No module named 'no_s",
        ),
        ("\nraise SystemExit(3)\n", r"raised SystemExit in line 2: 3"),
        ("1 / 0\n", r"raised ZeroDivisionError in line 1: division by zero"),
        ("def g(completions): ...\n", r"has no function f"),
        ("\0", r"raised \w+: source code .*null bytes"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        made(tmp_path, source)
    assert "rewards.py:f" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "np.ones((3, 1))",
            r"expected 3 values, one per completion, got an array of shape \(3, 1\)",
        ),
        ("torch.ones(3, 2)", r"got an array of shape \(3, 2\)"),
        ("[[1.0]] * 3", r"expected a finite number or None, got \[1.0\] for completion 0"),
        ("[np.ones(1)] * 3", r"expected a finite number or None, got array"),
        ("[10**400] * 3", r"finite number or None, got 10{79}\.\.\. for completion 0"),
        ("[0.0, 1e300, 0.0]", r"finite number or None, got 1e\+300 for completion 1"),
        ("np.float64(1)", r"expected a list of numbers, got float64"),
        ("b'abc'", r"expected a list of numbers, got bytes"),
        ("{1, 2, 3}", r"expected a list of numbers, got set"),
        ("(1 for c in completions)", r"expected a list of numbers, got generator"),
        ("['1'] * 3", r"expected a finite number or None, got '1' for completion 0"),
        ("[1j] * 3", r"expected a finite number or None, got 1j for completion 0"),
        ("completions[7]", r"raised IndexError in line 2: list index out of range"),
        ("exit(0)", r"raised SystemExit in line 2: 0"),
        ("(_ for _ in ()).throw(OSError('a\\nb'))", r"raised OSError in line 2: a b$"),
    ],
)
def test_what_a_function_gives_or_raises_is_one_sentence(
    tmp_path: Path, body: str, message: str
) -> None:
    source = f"import numpy as np, torch\ndef f(completions, **columns): return {body}\n"
    with pytest.raises(ValueError, match=message) as caught:
        call(made(tmp_path, source))
    assert "rewards.py:f" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body", ["torch.ones(3)", "np.ones(3, np.float16)", "[True] * 3", "[torch.tensor(1)] * 3"]
)
def test_arrays_of_any_library_are_numbers(tmp_path: Path, body: str) -> None:
    source = f"import numpy as np, torch\ndef f(completions): return {body}\n"
    assert call(made(tmp_path, source)).tolist() == [1, 1, 1]


def test_what_a_function_changes_for_torch_and_the_process_is_put_back(tmp_path: Path) -> None:
    source = (
        "import os, torch\ndef f(completions):\n    torch.set_grad_enabled(False)\n"
        "    torch.set_default_dtype(torch.float64)\n    os.chdir('/')\n    return [1, 2, 3]\n"
    )
    folder = Path.cwd()
    assert call(made(tmp_path, source)).tolist() == [1, 2, 3]
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert Path.cwd() == folder


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "time.sleep(60)",
        "threading.Lock().acquire() and threading.Event().wait(60)",
        "subprocess.run(['sleep', '60'])",
        "while True:\n        try: time.sleep(60)\n        except Exception: pass",
        "re.match('(a+)+b', 'a' * 40)",
    ],
)
def test_a_function_that_hangs_is_named(tmp_path: Path, body: str) -> None:
    source = f"import re, subprocess, threading, time\ndef f(completions):\n    {body}\n"
    before, begun = signal.getsignal(signal.SIGVTALRM), time.monotonic()
    with pytest.raises(ForeignError, match=r"rewards.py:f: expected an end within 0.2 s \(--call"):
        call(made(tmp_path, source, time_limit=0.2))
    assert time.monotonic() - begun < 5
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_a_file_that_hangs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ForeignError, match=r"still running in line 2"):
        made(tmp_path, "import time\ntime.sleep(60)\n", time_limit=0.2)


def test_a_function_may_set_alarms_and_is_watched_still(tmp_path: Path) -> None:
    """As math-verify does for each comparison."""
    source = (
        "import signal, time\ndef f(completions):\n"
        "    signal.signal(signal.SIGALRM, signal.SIG_IGN)\n    signal.alarm(9)\n"
        "    signal.alarm(0)\n    time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ForeignError, match=r"expected an end within 0\.2 s"):
        call(made(tmp_path, source, time_limit=0.2))
    signal.signal(signal.SIGALRM, before)


def test_an_interrupt_at_the_edge_of_a_call_does_not_outlive_it() -> None:
    """Calls that take about their limit: the signal comes on the way in, inside, on the way out."""
    random = np.random.default_rng(0)
    ends = {"in time": 0, "late": 0}
    for _ in range(300):
        seconds = random.uniform(1e-3, 1e-2)
        try:
            with Foreign("it", seconds):
                end = time.monotonic() + seconds * random.uniform(0, 3)
                while time.monotonic() < end:
                    pass
            ends["in time"] += 1
        except ForeignError:
            ends["late"] += 1
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert min(ends.values()) > 0, ends


def test_calls_in_other_threads_work_without_a_limit() -> None:
    caught: list[str] = []

    def work() -> None:
        try:
            with Foreign("it", 0.01):
                time.sleep(0.1)
                raise KeyError("x")
        except ForeignError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == ["it raised KeyError: 'x'"]


def test_ctrl_c_in_a_function_is_ctrl_c(tmp_path: Path) -> None:
    source = "import os, signal\ndef f(completions): os.kill(os.getpid(), signal.SIGINT)\n"
    with pytest.raises(KeyboardInterrupt):
        call(made(tmp_path, source))


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_time_limit_is_a_number_of_seconds(tmp_path: Path, limit: float) -> None:
    with pytest.raises(ValueError, match="time_limit: expected seconds > 0, got"):
        made(tmp_path, "def f(completions): ...\n", time_limit=limit)
