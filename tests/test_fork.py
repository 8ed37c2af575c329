"""Where trees fork: ETMR's and EPTree's goldens, and forks against slow readings of the forest."""

import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from toy_rollout import ForkRecorder, prompts, random_toy, rollout

from pyrl._core.tree import SignalSpec
from pyrl.engine.toy import ToyEngine
from pyrl.forest import Forest
from pyrl.fork import (
    EntropyConfidence,
    EPTree,
    Finished,
    FixedEntropyConfidence,
    Flat,
    OnlineEntropy,
    Probed,
    RandomTokens,
    Site,
    TopEntropy,
)
from pyrl.prune import Doubt, FixedDoubt, Keep
from pyrl.rollout import Rollout, make_signals


def recorded(
    toy: ToyEngine, questions: list[NDArray[np.int32]], **options: object
) -> tuple[Rollout, list[tuple[int, int, list[int]]]]:
    engine = ForkRecorder(toy)
    run = rollout(engine, questions, **options)
    run.run()
    return run, engine.forks


def top(values: NDArray[np.float32], n: int, end: int) -> list[int]:
    """Ascending positions in [1, end) of the n largest values, ties to the lowest position."""
    return sorted(sorted(range(1, end), key=lambda at: (-values[at], at))[:n])


def leaves_per_trunk(forest: Forest) -> list[int]:
    table = forest.leaf_table(forest.leaves())
    return np.unique([table.tree_N, table.trunk_N], axis=1, return_counts=True)[1].tolist()


# ---- ETMR


@pytest.mark.parametrize(
    ("fork", "votes", "trunks"),
    [
        (TopEntropy(), 60, 12),
        (TopEntropy(forks=3), 7, 1),
        (TopEntropy(forks=3, siblings=1), 64, 16),
        (TopEntropy(forks=1, siblings=3), 64, 16),
        (EPTree(), 30, 6),
        (EPTree(rounds=2), 54, 6),
        (OnlineEntropy(), 60, 12),
        (EntropyConfidence(), 32, 16),
        (EntropyConfidence(max_width=1), 32, 32),
        (Flat(), 32, 32),
        (TopEntropy(), 1, 1),
    ],
    ids=repr,
)
def test_trunks_and_forks_make_up_the_votes(fork: Flat, votes: int, trunks: int) -> None:
    assert fork.trunks(votes) == trunks


def test_etmr_grows_60_leaves_from_12_trunks_at_their_two_most_uncertain_tokens() -> None:
    run, forks = recorded(random_toy(end=0.0), prompts(1, 3), fork=TopEntropy(), votes=60, limit=30)
    forest = run.forest
    assert (run.counts.trunks, run.counts.forks, run.counts.siblings) == (24, 48, 96)
    assert leaves_per_trunk(forest) == [5] * 24
    assert all(len(children) == 2 for _, _, children in forks)
    sites: dict[int, list[int]] = {}
    for parent, at, _ in forks:
        sites.setdefault(parent, []).append(at)
    assert len(sites) == 24
    for parent, positions in sites.items():
        assert positions == top(forest.path(parent).entropy, 2, 30 - 8)


@pytest.mark.parametrize("rule", [TopEntropy, RandomTokens])
def test_forks_keep_their_gap(rule: type[TopEntropy]) -> None:
    gap = 5
    _, forks = recorded(random_toy(end=0.0), prompts(1), fork=rule(min_gap=gap), votes=60, limit=30)
    positions = np.array([at for _, at, _ in forks]).reshape(-1, 2)
    assert (np.diff(positions) >= gap).all()


def test_random_forks_are_as_many_at_tokens_that_chance_chooses() -> None:
    run, forks = recorded(
        random_toy(end=0.0), prompts(1, 3), fork=RandomTokens(), votes=60, limit=30
    )
    assert (run.counts.trunks, run.counts.forks, run.counts.siblings) == (24, 48, 96)
    places = [at for _, at, _ in forks]
    assert 1 <= min(places) < max(places) < 30 - 8
    # Two of 21 tokens for each trunk: evenly spread, and not the most uncertain ones.
    assert np.mean(places) == pytest.approx(11, abs=4 * np.sqrt(21**2 / 12 / 48))
    best = [at in top(run.forest.path(parent).entropy, 2, 22) for parent, at, _ in forks]
    assert np.mean(best) < 0.3
    again = recorded(random_toy(end=0.0), prompts(1, 3), fork=RandomTokens(), votes=60, limit=30)
    assert again[1] == forks


