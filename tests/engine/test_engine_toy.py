"""The toy engine samples exactly its bigram model, forks included."""

from collections import defaultdict

import numpy as np
import pytest
from scipy.stats import chisquare

from pyrl.engine import STOPPED, TRUNCATED, Branches, Sampled, Work
from pyrl.engine.toy import ToyEngine
from pyrl.logits.sampling import Sampling

EOS = 0
TRANSITION = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [0.1, 0.2, 0.3, 0.4],
        [0.0, 0.5, 0.0, 0.5],
        [0.25, 0.25, 0.25, 0.25],
    ]
)
PROMPTS = [np.array([2, 1], np.int32), np.array([3], np.int32)]


def engine(temperature: float = 1.0) -> ToyEngine:
    toy = ToyEngine(TRANSITION, [EOS])
    toy.start(Sampling(temperature=temperature))
    return toy


def trunks(
    prompt_B: list[int], *, limit: int = 6, first: int = 0, retain: bool = False
) -> Branches:
    ids = np.arange(first, first + len(prompt_B))
    limit_B = np.full(len(ids), limit)
    return Branches(PROMPTS, np.array(prompt_B), ids, ids.astype(np.uint64), limit_B, retain)


def drain(toy: ToyEngine) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    while (sampled := toy.step()).branch_B.size:
        for branch, token in zip(sampled.branch_B, sampled.token_B, strict=True):
            tokens[int(branch)].append(int(token))
    return tokens


def frequencies(sampled: Sampled) -> np.ndarray:
    return np.bincount(sampled.token_B, minlength=4)


def test_first_tokens_follow_the_row_of_the_prompts_last_token() -> None:
    toy = engine()
    toy.submit(trunks([0] * 20_000))
    assert chisquare(frequencies(toy.step()), 20_000 * TRANSITION[1]).pvalue > 1e-3


