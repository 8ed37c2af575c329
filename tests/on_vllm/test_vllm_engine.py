"""vLLM against the embedded engine: the same tokens for the same seeds, forked or not."""

import numpy as np
import pytest
import torch
from driven_engine import PROMPTS, Driver, assert_as_a_fresh_forward
from small_llama import Small, assert_same

from pyrl.engine import STOPPED, TRUNCATED, Branches, EngineError
from pyrl.fork import Fork, TopEntropy, WithoutReplacement
from pyrl.logits.sampling import Sampling
from pyrl.prune import Keep
from pyrl.rollout import Rollout


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_and_statistics_are_those_of_the_reference(small: Small, temperature: float) -> None:
    drivers = small.drivers(temperature)
    for driver in drivers:
        driver.submit([0, 1, 2, 3] * 6, limit=[20, 9, 14, 1] * 6)
        driver.finish()
    assert_same(*drivers)
    finished = {trace.finish for trace in drivers[0].traces.values()}
    assert finished == {STOPPED, TRUNCATED} if temperature else TRUNCATED in finished
    if temperature:
        assert_as_a_fresh_forward(drivers[0], small.model, temperature, 1e-4)


def test_truncated_draws_are_those_of_the_reference(small: Small) -> None:
    drivers = small.drivers()
    kept = {}
    for driver in drivers:
        driver.engine.start(Sampling(temperature=0.9, top_k=7, top_p=0.9, min_p=0.02, top_h=0.8))
        driver.submit([0] * 8, limit=1)
        kept[driver] = driver.engine.step()
    ours, reference = kept.values()
    assert ours.token_B.tolist() == reference.token_B.tolist()
    np.testing.assert_allclose(ours.truncated_logprob_B, reference.truncated_logprob_B, atol=1e-4)
    assert (ours.truncated_logprob_B > ours.logprob_B).all()


def test_the_first_token_follows_the_model(small: Small) -> None:
    count = 4000
    small.engine.start(Sampling())
    ids = np.arange(count)
    small.engine.submit(
        Branches(PROMPTS[:1], 0 * ids, ids, ids.astype(np.uint64), np.ones(count, np.int64))
    )
    seen_V = np.zeros(31)
    while len((sampled := small.engine.step()).branch_B):
        seen_V += np.bincount(sampled.token_B, minlength=31)
    with torch.no_grad():
        logits_V = small.model(torch.from_numpy(PROMPTS[0]).long()[None]).logits[0, -1]
    expected_V = logits_V.double().softmax(0).numpy() * count
    assert seen_V.sum() == count
    common_V = expected_V >= 5
    chi2 = ((seen_V - expected_V)[common_V] ** 2 / expected_V[common_V]).sum()
    assert chi2 < common_V.sum() + 5 * np.sqrt(2 * common_V.sum())


@pytest.mark.parametrize("keep", [0, 1, 31, 32, 33, 39])
def test_forks_anywhere_in_a_block(small: Small, keep: int) -> None:
    drivers = small.drivers()
    seed = small.long_seed(2, 45)
    for driver in drivers:
        driver.submit([2], limit=60, seed_B=[seed])
        driver.step(40)
        assert driver.fork(0, keep, 3) == [1, 2, 3]
        driver.finish()
    assert len(drivers[0].traces[0].tokens) > 40
    assert_same(*drivers)


def test_forks_of_finished_branches_and_of_forks(small: Small) -> None:
    drivers = small.drivers()
    for driver in drivers:
        driver.submit([0, 1], limit=12, retain=True)
        driver.finish()
        last = len(driver.traces[0].tokens) - 1
        late = driver.fork(0, last) + driver.fork(1, 0)
        nested = driver.fork(late[0], 2, 2)
        driver.finish()
        driver.abort(0, 1, *late, *nested)
    assert_same(*drivers)


def test_forks_draw_without_the_tokens_of_their_siblings(small: Small) -> None:
    """Inside and at the edges of a block, of running and of ended branches, and of such forks."""
    drivers = small.drivers()
    seed = small.long_seed(2, 45)
    for driver in drivers:
        driver.submit([2], limit=60, seed_B=[seed], retain=True)
        driver.step(40)
        for keep in (0, 31, 32, 39):
            taken = [driver.traces[0].tokens[keep]]
            (first,) = driver.fork(0, keep, seed=keep, exclude=taken)
            (waiting,) = driver.fork(first, keep, seed=keep, exclude=range(16))
            driver.step()
            taken.append(driver.traces[first].tokens[keep])
            (second,) = driver.fork(first, keep, seed=keep, exclude=taken)
            driver.step()
            assert driver.traces[second].tokens[keep] not in taken
            assert driver.traces[waiting].tokens[keep] >= 16
        driver.finish()
        driver.fork(0, 40, 2, exclude=driver.traces[0].tokens[40:41])
        driver.finish()
    assert_same(*drivers)
    assert_as_a_fresh_forward(drivers[0], small.model, 1.0, 1e-4)
    small.clear(drivers[0])