@pytest.mark.parametrize("fork", [TopEntropy(mask_tail=3), EPTree(mask_tail=3)], ids=repr)
def test_no_fork_after_the_answer_opens_nor_in_the_tail_nor_at_the_first_token(
    fork: TopEntropy,
) -> None:
    def opening(tokens: NDArray[np.int32]) -> int:
        found = np.flatnonzero(tokens == 2)
        return int(found[-1]) if found.size else len(tokens)

    run, forks = recorded(
        random_toy(end=0.1), prompts(1, 1), fork=fork, votes=60, answer_start=opening
    )
    assert len(forks) > 20
    for parent, at, _ in forks:
        path = run.forest.path(parent)
        end = min(opening(path.tokens), len(path.tokens) - 3)
        uncertainty = -path.logprob if isinstance(fork, EPTree) else path.entropy
        assert at in top(uncertainty, 2, end)


def test_trunks_too_short_to_fork_are_made_up_by_more_trunks() -> None:
    run, forks = recorded(random_toy(end=0.1), prompts(1), fork=TopEntropy(), votes=60)
    forest = run.forest
    siblings = {child for _, _, children in forks for child in children}
    trunks = [leaf for leaf in forest.leaves().tolist() if leaf not in siblings]
    sites = []
    for trunk in trunks[:12]:
        entropy = forest.path(trunk).entropy
        sites += [(trunk, at) for at in top(entropy, 2, len(entropy) - 8)]
    assert sorted((parent, at) for parent, at, _ in forks) == sorted(sites)
    assert len(forest.leaves()) == 60
    assert 0 < len(sites) < 24
    assert run.counts.trunks == len(trunks) == 60 - 2 * len(sites)


# ---- EPTree


def test_eptree_grows_30_leaves_from_6_trunks_at_their_most_surprising_tokens() -> None:
    run, forks = recorded(random_toy(end=0.0), prompts(1), fork=EPTree(), votes=30, limit=30)
    assert leaves_per_trunk(run.forest) == [5] * 6
    for parent in {parent for parent, _, _ in forks}:
        positions = [at for source, at, _ in forks if source == parent]
        assert positions == top(-run.forest.path(parent).logprob, 2, 30 - 8)


def test_later_rounds_of_eptree_look_at_the_tokens_of_earlier_branches() -> None:
    fork = EPTree(forks=2, siblings=1, rounds=3)
    run, forks = recorded(random_toy(end=0.0), prompts(1), fork=fork, votes=28, limit=30)
    forest = run.forest
    assert leaves_per_trunk(forest) == [7] * 4
    begin = dict.fromkeys(forest.leaves().tolist(), 0)
    trunk_of = {leaf: forest.trunk_of(leaf) for leaf in begin}
    children_of = {child: at for _, at, children in forks for child in children}
    from_branches = 0
    for trunk in set(trunk_of.values()):
        mine = [f for f in forks if trunk_of[f[0]] == trunk]
        grown = [mine[0][0]]
        for number in range(3):
            candidates = [
                (forest.path(leaf).logprob[at], order, at)
                for order, leaf in enumerate(grown)
                for at in range(children_of.get(leaf, 0) + 1, 30 - 8)
            ]
            expected = sorted((order, at) for _, order, at in sorted(candidates)[:2])
            this_round = mine[2 * number : 2 * number + 2]
            assert [(grown.index(parent), at) for parent, at, _ in this_round] == expected
            from_branches += sum(order > 0 for order, _ in expected)
            grown += [child for _, _, children in this_round for child in children]
    assert from_branches > 0


def test_siblings_of_different_rounds_at_one_place_are_different_samples() -> None:
    run, forks = recorded(
        random_toy(end=0.0), prompts(1), fork=EPTree(forks=1, rounds=4), votes=9, limit=30
    )
    places = [(parent, at) for parent, at, _ in forks]
    assert len(set(places)) < len(places)  # the most surprising token stays so
    forest = run.forest
    leaves = forest.leaves().tolist()
    assert len({forest.seed(leaf) for leaf in leaves}) == 9
    assert len({forest.path(leaf).tokens.tobytes() for leaf in leaves}) == 9


