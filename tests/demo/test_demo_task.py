"""The embedded default: its questions, tokenizer, pre-training and packaged model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyrl import demo
from pyrl.demo import pretrain, task

QUICK = pretrain.Pretraining(lengths=(2, 3), weights=(1.0, 1.0), batch=32, steps=12, warmup=2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in demo.QUESTIONS[name].read_text().splitlines()]


def test_the_packaged_tokenizer_has_31_tokens_in_order():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    expected = [task.PAD, task.END, *"0123456789+*=<>:,;|abcdefghij"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == expected
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)


@given(st.text(alphabet=task.SYMBOLS, max_size=40))
def test_the_packaged_tokenizer_spells_text_character_by_character(text):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    ids = tokenizer(text).input_ids
    assert ids == [2 + task.SYMBOLS.index(symbol) for symbol in text]
    assert tokenizer.decode([*ids, 1, 0], skip_special_tokens=True) == text


def test_a_character_without_a_token_becomes_the_unknown_token():
    tokenizer = task.build_tokenizer()
    assert tokenizer("1 2\nx").input_ids == [3, 0, 4, 0, 0]
    assert tokenizer.unk_token_id == 0


def test_questions_are_distinct_across_splits_and_answers_are_sorted():
    rows = {name: read(name) for name in demo.QUESTIONS}
    assert {name: len(found) for name, found in rows.items()} == {
        "train": 384,
        "heldout": 300,
        "length18": 100,
    }
    prompts = [row["prompt"] for found in rows.values() for row in found]
    assert len(set(prompts)) == len(prompts)
    for row in rows["train"] + rows["heldout"] + rows["length18"]:
        assert row["answer"] == "".join(sorted(row["prompt"][:-1]))
        assert row["prompt"].endswith("=")


def test_any_run_of_rows_holds_equally_many_of_each_length():
    for name in ("train", "heldout"):
        lengths = [len(row["prompt"]) - 1 for row in read(name)]
        assert lengths == [15, 16, 17] * (len(lengths) // 3)
    assert {len(row["prompt"]) - 1 for row in read("length18")} == {18}


def test_the_script_writes_the_packaged_questions_again(tmp_path):
    task.main(["--output", str(tmp_path)])
    for name, path in demo.QUESTIONS.items():
        assert (tmp_path / f"{name}.jsonl").read_bytes() == path.read_bytes()


def test_drawn_questions_avoid_the_excluded_ones():
    taken = frozenset(f"{digit}=" for digit in range(7))
    drawn = task.draw_questions(np.random.default_rng(0), 1, 3, exclude=taken)
    assert sorted(drawn) == ["7=", "8=", "9="]


def test_only_the_answer_and_its_end_train():
    input_BT, label_BT = pretrain.draw_batch(np.random.default_rng(0), pretrain.Pretraining())
    tokenizer = task.build_tokenizer()
    for input_T, label_T in zip(input_BT, label_BT, strict=True):
        text = tokenizer.decode(input_T, skip_special_tokens=True)
        question, answer = text.split("=")
        assert 2 <= len(question) <= 16
        trained = label_T != pretrain.IGNORE
        assert tokenizer.decode(label_T[trained]) == answer + task.END
        assert answer == task.solve(question)
        assert torch.equal(label_T[trained], input_T[trained])


def test_a_fresh_model_has_the_documented_size_and_spread():
    model = pretrain.build_model(seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 335_424
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_few_steps_lower_the_loss_and_repeat_exactly():
    model, again = pretrain.build_model(seed=0), pretrain.build_model(seed=0)
    losses, losses_again = (list(pretrain.pretrain(m, 0, QUICK)) for m in (model, again))
    assert losses[0] == pytest.approx(np.log(31), abs=0.3)
    assert losses[-1] < losses[0] - 0.5
    assert losses == losses_again
    for (name, left), (_, right) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(left, right), name
    assert next(pretrain.pretrain(pretrain.build_model(seed=1), 1, QUICK)) != losses[0]


def test_the_script_writes_a_checkpoint_that_loads_equal(tmp_path, capsys):
    pretrain.main(["--seed", "3", "--steps", "2", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "length 17: greedy 0.000" in printed
    model = pretrain.build_model(seed=3)
    list(pretrain.pretrain(model, 3, pretrain.Pretraining(steps=2)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 31


def test_the_learning_rate_warms_up_and_decays():
    recipe = pretrain.Pretraining()
    factors = [recipe.factor(step) for step in range(401)]
    assert factors[0] == 0.01
    assert max(factors) == factors[99] == pytest.approx(0.856, abs=1e-3)
    assert factors[400] == 0.05


def test_the_packaged_model_is_right_on_short_and_half_right_on_long_questions():
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL).eval()
    rng = np.random.default_rng(5)
    assert pretrain.greedy_accuracy(model, task.draw_questions(rng, 10, 40)) >= 0.9
    held_out = [row["prompt"] for row in read("heldout")]
    for length, low, high in ((15, 0.65, 0.9), (16, 0.6, 0.85), (17, 0.4, 0.7)):
        questions = [text for text in held_out if len(text) == length + 1]
        assert low <= pretrain.greedy_accuracy(model, questions) <= high


def test_the_package_data_stays_small():
    files = [*demo.MODEL.iterdir(), *demo.QUESTIONS.values()]
    assert sum(path.stat().st_size for path in files) < 1_600_000
