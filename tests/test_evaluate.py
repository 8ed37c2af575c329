"""Scores against a slow recount, and training that does not notice them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import (
    make_trainer,
    quiet,
    same_bits,
    stepped,
    tiny,
    tiny_run,
    weights,
    write_questions,
)
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyrl.answers import EQUIVALENCES, extractor_named
from pyrl.answers.reading import answer_format, check_formats, decoder, end_tokens
from pyrl.demo.run import echo
from pyrl.engine import STOPPED
from pyrl.engine.hf import HFEngine
from pyrl.evaluate import EvalSettings, Evaluator, Scoring, answered, evaluate_model
from pyrl.fork import Fork
from pyrl.leaves import Leaves
from pyrl.models import ModelError, find_device, load_model, room
from pyrl.prompts import Prompt, load_prompts
from pyrl.report import Evaluation
from pyrl.train import Trainer

torch.set_num_threads(1)

Demo = tuple[PreTrainedModel, PreTrainedTokenizerBase]
LIMIT = 21


class Recorder(Evaluator):
    """Keeps the texts of every set of samples: by number of samples and temperature."""

    def _sample(
        self, prompts: Sequence[Prompt], samples: int, temperature: float, how: Scoring, *fork: Fork
    ) -> tuple[Leaves, int]:
        leaves, tokens = super()._sample(prompts, samples, temperature, how, *fork)
        rows: list[list[str | None]] = [[] for _ in prompts]
        for group, text, finish in zip(leaves.group_N, leaves.text_N, leaves.finish_N, strict=True):
            rows[group].append(text if finish == STOPPED else None)
        self.seen = {**getattr(self, "seen", {}), (samples, temperature): (rows, tokens)}
        return leaves, tokens


@pytest.fixture(scope="module")
def model() -> Demo:
    return load_model("demo")


@pytest.fixture
def prompts(model: Demo, tmp_path: Path) -> list[Prompt]:
    data = write_questions(tmp_path / "q.jsonl", 12)
    return load_prompts(str(data), model[1], max_tokens=40, chat=False)


def evaluator(model: Demo, seed: int = 4) -> Recorder:
    lm, tokenizer = model
    engine = HFEngine(lm, end_tokens(lm, tokenizer), max_rows=16)
    return Recorder(
        engine, decoder(tokenizer), extractor_named("whole"), EQUIVALENCES["exact"](), seed
    )


def share(values: Sequence[bool]) -> float:
    return float(Fraction(sum(values), len(values)))


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; of equals, the one seen first."""
    count = Counter(answer for answer in answers if answer is not None)
    return max(count, key=lambda answer: count[answer], default=None)


@pytest.mark.parametrize("votes", [0, 3, 4, 7, 16])
def test_scores_are_those_of_a_slow_recount(votes: int, model: Demo, prompts: list[Prompt]) -> None:
    score = evaluator(model)
    how = Scoring(0.8, samples=4, votes=votes, low_temperature=0.2, max_tokens=LIMIT)
    found = score("some", "before", prompts, how)
    truth = [prompt.answer for prompt in prompts]
    drawn = max(4, votes)
    (greedy, _), (low, _), (rows, _) = (
        score.seen[key] for key in ((1, 0.0), (4, 0.2), (drawn, 0.8))
    )
    assert [len(row) for row in rows] == [drawn] * len(prompts)
    right = [[text == true for text in row] for row, true in zip(rows, truth, strict=True)]
    first = [row[:4] for row in right]
    expected = {
        "greedy": share([row[0] == true for row, true in zip(greedy, truth, strict=True)]),
        "pass@1/T=0.2": share(
            [text == true for row, true in zip(low, truth, strict=True) for text in row]
        ),
        "pass@1/T=0.8": share([hit for row in first for hit in row]),
        "pass@4": share([any(row) for row in first]),
    }
    for size in {4, votes} - {0}:
        voted = [majority(row[:size]) for row in rows]
        expected[f"maj@{size}"] = share([a == b for a, b in zip(voted, truth, strict=True)])
    assert found.metrics == pytest.approx(expected)
    assert 0 < expected["pass@1/T=0.8"] < expected["pass@4"] < 1
    assert found.tokens == sum(tokens for _, tokens in score.seen.values())
    assert (found.set, found.model, found.questions) == ("some", "before", 12)
    assert found.seconds > 0