@pytest.mark.parametrize("fork", [TopEntropy(), EPTree()], ids=repr)
def test_a_weight_has_a_factor_for_each_fork_on_the_path(fork: TopEntropy) -> None:
    run, forks = recorded(random_toy(end=0.0), prompts(1), fork=fork, votes=30, limit=30)
    for parent in {parent for parent, _, _ in forks}:
        (_, first, early), (_, second, late) = [f for f in forks if f[0] == parent]
        assert first < second
        weights = [run.forest.weight(leaf) for leaf in (parent, *early, *late)]
        assert weights == pytest.approx([1 / 9, 1 / 3, 1 / 3, 1 / 9, 1 / 9])


# ---- online


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_later_rounds_are_products_of_the_widths_on_the_path(seed: int) -> None:
    """Whatever was forked first: a later fork may lie above an earlier one, or at its place."""
    fork = EPTree(forks=2, siblings=2, rounds=2, mask_tail=0)
    run, forks = recorded(random_toy(end=0.0), prompts(1), fork=fork, votes=9, limit=30, seed=seed)
    width: dict[tuple[int, int], int] = {}
    parent: dict[int, tuple[int, int]] = {}
    for leaf, at, children in forks:
        width[leaf, at] = width.get((leaf, at), 1) + len(children)
        parent |= dict.fromkeys(children, (leaf, at))
    for leaf in run.forest.leaves().tolist():
        expected, branch, end = 1.0, leaf, 30
        while True:
            for (owner, at), ways in width.items():
                expected /= ways if owner == branch and at <= end else 1
            if branch not in parent:
                break
            branch, end = parent[branch]
        assert run.forest.weight(leaf) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: TopEntropy(forks=-1), "TopEntropy.forks: expected >= 0, got -1"),
        (lambda: EPTree(rounds=-1), "EPTree.rounds: expected >= 0, got -1"),
        (lambda: OnlineEntropy(quantile=-0.5), "OnlineEntropy.quantile: expected a number in [0"),
        (lambda: EntropyConfidence(entropy_high=-0.5), "EntropyConfidence.entropy_high: expected"),
        (lambda: EntropyConfidence(alpha=np.nan), "EntropyConfidence.alpha: expected a number"),
        (lambda: EntropyConfidence(cooldown=-1), "EntropyConfidence.cooldown: expected >= 0"),
        (lambda: EntropyConfidence(group_window=0), "EntropyConfidence.group_window: expected >="),
        (lambda: Doubt(tail_low=-0.1), "Doubt.tail_low: expected a number in [0, 1], got -0.1"),
        (lambda: Doubt(spike_run=0), "Doubt.spike_run: expected >= 1, got 0"),
        (lambda: FixedEntropyConfidence(entropy_low=4.0), "expected low <= high, got 4.0 and 3.5"),
        (lambda: FixedEntropyConfidence(confidence=1.2), "confidence: expected a number in [0, 1]"),
        (lambda: FixedDoubt(spike=np.inf), "FixedDoubt.spike: expected a number, got inf"),
    ],
)
def test_settings_that_would_switch_a_rule_off_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()


def test_a_place_that_is_named_twice_is_refused() -> None:
    """Its siblings would draw the same tokens, and vote twice."""

    class Twice(TopEntropy):
        def at_end(self, trunk: Finished) -> list[Site]:
            return super().at_end(trunk)[:1] * 2

    with pytest.raises(ValueError, match=r"Twice\.at_end: expected each place once"):
        recorded(random_toy(end=0.0), prompts(1), fork=Twice(), votes=5, limit=30)