def test_temperature_sharpens_the_distribution_and_its_statistics() -> None:
    toy = engine(temperature=0.5)
    toy.submit(trunks([0] * 20_000))
    sampled = toy.step()
    sharp = TRANSITION[1] ** 2 / (TRANSITION[1] ** 2).sum()
    assert chisquare(frequencies(sampled), 20_000 * sharp).pvalue > 1e-3
    np.testing.assert_allclose(sampled.logprob_B, np.log(sharp[sampled.token_B]), rtol=1e-5)
    np.testing.assert_allclose(sampled.entropy_B, -(sharp * np.log(sharp)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sampled.confidence_B, 1, rtol=1e-6)


def test_siblings_of_a_fork_draw_anew_from_the_same_row() -> None:
    toy = engine()
    toy.submit(trunks([1], limit=9, retain=True))
    path = [int(toy.step().token_B[0])]
    while path[-1] == EOS or len(path) < 2:
        assert path[-1] != EOS, "this seed must not stop at once"
        path.append(int(toy.step().token_B[0]))
    ids = np.arange(1, 20_001)
    toy.fork(0, 1, ids, ids.astype(np.uint64))
    sampled = toy.step()
    siblings = np.bincount(sampled.token_B[sampled.branch_B > 0], minlength=4)
    expected = 20_000 * TRANSITION[path[0]]
    assert siblings[expected == 0].sum() == 0
    assert chisquare(siblings[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_log_probabilities_are_exact_along_every_path() -> None:
    toy = engine()
    toy.submit(trunks([0, 1] * 50))
    last = [int(PROMPTS[b % 2][-1]) for b in range(100)]
    while (sampled := toy.step()).branch_B.size:
        for branch, token, logprob in zip(
            sampled.branch_B, sampled.token_B, sampled.logprob_B, strict=True
        ):
            assert np.exp(logprob) == pytest.approx(TRANSITION[last[branch], token], rel=1e-5)
            last[branch] = int(token)


def test_responses_end_at_an_end_token_or_at_their_limit() -> None:
    toy = engine()
    toy.submit(trunks([0, 1] * 50, limit=3))
    finish: dict[int, int] = {}
    tokens: dict[int, list[int]] = defaultdict(list)
    while (sampled := toy.step()).branch_B.size:
        for b, branch in enumerate(sampled.branch_B.tolist()):
            tokens[branch].append(int(sampled.token_B[b]))
            finish[branch] = int(sampled.finish_B[b])
    assert set(finish.values()) == {STOPPED, TRUNCATED}
    for branch, path in tokens.items():
        assert EOS not in path[:-1]
        assert (path[-1] == EOS) == (finish[branch] == STOPPED)
        assert len(path) == 3 or path[-1] == EOS


def test_seeds_replay() -> None:
    runs = []
    for company in (0, 5):
        toy = engine()
        toy.submit(trunks([1] * company, first=100))
        toy.submit(trunks([0, 1, 1, 0]))
        tokens = drain(toy)
        runs.append([tokens[branch] for branch in range(4)])
    assert runs[0] == runs[1]


def test_work_counts_each_token_once() -> None:
    stay = np.array([[0.5, 0.5], [0.5, 0.5]])
    toy = ToyEngine(stay, [])
    toy.start(Sampling())
    prompts = [np.array([0, 1, 1], np.int32)]
    ids = np.arange(2)
    toy.submit(Branches(prompts, ids * 0, ids, ids.astype(np.uint64), ids * 0 + 5, retain=True))
    toy.step()
    toy.step()
    assert toy.work() == Work(3, 2, 3)
    toy.fork(0, 2, np.array([2, 3]), np.array([8, 9], np.uint64))
    toy.abort(np.array([0]))
    drain(toy)
    copied = 3 + 2 * (3 + 2)
    assert toy.work() == Work(3, 2 + 1 + 3 + 2 * 2, copied)
    toy.fork(1, 4, np.array([4]), np.array([8], np.uint64))
    drain(toy)
    assert toy.work() == Work(3, 10, copied + 3 + 4)


def test_weights_are_a_transition() -> None:
    toy = ToyEngine(TRANSITION, [])
    swapped = np.eye(4)[[1, 2, 3, 0]]
    toy.load_weights([("transition", swapped)], version=3)
    assert toy.weight_version() == 3
    toy.start(Sampling())
    toy.submit(trunks([0], limit=4))
    assert drain(toy)[0] == [2, 3, 0, 1]
    with pytest.raises(ValueError, match="the name transition alone"):
        toy.load_weights([("other", swapped)], version=4)
    assert toy.weight_version() == 3


def test_rows_must_be_distributions() -> None:
    for broken in (np.ones((2, 2)), np.array([[1.5, -0.5], [0, 1]])):
        with pytest.raises(ValueError, match="rows that are distributions"):
            ToyEngine(broken, [])
    with pytest.raises(ValueError, match=r"expected shape \[V, V\], got \(2, 3\)"):
        ToyEngine(np.ones((2, 3)) / 3, [])


def test_branches_must_name_a_prompt() -> None:
    one = np.zeros(1, np.int64)
    branches = Branches(PROMPTS, one - 1, one, one.astype(np.uint64), one + 1)
    with pytest.raises(ValueError, match=r"expected prompt_B in 0\.\."):
        engine().submit(branches)


@pytest.mark.parametrize("prompt", [[], [4], [-1]])
def test_prompts_must_have_tokens_of_the_vocabulary(prompt: list[int]) -> None:
    one = np.zeros(1, np.int64)
    branches = Branches([np.array(prompt, np.int32)], one, one, one.astype(np.uint64), one + 1)
    with pytest.raises(ValueError, match="prompt 0: expected at least one token, and ids below 4"):
        engine().submit(branches)


def test_bad_requests_say_what_was_expected() -> None:
    toy = ToyEngine(TRANSITION, [EOS])
    with pytest.raises(RuntimeError, match="call start first"):
        toy.step()
    toy.start(Sampling())
    with pytest.raises(ValueError, match="limit >= 1, got 0"):
        toy.submit(trunks([0], limit=0))
    toy.submit(trunks([0, 1], retain=True))
    with pytest.raises(ValueError, match="not in use"):
        toy.submit(trunks([0]))
    with pytest.raises(RuntimeError, match="2 branches are running"):
        toy.start(Sampling())
    with pytest.raises(RuntimeError, match="2 branches are running or retained"):
        toy.load_weights(None, 1)
    with pytest.raises(ValueError, match=r"keep in 0\.\.0 \(running parent\), got 1"):
        toy.fork(0, 1, np.array([7]), np.array([7], np.uint64))
    with pytest.raises(ValueError, match="branch 9 is unknown"):
        toy.abort(np.array([9]))
    length = len(drain(toy)[0])
    with pytest.raises(ValueError, match=rf"keep in 0\.\.{length - 1} \(finished parent\)"):
        toy.fork(0, length, np.array([7]), np.array([7], np.uint64))
    toy.abort(np.array([0, 1]))
    toy.load_weights(None, 1)
