"""Texts of several tokens end a response in every engine alike; no token follows them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from driven_engine import EOS, PROMPTS, Driver, assert_as_a_fresh_forward, llama
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_rollout import TREES, assert_forgotten, check_budgets, prompts, random_toy, rollout
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pyrl.answers.extraction import LastNumber, Until, Whole
from pyrl.answers.reading import StopText
from pyrl.budget import Allowance
from pyrl.engine import STOPPED, TRUNCATED, Engine
from pyrl.engine.hf import HFEngine
from pyrl.forest import Forest
from pyrl.fork import Flat, Fork, TopEntropy
from pyrl.prune import Doubt, Keep, Prune

DOUBT = Doubt(spike=0.5, tail_window=4)
LETTERS = "".join(map(chr, range(ord("A"), ord("A") + 31)))


def spelled(letters: str = LETTERS) -> PreTrainedTokenizerBase:
    """A tokenizer whose token i is the i-th letter."""
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level(*merges: tuple[str, str]) -> PreTrainedTokenizerBase:
    """A token for each byte, and one for each of these merges, as the tokens of Qwen are made."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def metaspace() -> PreTrainedTokenizerBase:
    """Words that begin with a space, which is lost where a text begins, as the tokens of Llama."""
    words = ["\u2581a", "\u2581b", "c", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


# -- where a text ends


def ends_at(stop: StopText, token_T: list[int]) -> int | None:
    """Tokens of a response that is asked after each of them, or None if it never ends."""
    for n in range(1, len(token_T) + 1):
        last = np.array(token_T[n - 1 : n], np.int32)
        if stop.may_end(last)[0] and stop(np.array(token_T[:n], np.int32)):
            return n
    return None


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        ("\n\n", "a\nb\n\nc", "a\nb\n\n"),
        ("Question:", "13\nQuestion: 5", "13\nQuestion:"),
        ("</answer>", "<answer>5</answer> and", "<answer>5</answer>"),
        ("Fin. ", "5. Fin. Next", "5. Fin. "),
        ("日本", "日 日本語", "日 日本"),
    ],
)
def test_a_text_is_found_where_its_last_token_ends_it(stop: str, text: str, shown: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    count = ends_at(StopText(stop, tokenizer), ids)
    assert count is not None
    assert tokenizer.decode(ids[:count]) == shown
    assert (
        ends_at(StopText(stop, tokenizer), tokenizer(text.replace(stop, ""))["input_ids"]) is None
    )


def test_a_text_may_begin_and_end_inside_of_tokens() -> None:
    tokenizer = byte_level((".", "<"), ("/", "a"), (">", "!"))
    ids = tokenizer("5.</a>! b")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["5", ".<", "/a", ">!"]
    assert ends_at(StopText("</a>", tokenizer), ids) == 4


def test_a_space_at_the_begin_of_a_token_counts() -> None:
    tokenizer = metaspace()
    a, b, c = range(3)
    assert ends_at(StopText("c b", tokenizer), [a, c, c, b, a]) == 4
    assert ends_at(StopText("c ", tokenizer), [a, c, c, b, a]) == 4
    assert ends_at(StopText(" b", tokenizer), [a, c, b, a]) == 3
    assert ends_at(StopText("cb", tokenizer), [a, c, b, a]) is None


def test_what_stands_before_the_stop_is_the_whole_answer() -> None:
    assert Until("Question 7:", Whole())("13\nQuestion 7:") == "13"
    assert Until("Question 7:", LastNumber())("13\nQuestion 7:") == "13"
    assert Until("Question 7:", Whole())("13\n") == "13"
    assert Until("Question 7:", Whole())("Question 7:") is None
    assert Until("Question 7:", Whole()).needs_end


# -- rollouts


def toy() -> Engine:
    return random_toy(3, end=0.03)


def small() -> Engine:
    return HFEngine(llama(), [EOS], max_rows=16)


VOTES = {toy: 24, small: 12}
LIMIT = {toy: 30, small: 12}


def texts(forest: Forest) -> list[tuple[str, int]]:
    leaf_N = forest.leaves()
    paths = [forest.path(leaf).tokens.tolist() for leaf in leaf_N.tolist()]
    letters = ["".join(LETTERS[token] for token in path) for path in paths]
    return [*zip(letters, forest.leaf_table(leaf_N).finish_N.tolist(), strict=True)]


def questions(make: Callable[[], Engine]) -> list[NDArray[np.int32]]:
    return prompts(3, 1) if make is toy else PROMPTS[:2]


@cache
def common_pair(make: Callable[[], Engine]) -> str:
    """Two letters that the model often says one after the other, but never where it begins."""
    said = [
        text
        for text, _ in texts(
            rollout(make(), questions(make), votes=VOTES[make], limit=LIMIT[make]).run()
        )
    ]
    pairs = {a + b for text in said for a, b in pairwise(text[2:])}
    pairs -= {text[:2] for text in said} | {pair for pair in pairs if LETTERS[EOS] in pair}
    pairs = {pair for pair in pairs if LETTERS[0] not in pair}
    return max(sorted(pairs), key=lambda pair: sum(pair in text for text in said))


@pytest.mark.parametrize("make", [toy, small])
def test_responses_are_those_without_the_stop_cut_where_it_ends(
    make: Callable[[], Engine],
) -> None:
    pair = common_pair(make)
    whole = rollout(make(), questions(make), votes=VOTES[make], limit=LIMIT[make]).run()
    run = rollout(
        make(), questions(make), votes=VOTES[make], limit=LIMIT[make],
        stop=StopText(pair, spelled()),
    )  # fmt: skip
    cut = run.run()
    check_budgets(run)
    assert_forgotten(run.engine)
    expected = [
        (text.partition(pair)[0] + pair, STOPPED) if pair in text else (text, finish)
        for text, finish in texts(whole)
    ]
    assert texts(cut) == expected
    assert sum(pair in text for text, _ in expected) > 2
    assert cut.stats()["tokens"] == sum(len(text) for text, _ in expected)
    assert Forest.load(cut.save()) == cut
    for before, after in zip(whole.leaves().tolist(), cut.leaves().tolist(), strict=True):
        length = cut.length(after)
        ours, theirs = cut.path(after), whole.path(before)
        np.testing.assert_allclose(ours.logprob, theirs.logprob[:length], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "fork", "prune"),
    [
        *((toy, fork, prune) for fork in (*TREES, Flat()) for prune in (Keep(), DOUBT)),
        (small, TopEntropy(mask_tail=0), Keep()),
        (small, TREES[-1], DOUBT),
    ],
)
def test_no_leaf_of_a_tree_goes_on_after_the_stop(
    make: Callable[[], Engine], fork: Fork, prune: Prune
) -> None:
    pair = common_pair(make)
    saved = []
    for _ in range(2):
        run = rollout(
            make(), questions(make), fork=fork, prune=prune, votes=16, limit=LIMIT[make],
            stop=StopText(pair, spelled()),
        )  # fmt: skip
        forest = run.run()
        check_budgets(run)
        assert_forgotten(run.engine)
        saved.append(forest.save())
    assert saved[0] == saved[1]
    leaves = texts(forest)
    assert any(pair in text for text, _ in leaves)
    for text, finish in leaves:
        assert text.find(pair) in (-1, len(text) - 2), text
        assert finish == STOPPED or (pair not in text and finish == TRUNCATED)


