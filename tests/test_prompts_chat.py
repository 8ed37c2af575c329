"""Questions as chat messages, under any column, and what a chat template may do with them."""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_run import quiet, tiny_run
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from pyrl.demo.task import build_tokenizer
from pyrl.evaluate import EvalSettings, evaluate_model
from pyrl.foreign import ForeignError
from pyrl.models import load_model
from pyrl.prompts import DataError, Prompt, load_prompts
from pyrl.run.parsing import load_run, save_run
from pyrl.run.setup import assemble

CHAT = (
    "{% for m in messages %}|{% if m.role == 'system' %}a{% endif %}{{ m.content }}{% endfor %}"
    "{% if digits is defined %}{{ digits }}{% endif %}{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[Prompt]:
    return load_prompts(source, tokenizer, **{"max_tokens": 64, **options})


def spell(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(prompt.tokens))


def refuse(source: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    with pytest.raises((DataError, ForeignError)) as caught:
        read(source, tokenizer, **options)
    return str(caught.value)


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


# -- columns


@pytest.mark.parametrize("question", ["Question", "PROMPT", "problem", "messages"])
@pytest.mark.parametrize("answer", ["Answer", "SOLUTION", "Ground_Truth"])
def test_columns_are_found_in_any_case(tmp_path, tokenizer, question, answer):
    asked = turns(("user", "31=")) if question == "messages" else "31="
    path = write(tmp_path / "q.jsonl", {question: asked, answer: 13, "Level": 2})
    (prompt,) = read(path, tokenizer)
    assert (prompt.text, prompt.answer, prompt.columns) == ("31=", "13", {"Level": 2})
    assert prompt.truth == {answer: 13}


def test_columns_can_be_named(tmp_path, tokenizer):
    row = {"prompt": "9=", "input": "31=", "answer": "no", "final": 13}
    path = write(tmp_path / "q.jsonl", row, {"input": "2="})
    first, second = read(path, tokenizer, prompt_column="input", answer_column="final")
    assert (first.text, first.answer, first.columns) == ("31=", "13", {"prompt": "9="})
    assert first.truth == {"final": 13, "answer": "no"}
    assert (second.answer, second.truth) == (None, {})


def test_a_named_column_that_is_not_there_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": "31=", "answer": 13, "n": 1})
    message = "no prompt: expected a column input; the columns are: prompt, answer, n"
    assert refuse(path, tokenizer, prompt_column="input") == f"{path}, line 1: {message}"
    message = "expected answers in a column final; the columns beside the prompt are: n"
    assert refuse(path, tokenizer, answer_column="final") == f"{path}: {message}"


def test_the_answer_of_a_reward_model_is_kept_as_it_is(tmp_path, tokenizer):
    truth = {"style": "rule", "ground_truth": {"target": ["13"]}}
    (prompt,) = read(
        write(tmp_path / "q.jsonl", {"prompt": "31=", "reward_model": truth}), tokenizer
    )
    assert (prompt.answer, prompt.columns) == (None, {})
    assert prompt.truth == {"reward_model": truth, "ground_truth": {"target": ["13"]}}


# -- messages


def test_messages_whose_content_is_parts_are_text(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "3"}, {"type": "text", "text": "1="}]
    rows = [{"messages": turns(("system", "5"), ("user", parts))}]
    datasets.Dataset.from_list([{"messages": turns(("user", parts))}]).to_parquet(
        str(tmp_path / "q.parquet")
    )
    (prompt,) = read(write(tmp_path / "q.jsonl", *rows), tokenizer)
    assert (prompt.text, spell(prompt, tokenizer)) == ("31=", "|a5|31=:")
    assert prompt.messages == turns(("system", "5"), ("user", "31="))
    (prompt,) = read(str(tmp_path / "q.parquet"), tokenizer)
    assert prompt.messages == turns(("user", "31="))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            turns(("user", "31="), ("assistant", "13")),
            "for the assistant to answer, got one by the",
        ),
        (turns(("system", "31=")), "expected a message by the user, got the roles system"),
        (turns(("user", [{"type": "image", "url": "x"}])), "got a part of type 'image'"),
        (turns(("user", ["31="])), "got a part of type 'str'"),
        (turns(("user", None)), "expected a string or a list of chat messages"),
        ([], "expected a string or a list of chat messages"),
        (turns(("user", " ")), "the prompt is empty"),
    ],
)
def test_messages_that_no_assistant_could_answer_are_refused(
    tmp_path, tokenizer, messages, message
):
    path = write(tmp_path / "q.jsonl", {"prompt": messages})
    said = refuse(path, tokenizer)
    assert said.startswith(f"{path}, line 1: ")
    assert message in said


def test_prefix_and_suffix_are_put_around_what_the_user_said_last(tmp_path, tokenizer):
    asked = turns(("user", "2="), ("assistant", "2"), ("user", "31"), ("tool", "7"))
    (prompt,) = read(write(tmp_path / "q.jsonl", {"prompt": asked}), tokenizer, suffix="=")
    assert (prompt.text, spell(prompt, tokenizer)) == ("31", "|2=|2|31=|7:")
    assert prompt.messages == asked


# -- the template