def test_greedy_is_the_most_probable_token_each_time(model: Demo, prompts: list[Prompt]) -> None:
    lm, tokenizer = model
    score = evaluator(model)
    found = score("some", "before", prompts, Scoring(samples=1, max_tokens=LIMIT))
    right = []
    for prompt in prompts:
        row = prompt.tokens.tolist()
        with torch.no_grad():
            for _ in range(LIMIT):
                logits = lm(
                    input_ids=torch.tensor([row], dtype=torch.int64), use_cache=False
                ).logits[0, -1]
                row.append(int(logits.argmax()))
                if row[-1] == tokenizer.eos_token_id:
                    break
        ended = row[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(row[len(prompt.tokens) :], skip_special_tokens=True)
        right.append(ended and text == prompt.answer)
    assert found.metrics["greedy"] == share(right)
    assert 0 < sum(right) < len(right)


def test_scores_that_are_switched_off_are_absent(model: Demo, prompts: list[Prompt]) -> None:
    found = evaluator(model)("some", "after", prompts, Scoring(samples=2, max_tokens=LIMIT))
    assert list(found.metrics) == ["greedy", "pass@1/T=0.6", "maj@2", "pass@2"]


def test_scores_depend_on_the_seed_alone(model: Demo, prompts: list[Prompt]) -> None:
    how = Scoring(samples=4, max_tokens=LIMIT)
    score = evaluator(model)
    first = score("some", "before", prompts, how).metrics
    texts = score.seen
    assert score("some", "before", prompts, how).metrics == first
    assert score.seen == texts
    other = evaluator(model, seed=5)
    other("some", "before", prompts, how)
    assert other.seen[4, 0.6] != texts[4, 0.6]
    assert other.seen[1, 0.0] == texts[1, 0.0]


def test_a_response_cut_at_the_limit_is_no_answer(model: Demo, prompts: list[Prompt]) -> None:
    short = len(prompts[0].answer or "")  # one token less than the answer and its end
    found = evaluator(model)("some", "before", prompts[:1], Scoring(samples=3, max_tokens=short))
    assert set(found.metrics.values()) == {0.0}


def test_a_question_without_an_answer_is_refused_before_anything_is_sampled(
    model: Demo, prompts: list[Prompt]
) -> None:
    score = evaluator(model)
    open_question = replace(prompts[3], answer=None)
    with pytest.raises(ValueError, match="some: expected a true answer for each question, 3 has"):
        score("some", "before", [*prompts[:3], open_question], Scoring(max_tokens=LIMIT))
    assert not hasattr(score, "seen")
    assert answered(prompts, "some") is prompts


def test_scores_of_a_model_by_name_are_those_of_the_evaluator(
    model: Demo, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EvalSettings(
        model="demo",
        data=str(write_questions(tmp_path / "twelve.jsonl", 12)),
        samples=3,
        max_tokens=LIMIT,
        extractor="whole",
        equivalence="exact",
        chat=False,
        seed=4,
        limit=10,
        max_rows=8,
        device="cpu",
    )
    closed: list[HFEngine] = []
    monkeypatch.setattr(HFEngine, "close", lambda engine: closed.append(engine))
    found = evaluate_model(settings, quiet())
    assert len(closed) == 1  # of vLLM there is one in a process
    how = Scoring(0.6, samples=3, low_temperature=0.3, max_tokens=LIMIT)
    expected = evaluator(model)("some", "before", prompts[:10], how)
    assert isinstance(found, Evaluation)
    assert found.metrics == expected.metrics
    assert (found.questions, found.tokens) == (10, expected.tokens)


def test_a_model_by_name_needs_questions_with_answers(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "open.jsonl", 2, ["1", None])
    settings = EvalSettings(
        "demo", str(data), max_tokens=LIMIT, extractor="whole", chat=False, device="cpu"
    )
    with pytest.raises(ValueError, match=re.escape("true answer for each question, 1 has none")):
        evaluate_model(settings, quiet())


def test_questions_whose_answers_are_read_otherwise_are_refused(tmp_path: Path) -> None:
    data = str(write_questions(tmp_path / "q.jsonl", 2))
    with pytest.raises(ValueError, match=r"demo:heldout: expected the extractor of .*'boxed', got"):
        check_formats(data, ["demo:heldout"], None, None)
    check_formats(data, ["demo:heldout"], "whole", "")
    check_formats("demo:train", ["demo:heldout"], None, None)


def test_a_model_without_a_number_of_positions_is_refused(model: Demo) -> None:
    mamba = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=5))
    with pytest.raises(ModelError, match=r"MambaForCausalLM: expected .* number of positions"):
        room(mamba)
    assert room(model[0]).tokens == 64


# -- training does not notice --


def test_evaluation_changes_neither_weights_nor_the_training_stream(tmp_path: Path) -> None:
    found = {}
    for name, often in (("plain", 0), ("often", 1)):
        folder = tmp_path / name
        folder.mkdir()
        run = tiny_run(folder, tiny(echo(), votes=8), eval_every=often, steps=2)
        trainer = make_trainer(run)
        rows, completions = [], []
        for step in range(3):
            if often:
                before = weights(trainer)
                assert trainer.evaluations.score("before" if step == 0 else "after", step)
                assert same_bits(weights(trainer), before)
            rows.append(stepped(trainer))
            completions.append(trainer.unlogged.completions)
        rows = [
            {
                n: v
                for n, v in row.items()
                if n not in ("step_time", "cpu_time") and "timing/" not in n
            }
            for row in rows
        ]
        found[name] = weights(trainer), completions, rows
    assert same_bits(found["plain"][0], found["often"][0])
    assert found["plain"][1] == found["often"][1]
    assert found["plain"][2] == found["often"][2]