def test_online_entropy_forks_at_the_first_uncertain_tokens() -> None:
    fork = OnlineEntropy(forks=2, siblings=1, quantile=0.8, cooldown=3, warmup_traces=4)
    signals = make_signals(fork, Keep())
    assert signals is not None
    toy = random_toy(end=0.0)
    rollout(toy, prompts(1), fork=fork, signals=signals, votes=12).run()
    run, forks = recorded(toy, prompts(1), fork=fork, signals=signals, votes=300)
    forest, threshold = run.forest, signals.thresholds().entropy_high
    assert len(forest.leaves()) == 300
    ancestry: dict[int, list[int]] = {}
    for parent, at, children in forks:
        path = [*ancestry.get(parent, []), at]
        ancestry |= dict.fromkeys([parent, *children], path)
    unforked = [leaf for leaf in forest.leaves().tolist() if leaf not in ancestry]
    for leaf in [*ancestry, *unforked]:
        expected: list[int] = []
        for at, entropy in enumerate(forest.path(leaf).entropy):
            cool = not expected or at > expected[-1] + 3
            if at >= 1 and entropy >= threshold and cool and len(expected) < 2:
                expected.append(at)
        # Forks stop when the leaves are all open; those made are the first ones.
        done = ancestry.get(leaf, [])
        assert done == expected[: len(done)]
    assert sum(len(path) == 2 for path in ancestry.values()) > 30


def test_entropy_confidence_keeps_the_cap_of_a_trunk() -> None:
    fork = EntropyConfidence(
        entropy_high=0.5, confidence=1.0, entropy_rise=0.0, cooldown=0, min_tokens=0,
        trunk_cap=5, trunk_share=0.25, warmup_traces=0,
    )  # fmt: skip
    signals = make_signals(fork, Keep())
    for seed in range(2):
        run = rollout(
            random_toy(end=0.0), prompts(1), fork=fork, signals=signals, votes=24, seed=seed
        )
        run.run()
    assert max(leaves_per_trunk(run.forest)) == 5


def test_fixed_thresholds_decide_from_the_first_sample_on() -> None:
    """ECHO's formula with its released numbers of entropy, and rules that need no calibration."""
    fork = FixedEntropyConfidence(min_tokens=0, smooth_window=1, group_window=1)
    prune = FixedDoubt(tail_window=1, spike_run=2)
    signals = make_signals(fork, prune)
    assert signals is not None
    assert signals.thresholds().calibrated

    def seen(branch: int, rows: list[tuple[float, float]]) -> list[tuple[int, int]]:
        found = []
        for entropy, confidence in rows:
            one = np.array([entropy], np.float32), np.array([confidence], np.float32)
            observed = signals.observe(np.array([branch << 32]), *one)
            found.append((int(observed.width_B[0]), int(observed.prune_B[0])))
        return found

    assert seen(1, [(1.0, 0.9), (3.5, 0.5)]) == [(1, 0), (3, 0)]
    assert seen(2, [(3.4, 0.9), (3.5, 0.5)]) == [(1, 0), (1, 0)]  # it has not risen by 0.2
    assert seen(3, [(1.0, 0.9), (3.5, 0.6)]) == [(1, 0), (1, 0)]
    assert seen(4, [(0.0, 0.9), (0.1, 0.3)]) == [(1, 0), (1, 1)]
    assert seen(5, [(0.0, 0.9), (0.6, 0.9), (1.2, 0.9)]) == [(1, 0), (1, 0), (1, 3)]


@pytest.mark.parametrize(
    ("fork", "lowers"),
    [
        (Flat(), False),
        (TopEntropy(), False),
        (OnlineEntropy(), True),
        (OnlineEntropy(forks=0), False),
        (EntropyConfidence(), True),
        (EntropyConfidence(max_width=1), False),
        (FixedEntropyConfidence(), True),
    ],
    ids=repr,
)
def test_only_online_rules_need_signals(fork: Flat, lowers: bool) -> None:
    assert fork.lower(SignalSpec()) == lowers


# ---- the share of tokens that forks save (golden numbers of ETMR's 60 %)


def chains(length: int, peaks: list[tuple[int, ...]]) -> tuple[ToyEngine, list[NDArray[np.int32]]]:
    """Chain k always answers with `length` tokens, of which `peaks[k]` are a coin's throw."""
    size = len(peaks) * (1 + 2 * length)
    transition_VV = np.eye(size)

    def step(sources: list[int], k: int, position: int) -> list[int]:
        heads = len(peaks) + 2 * (k * length + position)
        likely = 0.5 if position in peaks[k] else 0.99
        transition_VV[sources] = 0
        transition_VV[sources, heads] = likely
        transition_VV[sources, heads + 1] = 1 - likely
        return [heads, heads + 1]

    for k in range(len(peaks)):
        tokens = [k]
        for position in range(length):
            tokens = step(tokens, k, position)
    return ToyEngine(transition_VV, []), [np.array([k], np.int32) for k in range(len(peaks))]