def test_a_system_message_comes_first(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": "31="}, {"prompt": turns(("user", "2="))})
    prompts = read(path, tokenizer, system="5")
    assert [spell(prompt, tokenizer) for prompt in prompts] == ["|a5|31=:", "|a5|2=:"]
    path = write(tmp_path / "q.jsonl", {"prompt": turns(("system", "6"), ("user", "2="))})
    assert "expected chat messages without a system message" in refuse(path, tokenizer, system="5")
    assert "expected a chat template in use" in refuse(path, tokenizer, system="5", chat=False)


def test_arguments_reach_the_template_and_a_misspelt_one_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": "31="})
    (prompt,) = read(path, tokenizer, chat_arguments=["digits=77"])
    assert spell(prompt, tokenizer) == "|31=77:"
    tokenizer.chat_template = CHAT + "{% if enable_thinking is false %};{% endif %}"
    for value, end in (("False", ";"), ("false", ";"), ("True", "")):
        (prompt,) = read(path, tokenizer, chat_arguments=[f"enable_thinking={value}"])
        assert spell(prompt, tokenizer) == f"|31=:{end}"
    for given in ("enable_thinkin=False", "messages=5", "add_generation_prompt=False"):
        message = "expected a variable that the tokenizer's chat template reads"
        assert message in refuse(path, tokenizer, chat_arguments=[given])
    assert "expected NAME=VALUE, got 'digits'" in refuse(path, tokenizer, chat_arguments=["digits"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% import 'os' as os %}{{ os }}", "raised TypeError: no loader"),
        ("{% for %}", "raised TemplateSyntaxError: Expected"),
        ("{{ 1 / 0 }}", "raised ZeroDivisionError: division by zero"),
        ("{{ messages[0].content.parts[3] }}", "raised UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "raised SecurityError"),
        ("|:", "leaves out or changes the question '31='; it gives '|:'"),
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", "leaves out or changes"),
    ],
)
def test_a_template_that_fails_is_one_sentence(tmp_path, tokenizer, template, message):
    tokenizer.chat_template = template
    path = write(tmp_path / "q.jsonl", {"prompt": "31="})
    said = refuse(path, tokenizer)
    assert said.startswith(f"{path}, line 1: the tokenizer's chat template ")
    assert message in said
    assert "\n" not in said


def test_a_template_that_never_ends_is_ended(tmp_path, tokenizer):
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = CHAT + loops
    path = write(tmp_path / "q.jsonl", {"prompt": "31="})
    begun = time.monotonic()
    assert refuse(path, tokenizer, time_limit=0.2) == (
        f"{path}, line 1: the tokenizer's chat template: expected an end within 0.2 s "
        "(--call-time-limit), but it was still running"
    )
    assert time.monotonic() - begun < 5


# -- the tokenizer


def test_an_end_token_that_the_tokenizer_appends_is_left_out_and_said_once(
    tmp_path, tokenizer, caplog
):
    tokenizer.chat_template = None
    end = ("<end>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A <end>", special_tokens=[end]
    )
    path = write(tmp_path / "q.jsonl", {"prompt": "31="}, {"prompt": "2="}, {"prompt": "2<end>"})
    with caplog.at_level(logging.WARNING):
        prompts = read(path, tokenizer)
    assert [spell(p, tokenizer) for p in prompts] == ["<end>31=", "<end>2=", "<end>2<end>"]
    (said,) = caplog.messages
    assert "the tokenizer ends each text with <end>; the questions are read without" in said


# -- settings


def test_a_run_and_an_evaluation_pass_their_options_on(tmp_path):
    data = write(tmp_path / "questions.jsonl", {"input": "31=", "final": "13"})
    named = {"prompt_column": "input", "answer_column": "final"}
    (prompt,) = assemble(tiny_run(tmp_path, **named)).prompts
    assert (prompt.text, prompt.answer) == ("31=", "13")
    settings = EvalSettings("demo", data, samples=1, low_temperature=0, max_tokens=3, **named)
    assert evaluate_model(settings, quiet()).questions == 1
    for more in ({"system": "5"}, {"chat_arguments": ("a=1",)}):
        (name,) = more
        message = f"{data}: {name}: expected a chat template in use, there is none"
        with pytest.raises(DataError, match=re.escape(message)):
            assemble(tiny_run(tmp_path, **named, **more))
        with pytest.raises(DataError, match=re.escape(message)):
            evaluate_model(replace(settings, **more), quiet())
    model, tokenizer = load_model("demo")
    tokenizer.chat_template = CHAT + (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    slow = {"model": str(tmp_path / "model"), "chat": None, "call_time_limit": 0.1}
    with pytest.raises(ForeignError, match=r"expected an end within 0\.1 s"):
        assemble(tiny_run(tmp_path, **named, **slow))
    with pytest.raises(ForeignError, match=r"expected an end within 0\.1 s"):
        evaluate_model(replace(settings, **slow), quiet())
    (tmp_path / "rewards.py").write_text("while True: pass\n")
    function = f"{tmp_path / 'rewards.py'}:f"
    with pytest.raises(ForeignError, match=r"rewards\.py:f: expected an end within 0\.1 s"):
        assemble(tiny_run(tmp_path, **named, reward_function=(function,), call_time_limit=0.1))
    with pytest.raises(ValueError, match="call_time_limit: expected > 0, got 0"):
        tiny_run(tmp_path, call_time_limit=0)


def test_the_new_settings_survive_a_settings_file(tmp_path):
    run = tiny_run(
        tmp_path, prompt_column="input", answer_column="final", system="Be brief.\nThink.",
        chat_arguments=("enable_thinking=False", "effort=low"), call_time_limit=9.0, stop="\n\n",
    )  # fmt: skip
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml", {"ttrl": lambda: run.algorithm}) == run