def test_a_refused_prompt_is_nobodys_cache(small: Small) -> None:
    """The next branch gets the number that the refused one would have had."""
    small.engine.load_weights(small.model.state_dict().items(), 7)
    drivers = small.drivers()
    for driver in drivers:
        driver.submit([1], limit=40)
        driver.step()
        with pytest.raises(ValueError, match="identifiers that are not in use"):
            driver.engine.submit(
                Branches(
                    PROMPTS, np.array([3]), np.array([0]), np.array([5], np.uint64), np.array([9])
                )
            )
        driver.submit([2], limit=40)
        driver.step(4)
        driver.submit([3], limit=40)
        driver.finish()
    assert_same(*drivers)


def test_fork_abort_and_finish_in_one_step(small: Small) -> None:
    drivers = small.drivers()
    for driver in drivers:
        driver.submit([0, 1, 2], limit=[4, 9, 9], retain=True)
        driver.step(4)
        driver.fork(0, 3)
        driver.fork(1, 4, 2)  # with its newest token, which the model has not seen
        driver.abort(1)
        driver.fork(2, 2)
        driver.abort(2)
        driver.finish()
    assert_same(*drivers)
    small.clear(drivers[0])


def test_a_seed_replays_whatever_runs_beside_it(small: Small) -> None:
    crowd, alone = Driver(small.engine), Driver(small.engine)
    crowd.submit([0, 1, 2, 3, 0, 1], limit=12, seed_B=[7, 8, 9, 10, 2**64 - 1, 12])
    crowd.finish()
    alone.submit([0], limit=12, seed_B=[2**64 - 1])
    alone.finish()
    assert alone.traces[0].tokens == crowd.traces[4].tokens


def test_prompts_longer_than_a_pass_are_read_in_parts(small: Small) -> None:
    """40 x 500 tokens are more than vLLM computes in a step: rows draw before they are read."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 31, 500).astype(np.int32) for _ in range(40)]
    ids = np.arange(40)
    drawn = []
    for engine in (d.engine for d in small.drivers()):
        engine.start(Sampling())
        engine.submit(Branches(prompts, ids, ids, ids.astype(np.uint64), np.full(40, 3)))
        tokens = {}
        while len((sampled := engine.step()).branch_B):
            for b, t, p in zip(sampled.branch_B, sampled.token_B, sampled.logprob_B, strict=True):
                tokens.setdefault(int(b), []).append((int(t), round(float(p), 3)))
        drawn.append(tokens)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("fork", [TopEntropy(), WithoutReplacement()], ids=repr)
def test_a_rollout_grows_the_same_trees(fork: Fork, small: Small) -> None:
    leaves = []
    for driver in small.drivers():
        forest = Rollout(
            driver.engine,
            PROMPTS[:2],
            votes=12,
            limit=30,
            sampling=Sampling(),
            fork=fork,
            prune=Keep(),
            signals=None,
            seed=3,
        ).run()
        leaves.append(
            sorted(
                (forest.tree_of(x), tuple(forest.path(x).tokens.tolist())) for x in forest.leaves()
            )
        )
    assert leaves[0] == leaves[1]
    assert len(leaves[0]) == 24


def test_bad_input_is_refused_with_what_was_expected(small: Small) -> None:
    engine = small.engine
    driver = Driver(engine)
    with pytest.raises(ValueError, match="branch 9 is unknown"):
        driver.engine.abort(np.array([9]))
    with pytest.raises(ValueError, match="ids below 31, got"):
        engine.submit(_one(np.array([31], np.int32)))
    with pytest.raises(ValueError, match=r"fits vllm.max_model_len = 512, got 13"):
        engine.submit(_one(np.full(500, 4, np.int32), limit=13))
    with pytest.raises(ValueError, match="expected named tensors"):
        engine.load_weights(None, 1)
    driver.submit([0], limit=5)
    driver.step()
    with pytest.raises(ValueError, match=r"expected keep in 0..1 \(running parent\), got 2"):
        driver.fork(0, 2)
    with pytest.raises(ValueError, match="not in use, each once"):
        engine.submit(_one(PROMPTS[0]))
    with pytest.raises(RuntimeError, match="1 branches are running"):
        engine.start(Sampling())
    with pytest.raises(RuntimeError, match="load_weights: 1 branches"):
        engine.load_weights(small.model.state_dict().items(), 9)
    driver.abort(0)


def _one(prompt: np.ndarray, limit: int = 4) -> Branches:
    zero = np.zeros(1, np.int64)
    return Branches([prompt], zero, zero, zero.astype(np.uint64), zero + limit)


def test_weights_that_are_not_numbers_are_named(small: Small) -> None:
    weights = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    broken = weights | {"model.norm.weight": weights["model.norm.weight"] * torch.nan}
    small.engine.load_weights(broken.items(), 6)
    driver = Driver(small.engine)
    driver.submit([0], limit=3)
    with pytest.raises(FloatingPointError, match="got 1 of 1 rows"):
        driver.step()
    small.clear(driver)
    small.engine.load_weights(weights.items(), 7)
    small.engine.start(Sampling())
    assert small.engine.weight_version() == 7


def test_a_second_engine_in_this_process_is_refused(small: Small) -> None:
    with pytest.raises(EngineError, match="one engine in a process: close the other"):
        Small(small.model, small.folder)
    test_a_seed_replays_whatever_runs_beside_it(small)
