"""Prompts: what becomes a question, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import reasoning_gym
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pyrl.demo.task import build_tokenizer
from pyrl.prompts import DataError, Prompt, load_prompts

CHAT = (
    "{% for m in messages %}|{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
CHAIN_SUM = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, so that it can spell any question."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT)


def write(path: Path, *rows: Any) -> str:
    text = (row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_text("".join(text))
    return str(path)


def read(source: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[Prompt]:
    return load_prompts(source, tokenizer, **{"max_tokens": 64, **options})


def spell(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(prompt.tokens))


def refuse(source: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source, tokenizer, **options)
    return str(caught.value)


def test_a_jsonl_row_becomes_tokens_an_answer_and_the_other_columns(tmp_path, tokenizer):
    rows = [{"prompt": "31=", "answer": 13, "level": 2}, "\n", {"prompt": "2="}]
    first, second = read(write(tmp_path / "q.jsonl", *rows), tokenizer)
    assert (first.index, first.text, first.answer, first.columns) == (0, "31=", "13", {"level": 2})
    assert (second.index, second.text, second.answer, second.columns) == (1, "2=", None, {})
    assert first.tokens.dtype == np.int32
    assert spell(first, tokenizer) == "31="


@pytest.mark.parametrize("column", ["prompt", "question", "problem"])
@pytest.mark.parametrize("answer", ["answer", "solution", "ground_truth"])
def test_questions_and_answers_have_several_column_names(tmp_path, tokenizer, column, answer):
    (prompt,) = read(write(tmp_path / "q.jsonl", {column: "31=", answer: "13"}), tokenizer)
    assert (prompt.text, prompt.answer, prompt.columns) == ("31=", "13", {})


def test_the_answer_may_lie_in_a_reward_model_column(tmp_path, tokenizer):
    row = {"prompt": "31=", "reward_model": {"style": "rule", "ground_truth": 13}}
    (prompt,) = read(write(tmp_path / "q.jsonl", row), tokenizer)
    assert prompt.answer == "13"
    assert prompt.columns == {}


def test_no_column_that_holds_an_answer_is_left_for_reward_functions(tmp_path, tokenizer):
    row = {"prompt": "31=", "answer": "13", "solution": "it is 13", "ground_truth": "13", "n": 1}
    row["reward_model"] = {"ground_truth": "13"}
    (prompt,) = read(write(tmp_path / "q.jsonl", row), tokenizer)
    assert (prompt.answer, prompt.columns) == ("13", {"n": 1})


def test_an_empty_cell_is_no_answer(tmp_path, tokenizer):
    path = write(tmp_path / "q.csv", "prompt,answer,solution\n31=,13,\n42=,,\n53=, ,35\n")
    assert [prompt.answer for prompt in read(path, tokenizer)] == ["13", None, "35"]


def test_a_prompt_that_is_no_unicode_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": "31="}, {"prompt": "31\ud800="})
    with pytest.raises(DataError, match=r"q\.jsonl.*2.*the prompt is no valid Unicode"):
        read(path, tokenizer)


def test_all_file_kinds_read_the_same_rows_and_keep_leading_zeros(tmp_path, tokenizer):
    rows = [{"prompt": f"{i}0=", "answer": f"0{i}", "note": "a"} for i in range(3)]
    header, lines = "prompt,answer,note\n", "".join(f"{i}0=,0{i},a\n" for i in range(3))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "q.parquet"))
    sources = [
        write(tmp_path / "q.jsonl", *rows),
        write(tmp_path / "q.json", rows),
        write(tmp_path / "q.csv", header + lines),
        str(tmp_path / "q.parquet"),
    ]
    for source in sources:
        found = [(p.text, p.answer, p.columns) for p in read(source, tokenizer)]
        assert found == [(r["prompt"], r["answer"], {"note": "a"}) for r in rows], source


def test_prefix_and_suffix_surround_what_the_model_reads_but_not_the_text(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": "31"})
    (prompt,) = read(path, tokenizer, prefix="ab:", suffix="=")
    assert (prompt.text, spell(prompt, tokenizer)) == ("31", "ab:31=")


def test_the_chat_template_is_used_if_there_is_one_and_can_be_off(tmp_path, chat_tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": "31"})
    spelled = [
        spell(read(path, chat_tokenizer, suffix="=", chat=chat)[0], chat_tokenizer)
        for chat in (None, True, False)
    ]
    assert spelled == ["|31=:", "|31=:", "31="]


def test_chat_messages_keep_their_turns(tmp_path, chat_tokenizer):
    turns = [("user", "2="), ("assistant", "2"), ("user", "31=")]
    row = {"prompt": [{"role": role, "content": content} for role, content in turns]}
    (prompt,) = read(write(tmp_path / "q.jsonl", row), chat_tokenizer, prefix="a")
    assert (prompt.text, spell(prompt, chat_tokenizer)) == ("31=", "|2=|2|a31=:")


def test_chat_messages_need_a_chat_template(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": [{"role": "user", "content": "31="}]})
    assert refuse(path, tokenizer) == (
        f"{path}, line 1: the prompt is chat messages, but no chat template is in use"
    )
    assert "the tokenizer has no chat template" in refuse(path, tokenizer, chat=True)


def test_limit_keeps_the_first_rows_and_reads_no_further(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": "1="}, {"prompt": "2="}, "not json\n")
    assert [p.text for p in read(path, tokenizer, limit=2)] == ["1=", "2="]
    assert "limit: expected at least 1, got 0" in refuse(path, tokenizer, limit=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", '{"prompt": "1="}\n{"prompt": \n', ", line 2: malformed JSON: "),
        ("q.jsonl", '{"prompt": "1="}\n[1]\n', ", line 2: expected a JSON object, got list"),
        (
            "q.jsonl",
            '{"prompt": "1="}\n\n{"promt": "2=", "id": 7}\n',
            ", line 3: no prompt: expected one of prompt, question, problem, messages; "
            "the columns are: promt, id",
        ),
        ("q.jsonl", '{"prompt": ["1="]}\n', ", line 1: prompt: expected a string or a list of"),
        ("q.jsonl", '{"prompt": ""}\n', ", line 1: the prompt is empty"),
        ("q.jsonl", '{"prompt": "1 ="}\n', ", line 1: the tokenizer has no token for a part of"),
        ("q.jsonl", "\n", ": the data set is empty"),
        ("q.json", '{"prompt": "1="}', ": expected a list of objects, got dict"),
        ("q.json", '[{"prompt": "1="},\n 2', ", line 2: malformed JSON: "),
        ("q.json", '[{"prompt": "1="}, 2]', ", item 1: expected a JSON object, got int"),
        ("q.csv", "prompt,answer\n1=,1\n2=\n", ", line 3: expected 2 columns"),
        ("q.csv", 'prompt,answer\n"1=,1\n', ", line 2: malformed CSV: "),
        ("q.csv", "prompt,answer\n", ": the data set is empty"),
        ("q.parquet", "PAR", ": not a Parquet file: "),
        ("q.txt", "1=\n", ": expected a file that ends in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_bad_files_are_refused_with_file_and_place(tmp_path, tokenizer, name, content, message):
    path = write(tmp_path / name, content)
    assert refuse(path, tokenizer).startswith(path + message)


def test_a_file_that_is_not_utf8_names_the_line(tmp_path, tokenizer):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"prompt": "1="}\n{"prompt": "\xff"}\n')
    assert refuse(str(path), tokenizer).startswith(f"{path}, line 2: not UTF-8 text")


def test_a_missing_file_is_named(tmp_path, tokenizer):
    path = tmp_path / "missing.jsonl"
    assert refuse(str(path), tokenizer) == f"{path}: no such file"
    assert refuse("missing.txt", tokenizer).startswith("missing.txt: no such file; known are")


def test_a_prompt_beyond_the_limit_names_its_index_and_length(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", {"prompt": "1="}, {"prompt": "12345="})
    assert len(read(path, tokenizer, max_tokens=6)) == 2
    message = f"{path}, line 2: prompt 1 has 6 tokens, the limit is 5: "
    message += "what the responses leave of the model's positions"
    assert refuse(path, tokenizer, max_tokens=5) == message


def test_a_hub_data_set_is_opened_by_id_configuration_and_split(monkeypatch, tokenizer):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "31=", "answer": "13", "id": 5}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("org/name", "org/name:test", "org/name/main:test", "name"):
        (prompt,) = read(source, tokenizer)
        assert (prompt.text, prompt.answer, prompt.columns) == ("31=", "13", {"id": 5})
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", None, "test"),
        ("org/name", "main", "test"),
        ("name", None, "train"),
    ]


def test_a_hub_data_set_that_cannot_be_loaded_is_named(monkeypatch, tokenizer):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refuse("org/name:test", tokenizer)
    assert message.startswith("org/name:test: no such file, and not loaded as a Hugging Face data")


def test_the_packaged_question_files_load(tokenizer):
    names = ("train", "heldout", "length18")
    sizes = {name: len(read(f"demo:{name}", tokenizer)) for name in names}
    assert sizes == {"train": 384, "heldout": 300, "length18": 100}
    message = "demo:tain: expected one of demo:train, demo:heldout, demo:length18"
    assert refuse("demo:tain", tokenizer) == message


def test_reasoning_gym_tasks_take_options_and_default_to_fifty_items(byte_tokenizer):
    prompts = read(CHAIN_SUM, byte_tokenizer, max_tokens=600)
    entries = reasoning_gym.create_dataset(
        "chain_sum", size=50, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    assert [p.text for p in prompts] == [entry["question"] for entry in entries]
    assert [p.answer for p in prompts] == [entry["answer"] for entry in entries]
    assert prompts[3].columns["metadata"]["num_terms"] == 2
    assert spell(prompts[0], byte_tokenizer).count("\n") == 6  # worked examples
    (bare,) = read(f"{CHAIN_SUM}&size=1&shots=0", byte_tokenizer, max_tokens=200)
    assert spell(bare, byte_tokenizer) == f"|{bare.text}:"
    (other,) = read(f"{CHAIN_SUM}&size=1&seed=9", byte_tokenizer, max_tokens=600)
    assert other.text == entries[9]["question"]


def test_worked_examples_come_first_without_chat_and_show_no_question(byte_tokenizer):
    prompts = read(f"{CHAIN_SUM}&shots=3", byte_tokenizer, max_tokens=500)
    prefixes = {spell(p, byte_tokenizer).removesuffix(p.text) for p in prompts}
    (prefix,) = prefixes
    examples = prefix.splitlines()
    assert len(set(examples)) == 3
    for example in examples:
        question, answer = example.rsplit(" ", 1)
        assert question not in {p.text for p in prompts}
        assert eval(question.removesuffix("=").split(":")[1]) == int(answer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:chainsum", "has no task 'chainsum'; did you mean chain_sum"),
        ("reasoning_gym:chain_sum?min_term=2", "no option 'min_term'; did you mean min_terms"),
        ("reasoning_gym:chain_sum?shot=2", "no option 'shot'; did you mean shots"),
        ("reasoning_gym:chain_sum?min_terms=9", "max_terms must be >= min_terms"),
        ("reasoning_gym:chain_sum?size=many", "options {'size': 'many', 'seed': 0}"),
        ("reasoning_gym:chain_sum?shots=1.5", "shots: expected a whole number, got 1.5"),
        ("reasoning_gym:chain_sum?size", "expected OPTION=VALUE"),
        (f"{CHAIN_SUM}&shots=900", "other questions to show"),
    ],
)
def test_a_reasoning_gym_request_that_does_not_fit_is_explained(byte_tokenizer, source, message):
    assert message in refuse(source, byte_tokenizer, max_tokens=500)


def test_without_reasoning_gym_the_message_says_what_to_install(monkeypatch, byte_tokenizer):
    monkeypatch.setattr("pyrl.sources.find_spec", lambda name: None)
    assert "pip install reasoning-gym" in refuse("reasoning_gym:chain_sum", byte_tokenizer)


def test_a_task_with_a_scorer_brings_it_and_others_are_compared(byte_tokenizer):
    (scored,) = read("reasoning_gym:countdown?size=1&shots=0", byte_tokenizer, max_tokens=2000)
    assert (scored.task.name, scored.task.options) == ("countdown", '{"size": 1, "seed": 0}')
    (compared,) = read(
        "reasoning_gym:basic_arithmetic?size=1&shots=0", byte_tokenizer, max_tokens=999
    )
    assert compared.task is None
    assert compared.answer is not None


def test_a_task_without_answers_is_not_shown_and_one_without_any_truth_is_refused(
    byte_tokenizer, monkeypatch
):
    assert "graph_color: shots: its questions come without answers" in refuse(
        "reasoning_gym:graph_color?size=1&shots=1", byte_tokenizer
    )
    monkeypatch.setattr("pyrl.sources._own_scorer", lambda task, options: None)
    message = refuse("reasoning_gym:graph_color?size=1&shots=0", byte_tokenizer)
    assert (
        message == "reasoning_gym:graph_color has neither answers nor a scorer to learn or score by"
    )


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("2 + 3 = <<2+3=5>>5 apples.\n#### 5", "5"),
        ("...\n#### 1,000\n", "1,000"),
        (r"First 2, so the answer is $\boxed{5}$.", "5"),
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5}", "5"),
        ("#### Solution\nIt is 5", "#### Solution\nIt is 5"),
        ("5", "5"),
    ],
)
def test_the_truth_in_a_whole_solution_is_its_final_answer(tmp_path, tokenizer, solution, answer):
    data = write(tmp_path / "q.jsonl", {"prompt": "31=", "answer": solution})
    assert [prompt.answer for prompt in read(data, tokenizer)] == [answer]


def test_a_truth_that_only_compares_as_a_long_text_is_named(tmp_path, tokenizer, caplog):
    solution = "First we add two and three apples and then we see that there are five"
    rows = [{"prompt": "31=", "answer": "13"}, {"prompt": "42=", "answer": solution}]
    data = write(tmp_path / "q.jsonl", *rows, {"prompt": "52=", "answer": "no real solution"})
    read(data, tokenizer)
    (message,) = caplog.messages
    assert message.startswith(
        f"{data}: 1 of 3 true answers can only be compared as a long text, such as that of question"
    )
    assert "First we add" in message