def test_runs_with_and_without_evaluations_between_end_with_the_same_weights(
    tmp_path: Path,
) -> None:
    found = []
    how = Scoring(samples=2, max_tokens=LIMIT)
    for often in (0, 1):
        folder = tmp_path / str(often)
        folder.mkdir()
        run = tiny_run(folder, tiny(echo(), votes=4), eval_every=often, steps=2)
        trainer = Trainer(run, quiet(), scoring=how)
        report = trainer.train()
        found.append(weights(trainer))
        metrics = (run.output / "metrics.jsonl").read_text().splitlines()
        assert ["eval/trained questions/greedy" in row for row in metrics] == [
            True,
            bool(often),
            True,
        ]
        assert [(e.set, e.model) for e in report.evaluations] == [
            ("trained questions", "before"),
            ("trained questions", "after"),
        ]
    assert same_bits(*found)


# -- its parts --


def test_responses_end_with_the_model_s_own_token_or_one_that_holds_the_text(model: Demo) -> None:
    lm, tokenizer = model
    own = {int(tokenizer.eos_token_id)}
    for stop, ids in (("", set()), ("7", set(tokenizer("7")["input_ids"])), ("78", set())):
        form = answer_format(lm, tokenizer, "demo:train", None, stop)
        assert form.eos == own | ids
        assert (form.stop is None) == (stop == "")


@pytest.mark.parametrize("stop", ["7", "89"])
def test_a_run_and_an_evaluation_end_responses_at_a_text(tmp_path: Path, stop: str) -> None:
    """The demo model sorts digits, so that it says 89 in most of its answers."""
    leaves = make_trainer(tiny_run(tmp_path, stop=stop)).train_step().leaves
    said = leaves.text_N
    assert sum(stop in text for text in said) >= len(said) / 2
    assert set(leaves.finish_N.tolist()) == {STOPPED}
    assert {text.partition(stop)[2] for text in said} == {""}
    data = str(tmp_path / "questions.jsonl")
    settings = EvalSettings("demo", data, samples=2, low_temperature=0, max_tokens=21, stop=stop)
    score = evaluate_model(replace(settings, extractor="whole", chat=False), quiet())
    whole = evaluate_model(replace(settings, extractor="whole", chat=False, stop=""), quiet())
    assert score.tokens < whole.tokens


def test_a_model_without_an_end_needs_a_stop() -> None:
    lm, tokenizer = load_model("demo")
    lm.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token; give a text to --stop"):
        answer_format(lm, tokenizer, "demo:train", None, "")
    form = answer_format(lm, tokenizer, "demo:train", None, "=")
    assert form.eos == set(tokenizer("=")["input_ids"])
    assert answer_format(lm, tokenizer, "demo:train", None, "12").eos == set()


def test_text_has_no_special_tokens(model: Demo) -> None:
    tokenizer = model[1]
    row = np.array([*tokenizer("123")["input_ids"], tokenizer.eos_token_id], np.int32)
    assert decoder(tokenizer)([row]) == ["123"]


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:1'"):
        find_device("cuda:1")


def test_a_tag_before_the_answer_has_to_be_one_that_responses_show(model):
    lm, tokenizer = model
    extractor = answer_format(lm, tokenizer, "demo:train", None, None, "=").extractor
    assert extractor("1=2=3") == "3"
    assert extractor("123") is None
    with pytest.raises(ValueError, match="answer_after: expected a text that responses can show"):
        answer_format(lm, tokenizer, "demo:train", None, None, tokenizer.eos_token)


def test_masses_bound_the_share_of_right_samples(model: Demo, prompts: list[Prompt]) -> None:
    how = Scoring(0.8, samples=32, exact=12, max_tokens=LIMIT)
    found = evaluator(model)("some", "given", prompts, how)
    right, unseen = (found.metrics[f"{name} mass/T=0.8"] for name in ("right", "unseen"))
    assert 0 < unseen < 0.3
    noise = 0.5 / np.sqrt(32 * len(prompts))
    sampled = found.metrics["pass@1/T=0.8"]
    assert right - 3 * noise < sampled < right + unseen + 3 * noise
    label = found.metrics["label by mass/T=0.8"] * len(prompts)
    assert label == pytest.approx(round(label))
    fewer = evaluator(model)("some", "given", prompts, replace(how, exact=3))
    assert fewer.metrics["unseen mass/T=0.8"] > unseen
    assert fewer.tokens < found.tokens
    without = evaluator(model)("some", "given", prompts, replace(how, exact=0))
    assert found.metrics.keys() - without.metrics.keys() == {
        "right mass/T=0.8", "unseen mass/T=0.8", "label by mass/T=0.8"
    }  # fmt: skip