@pytest.mark.parametrize(
    ("length", "peaks", "ratio"),
    [
        (8, list(combinations(range(1, 8), 2)), 0.6),  # everywhere alike
        (40, [(9, 11)], 0.8),  # around a quarter
        (40, [(29, 31)], 0.4),  # around three quarters
    ],
)
def test_etmr_samples_the_share_of_tokens_that_its_forks_imply(
    length: int, peaks: list[tuple[int, ...]], ratio: float
) -> None:
    engine, questions = chains(length, peaks)
    run = rollout(engine, questions, fork=TopEntropy(mask_tail=0), votes=60, limit=length)
    forest = run.run()
    flat_tokens = int(forest.leaf_table(forest.leaves()).length_N.sum())
    assert flat_tokens == len(questions) * 60 * length
    assert run.counts.sampled_tokens / flat_tokens == pytest.approx(ratio, abs=1e-12)


# ---- agentic AEPO


def test_the_budget_and_the_chance_of_agentic_aepo() -> None:
    rule = Probed()
    budgets = [rule.samples(16, *entropies) for entropies in ((0.4, 0.6), (0.6, 0.4), (2, 0))]
    assert budgets == [8, 9, 12]
    assert rule.samples(4, 100, 0) == 4
    chances = [rule.chance(0.3, before) for before in (0, 2, 4)]
    np.testing.assert_allclose(chances, [0.56, 0.504444, 0.435], atol=1e-6)
    assert Probed(penalty=0).chance(0.3, 4) == pytest.approx(0.56)  # ARPO
    assert (rule.chance(9, 0), rule.chance(-9, 0), rule.chance(9, 20)) == (1, 0, 0)


def test_a_probe_forks_at_its_steps_and_samples_fill_the_rest() -> None:
    rule = Probed(step=3, window=3, weight=0.0, penalty=0.0, balance=0.0)
    run, forks = recorded(random_toy(end=0.0), prompts(1, 3), fork=rule, votes=8, limit=30)
    table = run.forest.leaf_table(run.forest.leaves())
    for tree in (0, 1):
        trunks, size = np.unique(table.trunk_N[table.tree_N == tree], return_counts=True)
        assert size.sum() == 8
        assert size.max() <= 4  # 5 samples of 8, the probe among them
        assert (np.sort(size)[:-1] == 1).all()
        assert len(trunks) >= 5
    assert {at % 3 for _, at, _ in forks} == {0}
    assert run.counts.siblings == len(forks) == 16 - run.counts.trunks > 0
    assert len({parent for parent, _, _ in forks}) <= 2  # the probes


def test_agentic_aepo_forks_where_it_is_less_certain_than_at_the_root() -> None:
    """With so large a weight chance has no say."""
    rule = Probed(step=3, window=3, weight=1e9, penalty=0.0)
    run, forks = recorded(
        random_toy(vocabulary=60, end=0.0), prompts(*[2] * 9), fork=rule, votes=8, limit=30
    )
    table = run.forest.leaf_table(run.forest.leaves())
    expected, even = [], []
    for tree in range(9):
        probe = int(run.forest.leaves()[(table.tree_N == tree) & (table.trunk_N == 0)][0])
        entropy_T = run.forest.path(probe).entropy
        height = {at: entropy_T[at : at + 3].mean() for at in range(3, 30, 3)}
        root = entropy_T[:3].mean()
        forking = 8 - rule.samples(8, root, np.mean([*height.values()]))
        above = [at for at, entropy in height.items() if entropy > root]
        if root in height.values():  # the same tokens in another order: chance decides
            even.append(probe)
        else:
            expected += [(probe, at) for at in above[:forking]]
    found = [(parent, at) for parent, at, _ in forks if parent not in even]
    assert sorted(found) == sorted(expected)
    assert len(even) < 5 < len(expected) < 9 * 8


def test_agentic_aepo_without_siblings_is_flat_sampling() -> None:
    flat, off = (
        rollout(random_toy(), prompts(1, 4), fork=fork, votes=6) for fork in (Flat(), Probed(0))
    )
    for run in (flat, off):
        run.run()
    assert flat.forest.save() == off.forest.save()