def test_a_branch_that_the_limit_ends_with_the_stop_has_stopped() -> None:
    pair = common_pair(toy)
    whole = [t for t, _ in texts(rollout(toy(), questions(toy), votes=24).run())]
    limit = min(text.index(pair) for text in whole if pair in text) + 2
    run = rollout(toy(), questions(toy), votes=24, limit=limit, stop=StopText(pair, spelled()))
    ends = dict(texts(run.run()))
    assert {finish for text, finish in ends.items() if text.endswith(pair)} == {STOPPED}


def test_a_response_that_was_ended_is_forked_as_one_that_ended_itself() -> None:
    model = llama()
    driver = Driver(HFEngine(model, [EOS]))
    kept, dropped, going = driver.submit([0, 0, 1], limit=20, retain=True)
    driver.submit([1], limit=20)
    driver.step(5)
    driver.engine.finish(np.array([kept, dropped, 3]))
    with pytest.raises(ValueError, match="branch 3 is unknown"):
        driver.abort(3)
    with pytest.raises(ValueError, match="branch 0 is unknown"):
        driver.engine.finish(np.array([kept]))
    with pytest.raises(ValueError, match=r"expected keep in 0\.\.4 \(finished parent\), got 5"):
        driver.fork(kept, 5)
    driver.fork(kept, 4, count=2)
    driver.fork(kept, 0)
    driver.abort(dropped)
    driver.finish()
    assert len(driver.traces[kept].tokens) == 5
    assert len(driver.traces[going].tokens) > 5
    assert_as_a_fresh_forward(driver, model)


@pytest.mark.parametrize("fork", [Flat(), TopEntropy(mask_tail=0)], ids=repr)
def test_a_budget_counts_no_token_after_the_stop(fork: Fork) -> None:
    pair = common_pair(toy)
    stop = StopText(pair, spelled())
    run = rollout(toy(), questions(toy), fork=fork, allowance=Allowance(tokens=60), stop=stop)
    forest = run.run()
    assert run.counts.sampled_tokens == forest.stats()["tokens"]
    assert all(budget.tokens <= 60 for budget in run.budgets)
    assert all(text.find(pair) in (-1, len(text) - 2) for text, _ in texts(forest))
