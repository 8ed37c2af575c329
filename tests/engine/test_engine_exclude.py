"""Forks without some tokens, in every engine: the first draw has none of them, later ones may."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from driven_engine import Driver, assert_as_a_fresh_forward, llama
from test_engine_recipe import PlainEngine
from test_engine_toy import PROMPTS as TOY_PROMPTS
from test_engine_toy import TRANSITION

from pyrl.engine import Branches, Engine
from pyrl.engine.hf import HFEngine
from pyrl.engine.toy import ToyEngine
from pyrl.logits.sampling import Sampling


def bigrams() -> np.ndarray:
    weight_VV = np.random.default_rng(0).exponential(size=(31, 31)) ** 3
    return weight_VV / weight_VV.sum(axis=1, keepdims=True)


ENGINES: dict[str, Callable[[], Engine]] = {
    "hf": lambda: HFEngine(llama(), []),
    "hf, one row": lambda: HFEngine(llama(), [], max_rows=1),
    "toy": lambda: ToyEngine(bigrams(), []),
    "recipe": lambda: PlainEngine(llama(), [], 256),
}
each_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)


@each_engine
def test_forks_at_one_place_take_its_tokens_from_the_most_probable_one_down(
    make: Callable[[], Engine],
) -> None:
    """Greedy: each leaves out what the others have drawn; a fork of one has a list of its own."""
    driver = Driver(make(), temperature=0)
    driver.submit([0], limit=6, retain=True)
    driver.finish()
    order = [driver.traces[0].tokens[3]]
    for _ in range(4):
        (sibling,) = driver.fork(0, 3, exclude=order)
        (own,) = driver.fork(sibling, 3, exclude=order[1:])  # it waits for its first token
        driver.finish()
        assert driver.traces[own].tokens == driver.traces[0].tokens
        assert driver.traces[sibling].tokens[:3] == driver.traces[0].tokens[:3]
        order.append(driver.traces[sibling].tokens[3])
        assert set(driver.traces[sibling].rests) == {-np.inf}
    assert len({*order}) == 5
    (whole,) = driver.fork(sibling, 4)  # behind the place
    driver.finish()
    assert driver.traces[whole].tokens == driver.traces[sibling].tokens


@each_engine
def test_later_positions_may_draw_what_the_first_may_not(make: Callable[[], Engine]) -> None:
    driver = Driver(make())
    driver.submit([0], limit=20, retain=True)
    driver.finish()
    for keep in (0, 7, 12):
        likely = np.bincount(driver.traces[0].tokens).argsort()[::-1][:6].tolist()
        forks = driver.fork(0, keep, 6, exclude=likely)
        driver.finish()
        traces = [driver.traces[fork].tokens for fork in forks]
        assert not {tokens[keep] for tokens in traces} & {*likely}
        assert {token for tokens in traces for token in tokens[keep + 1 :]} & {*likely}


@pytest.mark.parametrize("make", [ENGINES["hf"], ENGINES["hf, one row"], ENGINES["recipe"]])
def test_numbers_are_those_of_the_distribution_with_the_excluded_tokens(
    make: Callable[[], Engine],
) -> None:
    driver = Driver(make())
    driver.submit([0, 1], limit=9, retain=True)
    driver.finish()
    for keep in (0, 4, 8):
        taken = [driver.traces[0].tokens[keep]]
        for _ in range(3):
            (fork,) = driver.fork(0, keep, exclude=taken)
            driver.finish()
            taken.append(driver.traces[fork].tokens[keep])
        driver.fork(fork, min(keep + 1, 8), exclude=[5, 5, 30])
    driver.finish()
    assert_as_a_fresh_forward(driver, llama())


def test_the_waiting_fork_keeps_its_own_list() -> None:
    """Of two that wait for the only row, at the same place of one parent."""
    for seed in range(4):
        driver = Driver(HFEngine(llama(), [], max_rows=1))
        driver.submit([0], limit=5)
        driver.step(2)
        driver.fork(0, 1, exclude=range(16), seed=seed)
        driver.fork(0, 1, exclude=range(16, 31), seed=seed)
        driver.finish()
        assert driver.traces[1].tokens[1] >= 16 > driver.traces[2].tokens[1]


@pytest.mark.parametrize("taken", [[], [3], [0, 1]])
def test_siblings_of_a_toy_are_draws_from_the_rest_of_its_row(taken: list[int]) -> None:
    toy, count = ToyEngine(TRANSITION, []), 4000
    toy.start(Sampling())
    zero = np.zeros(1, np.int64)
    toy.submit(Branches(TOY_PROMPTS, zero + 1, zero, zero.astype(np.uint64), zero + 2, True))
    token = int(toy.step().token_B[0])
    ids = np.arange(1, count + 1)
    toy.fork(0, 1, ids, ids.astype(np.uint64), np.array(taken, np.int32))
    sampled = toy.step()
    drawn_B = sampled.token_B[sampled.branch_B > 0]
    rest_V = TRANSITION[token].copy()
    rest_V[taken] = 0
    count_V = np.bincount(drawn_B, minlength=4)
    assert count_V[rest_V == 0].sum() == 0
    expected_V = count * rest_V / rest_V.sum()
    possible_V = rest_V > 0
    assert possible_V.sum() > 1
    assert scipy.stats.chisquare(count_V[possible_V], expected_V[possible_V]).pvalue > 1e-3
    with np.errstate(divide="ignore"):
        expected_B = np.log(rest_V.sum() - rest_V[drawn_B])
    np.testing.assert_allclose(sampled.rest_logprob_B[sampled.branch_B > 0], expected_B, atol=1e-6)


@each_engine
def test_lists_that_hold_no_tokens_of_the_model_are_refused(make: Callable[[], Engine]) -> None:
    driver = Driver(make())
    driver.submit([0], limit=5)
    driver.step(2)
    one, seed = np.array([9]), np.array([1], np.uint64)
    for exclude, message in (
        (np.array([4]), r"fork: exclude: expected int32 with one axis, got int64\[1\]"),
        (np.array([[4]], np.int32), r"one axis, got int32\[1, 1\]"),
        (np.array([4, 31], np.int32), r"fork: exclude: expected ids in 0..30, got \[ 4 31\]"),
        (np.array([-1], np.int32), r"expected ids in 0..30, got \[-1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            driver.engine.fork(0, 1, one, seed, exclude)
    driver.fork(0, 1, exclude=range(31))
    with pytest.raises(FloatingPointError, match="that is not excluded"):
        driver.finish()


def test_the_caller_may_use_a_list_again() -> None:
    taken, token = np.array([0], np.int32), np.zeros(1, np.int64)
    for make in ENGINES.values():
        driver = Driver(make(), temperature=0)
        driver.submit([0], limit=3)
        driver.step(1)
        taken[0] = driver.traces[0].tokens[0]
        driver.engine.fork(0, 0, token + 1, token.astype(np.uint64), taken)
        driver.traces[1] = driver.traces[0].shared(0, taken.tolist())
        taken[0] = 30
        driver.finish()
        assert driver.traces[1].tokens[0] != driver.traces[0].tokens[0]
