"""The embedded engine against transformers itself: forks, aborts and limits change no number."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from driven_engine import EOS, Driver, assert_as_a_fresh_forward, gemma3, llama, mistral, qwen2
from transformers import (
    PreTrainedModel,
)

from pyrl.engine import RUNNING, STOPPED, TRUNCATED, Branches, Work
from pyrl.engine.hf import HFEngine


@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize("max_rows", [2, 256])
def test_greedy_tokens_equal_those_of_generate(
    make: Callable[[], PreTrainedModel], max_rows: int
) -> None:
    reference = make()
    driver = Driver(HFEngine(make(), [EOS], max_rows=max_rows), temperature=0)
    limits = [9, 4, 12, 7, 9]
    driver.submit([0, 1, 2, 3, 0], limit=limits)
    driver.finish()
    reasons = set()
    for trace, limit in zip(driver.traces.values(), limits, strict=True):
        prompt = torch.from_numpy(trace.prompt).long()[None]
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()
        assert trace.tokens == expected
        assert trace.finish == (STOPPED if expected[-1] == EOS else TRUNCATED)
        reasons.add(trace.finish)
    assert TRUNCATED in reasons


@pytest.mark.parametrize("make", [llama, qwen2, mistral, gemma3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 2e-6)])
def test_sampled_statistics_equal_a_fresh_forward(
    make: Callable[..., PreTrainedModel], dtype: torch.dtype, tolerance: float
) -> None:
    driver = Driver(HFEngine(make(dtype), [EOS], max_rows=3), temperature=0.7)
    driver.submit([0, 1, 2, 3, 0, 1], limit=[20, 9, 14, 1, 20, 3])
    driver.finish()
    assert_as_a_fresh_forward(driver, make(dtype), 0.7, tolerance)


def test_a_seed_replays_whatever_runs_beside_it() -> None:
    crowd = Driver(HFEngine(llama(), [EOS], max_rows=3))
    crowd.submit([0, 1, 2, 3, 0, 1], limit=12, seed_B=[7, 8, 9, 10, 2**64 - 1, 12])
    crowd.finish()
    for branch, (prompt, seed) in {4: (0, 2**64 - 1), 5: (1, 12)}.items():
        alone = Driver(HFEngine(llama(), [EOS]))
        alone.submit([prompt], limit=12, seed_B=[seed])
        alone.finish()
        assert alone.traces[0].tokens == crowd.traces[branch].tokens


def test_different_seeds_draw_different_responses() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0] * 8, limit=8)
    driver.finish()
    assert len({tuple(trace.tokens) for trace in driver.traces.values()}) == 8


def test_a_fork_at_0_is_a_fresh_branch() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0], limit=10, seed_B=[1])
    driver.step(4)
    (fork,) = driver.fork(0, 0, seed=55)
    driver.finish()
    fresh = Driver(HFEngine(llama(), []))
    fresh.submit([0], limit=10, seed_B=[55])
    fresh.finish()
    assert driver.traces[fork].tokens == fresh.traces[0].tokens


def test_forks_change_nothing_for_their_parent() -> None:
    lone = Driver(HFEngine(llama(), []))
    lone.submit([0], limit=12, seed_B=[1])
    lone.finish()
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0], limit=12, seed_B=[1])
    driver.step(5)
    driver.fork(0, 5, 2)
    driver.step(2)
    driver.fork(0, 3, 2)
    driver.finish()
    assert driver.traces[0].tokens == lone.traces[0].tokens
    assert_as_a_fresh_forward(driver, llama())


def test_no_prefix_is_computed_twice() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 0, 0, 1], limit=10)
    driver.step(4)
    assert driver.engine.work() == Work(7, 4 * 3, 5 + 5)
    driver.fork(0, 2, 3)  # inside
    driver.fork(1, 4, 2)  # at the end: the fourth token has been sampled and not computed
    driver.fork(3, 0)
    copied = 10 + 3 * (5 + 2) + 2 * (5 + 4) + 2
    driver.step()
    assert driver.engine.work() == Work(7, 4 * 4, copied)
    driver.finish()
    # A leaf's last token is never computed.
    decoded = 4 * 9 + 3 * (9 - 2) + 2 * (9 - 4) + 9
    assert driver.engine.work() == Work(7, decoded, copied)
    assert_as_a_fresh_forward(driver, llama())


def test_forks_at_the_end_outlive_a_parent_aborted_in_the_same_step() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1], limit=8)
    driver.step(3)
    first = driver.fork(0, 3, 2)
    driver.abort(0)
    assert driver.step() == [1, *first]
    assert driver.engine.work() == Work(7, 2 * 3, 2 * (5 + 3))
    driver.finish()
    assert len(driver.traces[first[0]].tokens) == 8
    assert_as_a_fresh_forward(driver, llama())


def test_an_abandoned_token_is_not_computed() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1], limit=8)
    driver.step(3)
    driver.abort(0, *driver.fork(0, 3, 2))
    assert driver.step() == [1]
    assert driver.engine.work() == Work(7, 2 * 2 + 1, 0)


def test_a_fork_in_the_middle_outlives_an_aborted_parent() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1], limit=8)
    driver.step(3)
    (fork,) = driver.fork(0, 1)
    driver.abort(0)
    driver.finish()
    assert len(driver.traces[fork].tokens) == 8
    assert_as_a_fresh_forward(driver, llama())


def test_finished_branches_fork_while_retained() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1], limit=6, retain=True)
    driver.finish()
    late = driver.fork(0, 4, 2) + driver.fork(1, 5) + driver.fork(1, 0)
    driver.finish()
    assert [len(driver.traces[b].tokens) for b in late] == [6] * 4
    assert driver.engine.work().decode_tokens == 2 * 5 + 2 * 1 + 0 + 5
    assert_as_a_fresh_forward(driver, llama())
    again = driver.fork(late[0], 5)  # a sibling inherits retain
    driver.abort(0, 1, *late)
    driver.finish()
    assert_as_a_fresh_forward(driver, llama())
    driver.abort(*again)
    driver.engine.load_weights(None, 1)


def test_forks_wait_for_rows_and_go_before_new_prompts() -> None:
    driver = Driver(HFEngine(llama(), [], max_rows=2))
    driver.submit([0, 1, 2], limit=4)
    assert driver.step() == [0, 1]
    driver.step()
    forks = driver.fork(0, 2, 2)
    nested = driver.fork(forks[0], 1)  # of a branch that itself still waits
    driver.step(2)
    assert driver.step() == forks
    driver.step()
    assert driver.step() == [nested[0], 2]
    driver.finish()
    assert {len(trace.tokens) for trace in driver.traces.values()} == {4}
    assert driver.engine.work().decode_tokens == 3 * 3 + 2 * 1 + 2
    assert_as_a_fresh_forward(driver, llama())


def test_branches_are_reported_in_the_order_of_entry() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1, 2, 3, 0], limit=[2, 9, 9, 3, 9])
    assert driver.step() == [0, 1, 2, 3, 4]
    driver.fork(1, 0)
    driver.step()
    assert driver.step() == [1, 2, 3, 4, 5]
    driver.abort(2)
    assert driver.step() == [1, 4, 5]
    driver.finish()
    assert_as_a_fresh_forward(driver, llama())


@pytest.mark.parametrize("trial", range(12))
def test_random_forks_and_aborts_change_no_number_and_compute_each_token_once(trial: int) -> None:
    rng = np.random.default_rng(trial)
    retain = bool(trial % 2)
    driver = Driver(HFEngine(llama(), [EOS], max_rows=int(rng.integers(2, 12))))
    driver.submit(rng.integers(0, 4, 6).tolist(), limit=12, retain=retain)
    origin = {b: (b, 0) for b in driver.traces}  # parent and keep
    aborted: set[int] = set()
    for _ in range(25):
        driver.step()
        for parent in rng.permutation(list(driver.traces))[:2].tolist():
            trace = driver.traces[parent]
            if parent in aborted or (trace.finish and not retain) or len(driver.traces) > 24:
                continue
            keep = int(rng.integers(0, len(trace.tokens) + (trace.finish == RUNNING)))
            origin |= dict.fromkeys(driver.fork(parent, keep, 2), (parent, keep))
            if len(trace.tokens) > origin[parent][1] and rng.random() < 0.5:
                driver.abort(parent)
                aborted.add(parent)
    driver.finish()
    assert aborted
    assert_as_a_fresh_forward(driver, llama())

    def owner(branch: int, token: int) -> tuple[int, int]:
        while token < origin[branch][1]:
            branch = origin[branch][0]
        return branch, token

    # A token is computed if something was drawn after it, by whichever branch.
    computed = {owner(b, t) for b, x in driver.traces.items() for t in range(len(x.tokens) - 1)}
    assert driver.engine.work().decode_tokens == len(computed)


@pytest.mark.parametrize(
    "prompt", [np.array([2**32 + 5]), np.array([1.9, 2.2]), np.array([[1, 2]])]
)
def test_token_ids_are_not_cast(prompt: np.ndarray) -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="submit: prompt 0: expected token ids, whole numbers"):
        Branches([prompt], one, one, one.astype(np.uint64), one + 4)


def test_seeds_are_unsigned() -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="seed_B: expected uint64, got int64"):
        Branches([np.array([1])], one, one, one - 1, one + 4)
    driver = Driver(HFEngine(llama(), [EOS]))
    driver.submit([0])
    driver.step()
    with pytest.raises(ValueError, match="seed_B: expected uint64, got int64"):
        driver.engine.fork(0, 1, one + 7, one)


def test_a_step_that_failed_half_way_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows have a token that the others do not know of."""
    driver, whole = Driver(HFEngine(llama(), [EOS])), Driver(HFEngine(llama(), [EOS]))
    driver.submit([0, 1], limit=8)
    driver.step(2)
    with monkeypatch.context() as patch:
        patch.setattr(HFEngine, "_sample", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            driver.step()
    with pytest.raises(RuntimeError, match="the last one failed half-way; abort all branches"):
        driver.step()
    driver.abort(0, 1)
    again = Driver(driver.engine)
    for each in (again, whole):
        each.submit([0, 1], limit=8)
        each.finish()
    assert again.traces == whole.traces
