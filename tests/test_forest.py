"""The forest against a slow Python model, and what each call promises."""

from __future__ import annotations

import forest_reference
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyrl.forest import Forest, StaleHandleError

OPERATIONS, CALLS = 300, 2500
"""In a random history: operations, four bytes each, and the calls of the forest that they make."""


def handles(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def seeds(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def append(forest: Forest, branch: int, entropies: list[float], version: int = 0) -> None:
    """Tokens 0, 1, 2, ... with these entropies; logprob and confidence follow from them."""
    for entropy in entropies:
        forest.append(
            handles(branch),
            np.array([forest.length(branch)], np.int32),
            np.array([-entropy], np.float32),
            np.array([entropy], np.float32),
            np.array([1 / (1 + entropy)], np.float32),
            version,
        )


def trunk(length: int = 0) -> tuple[Forest, int]:
    """A forest of one tree and one branch with `length` tokens."""
    forest = Forest()
    branch = forest.add_trunk(forest.add_tree(np.array([5, 6], np.int32)), 1)
    append(forest, branch, [float(i % 7) for i in range(length)])
    return forest, branch


def finish(forest: Forest, *branches: int, reason: int = 1) -> None:
    forest.finish(handles(*branches), np.full(len(branches), reason, np.uint8))


# -- random histories --


class Twins:
    """The forest and its model, told the same operations; `handle` maps numbers to handles."""

    def __init__(self) -> None:
        self.forest = Forest()
        self.model = forest_reference.Forest()
        self.handle: list[int] = []
        self.stale: list[int] = []
        self.step = 0
        self.rng = np.random.default_rng(0)
        self.new_tree(3)

    def pick(self, choice: int, numbers: list[int]) -> int | None:
        return numbers[choice % len(numbers)] if numbers else None

    def new_tree(self, choice: int) -> None:
        prompt = [(choice + i) % 50 for i in range(1 + choice % 5)]
        tree = self.forest.add_tree(np.array(prompt, np.int32))
        assert tree == self.model.add_tree(prompt)
        self.new_trunk(tree)

    def new_trunk(self, choice: int) -> None:
        tree = choice % len(self.model.prompts)
        self.model.add_trunk(tree, choice)
        self.handle.append(self.forest.add_trunk(tree, choice))

    def append(self, numbers: list[int]) -> None:
        self.step += 1
        # Few distinct values, so that top_entropy meets ties.
        draw_5B = self.rng.integers(0, 9, (5, len(numbers)))
        token_B, (logprob_B, entropy_B, confidence_B) = (
            draw_5B[0].astype(np.int32),
            (draw_5B[1:4] / 8).astype(np.float32),
        )
        forced_B, version = draw_5B[4] > 6, self.step // 40
        for i, number in enumerate(numbers):
            values = (a[i].item() for a in (token_B, logprob_B, entropy_B, confidence_B))
            self.model.append(number, *values, forced=bool(forced_B[i]), version=version)
        branch_B = handles(*(self.handle[n] for n in numbers))
        self.forest.append(branch_B, token_B, logprob_B, entropy_B, confidence_B, version, forced_B)

    def decode(self, choice: int, extent: int) -> None:
        """Many open branches one token each, or one branch many tokens."""
        numbers = self.model.open()
        if choice % 2:
            self.append([n for n in numbers if (n * 7 + choice) % 5])
        elif numbers:
            for _ in range(extent % 80):
                self.append([numbers[choice // 2 % len(numbers)]])

    def fork(self, choice: int, extent: int) -> None:
        number = self.pick(choice, list(self.model.live))
        if number is None or len(self.model.live) > 30:
            return
        length = len(self.model.live[number].tokens)
        at = (0, length, length // 64 * 64, extent % (length + 1))[extent % 4]
        seed_B, share = [extent + i for i in range(1 + choice % 3)], choice % 5 != 0
        self.model.fork(number, at, seed_B, share)
        self.handle += self.forest.fork(self.handle[number], at, seeds(*seed_B), share).tolist()

    def finish(self, choice: int) -> None:
        number = self.pick(choice, self.model.open())
        if number is not None:
            self.model.finish(number, 1 + choice % 2)
            finish(self.forest, self.handle[number], reason=1 + choice % 2)

    def prune(self, choice: int) -> None:
        number = self.pick(choice, list(self.model.live))
        if number is not None:
            self.model.prune(number, 1 + choice % 4)
            self.forest.prune(self.handle[number], 1 + choice % 4)
            self.stale.append(self.handle[number])

    def misuse(self, choice: int) -> None:
        """A call that must fail changes nothing."""
        before = self.forest.save()
        if self.stale:
            with pytest.raises(StaleHandleError):
                self.forest.prune(self.stale[choice % len(self.stale)], 1)
        number = self.pick(choice, list(self.model.live))
        if number is not None:
            handle = self.handle[number]
            with pytest.raises(ValueError, match="fork: expected 0 <= at"):
                self.forest.fork(handle, self.forest.length(handle) + 1, seeds(1))
            twice = handles(*(self.handle[n] for n in self.model.open()), handle, handle)
            ones = np.ones(len(twice), np.float32)
            with pytest.raises(ValueError, match="append: expected"):
                self.forest.append(twice, ones.astype(np.int32), ones, ones, ones)
        assert self.forest.save() == before

    def reload(self) -> None:
        loaded = Forest.load(self.forest.save())
        assert loaded == self.forest
        self.forest = loaded

    def apply(self, code: int, choice: int, extent: int) -> None:
        if code < 130:
            self.decode(choice, extent)
        elif code < 180:
            self.fork(choice, extent)
        elif code < 205:
            self.finish(choice)
        elif code < 235:
            self.prune(choice)
        elif code < 243:
            self.new_trunk(choice)
        elif code < 246:
            self.new_tree(choice)
        elif code < 254:
            self.misuse(choice)
        else:
            self.reload()

    def check(self) -> None:
        forest, model = self.forest, self.model
        forest.check()
        stats = forest.stats()
        assert stats["tokens"] == model.tokens
        assert stats["tokens_live"] == model.tokens_live()
        assert stats["pages"] == model.pages()
        assert forest.pruned().tolist() == np.sum(model.pruned, 0).tolist()
        assert forest.open().tolist() == [self.handle[n] for n in model.open()]
        assert forest.leaves().tolist() == [self.handle[n] for n in model.leaves()]
        for tree in range(len(model.prompts)):
            assert forest.prompt(tree).tolist() == model.prompts[tree]
            assert forest.pruned(tree).tolist() == model.pruned[tree]
            assert forest.leaves(tree).tolist() == [self.handle[n] for n in model.leaves(tree)]
        for number in model.live:
            self.check_branch(number)
        for stale in self.stale:
            with pytest.raises(StaleHandleError):
                forest.length(stale)
        self.check_segments()

    def check_branch(self, number: int) -> None:
        branch, handle, forest = self.model.live[number], self.handle[number], self.forest
        facts = (forest.length(handle), forest.seed(handle), forest.weight(handle))
        assert facts == (len(branch.tokens), branch.seed, branch.weight)
        assert (forest.tree_of(handle), forest.trunk_of(handle)) == (branch.tree, branch.trunk)
        path = forest.path(handle)
        columns = (path.tokens, path.logprob, path.entropy, path.confidence)
        read = zip(*(c.tolist() for c in (*columns, path.forced, path.version)), strict=True)
        assert list(read) == [tuple(token[1:]) for token in branch.tokens]
        n, gap = number % 6, number % 9
        begin, end = len(branch.tokens) // 4, len(branch.tokens)
        top = forest.top_entropy(handle, n, begin, end, gap)
        assert top.tolist() == self.model.top_entropy(number, n, begin, end, gap)

    def check_segments(self) -> None:
        numbers = [n for n in self.model.live if (n * 5 + self.step) % 4][::-1]
        leaf_N = handles(*(self.handle[n] for n in numbers))
        segments, expected = self.forest.segments(leaf_N), self.model.segments(numbers)
        assert segments.parent_S.tolist() == [s.parent for s in expected]
        assert segments.tree_S.tolist() == [s.tree for s in expected]
        assert segments.length_S.tolist() == [s.length for s in expected]
        assert segments.leaves_S.tolist() == [len(s.leaves) for s in expected]
        assert len(set(segments.leaf_segment_N.tolist())) == len(numbers)
        for n, number in enumerate(numbers):
            entries = slice(*segments.entry_offset_N1[n : n + 2])
            own = [i for i, s in enumerate(expected) if self.model.live[number] in s.leaves]
            assert segments.entry_segment_E[entries].tolist() == own[1:]
            assert segments.leaf_segment_N[n] == own[-1]
        assert np.array_equal(segments.entry_length_E, segments.length_S[segments.entry_segment_E])
        self.check_table(numbers, leaf_N)

    def check_table(self, numbers: list[int], leaf_N: NDArray[np.int64]) -> None:
        table, branches = self.forest.leaf_table(leaf_N), [self.model.live[n] for n in numbers]
        assert table.tree_N.tolist() == [b.tree for b in branches]
        assert table.trunk_N.tolist() == [b.trunk for b in branches]
        assert table.length_N.tolist() == [len(b.tokens) for b in branches]
        assert table.depth_N.tolist() == [len(b.forks) for b in branches]
        assert table.finish_N.tolist() == [b.finish for b in branches]
        assert table.weight_N.tolist() == [b.weight for b in branches]
        mean = [np.mean([t.entropy for t in b.tokens]) if b.tokens else np.nan for b in branches]
        np.testing.assert_allclose(table.mean_entropy_N, mean, rtol=1e-12)
        tail = [self.model.tail_confidence(n, 10) for n in numbers]
        np.testing.assert_allclose(self.forest.tail_confidence(leaf_N, 10), tail, rtol=1e-12)


def operations(raw: bytes) -> list[tuple[int, int, int]]:
    """Four zero bytes are no operation, so that a failing history shrinks by zeroing."""
    found = (raw[i : i + 4] for i in range(0, len(raw), 4))
    return [(o[0], o[1] + 256 * o[2], o[3]) for o in found if any(o)]


def test_random_histories_read_like_the_slow_model(forest_operations: int) -> None:
    @settings(
        max_examples=max(1, forest_operations // CALLS),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=4 * OPERATIONS, max_size=4 * OPERATIONS).map(operations))
    def run(history: list[tuple[int, int, int]]) -> None:
        twins = Twins()
        for i, operation in enumerate(history):
            twins.apply(*operation)
            if i % 50 == 0:
                twins.check()
        twins.check()

    run()


# -- forks --


def test_forks_share_tokens_instead_of_copying_them() -> None:
    forest, branch = trunk(1000)
    before = forest.stats()
    forks = forest.fork(branch, 500, seeds(*range(20)))
    after = forest.stats()
    assert after["tokens_live"] == before["tokens_live"] == 1000
    assert after["pages"] == before["pages"] == 16
    for fork in forks:
        assert forest.path(fork).tokens.tolist() == list(range(500))


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 128, 129, 150])
@pytest.mark.parametrize("finished", [False, True])
def test_a_fork_grows_on_its_own_from_any_position(at: int, finished: bool) -> None:
    forest, branch = trunk(150)
    if finished:
        finish(forest, branch)
    (fork,) = forest.fork(branch, at, seeds(9)).tolist()
    append(forest, fork, [8.0] * 70, version=3)
    assert forest.path(branch).entropy.tolist() == [float(i % 7) for i in range(150)]
    path = forest.path(fork)
    assert path.entropy.tolist() == [float(i % 7) for i in range(at)] + [8.0] * 70
    assert path.version.tolist() == [0] * at + [3] * 70
    assert forest.seed(fork) == 9
    forest.check()


def test_the_parent_of_a_fork_goes_on_growing() -> None:
    forest, branch = trunk(100)
    forest.fork(branch, 40, seeds(1))
    append(forest, branch, [9.0] * 30)
    assert forest.path(branch).entropy.tolist() == [float(i % 7) for i in range(100)] + [9.0] * 30


def test_the_weights_of_a_trunks_leaves_sum_to_one() -> None:
    forest, branch = trunk(90)
    branches = [branch]
    for width, at in ((2, 30), (3, 60), (1, 10), (6, 0)):
        source = branches[width % len(branches)]
        branches += forest.fork(source, at % 31, seeds(*range(width))).tolist()
    finish(forest, *branches)
    assert forest.leaf_table(forest.leaves()).weight_N.sum() == pytest.approx(1, abs=1e-12)


def test_a_fork_without_sharing_keeps_the_weight() -> None:
    forest, branch = trunk(3)
    (fork,) = forest.fork(branch, 2, seeds(1), share=False)
    assert (forest.weight(branch), forest.weight(fork)) == (1.0, 1.0)


def test_a_chain_of_forks_of_any_depth_is_read_without_recursion() -> None:
    forest, branch = trunk(1)
    chain = [branch]
    for seed in range(20_000):
        chain += forest.fork(chain[-1], seed + 1, seeds(seed)).tolist()
        append(forest, chain[-1], [1.0])
    finish(forest, *chain)
    assert forest.length(chain[-1]) == len(forest.path(chain[-1]).tokens) == 20_001
    leaf_N = handles(chain[0], chain[-1])
    assert forest.segments(leaf_N).length_S.tolist() == [2, 1, 0, 20_000]
    assert forest.leaf_table(leaf_N).depth_N.tolist() == [1, 20_000]
    forest.check()


# -- pruning --


def test_pruning_frees_only_what_no_other_branch_uses() -> None:
    forest, branch = trunk(200)
    (fork,) = forest.fork(branch, 128, seeds(1)).tolist()
    append(forest, fork, [1.0] * 64)
    assert forest.stats()["pages"] == 5
    forest.prune(branch, 1)
    assert forest.stats()["pages"] == 3
    assert forest.stats()["tokens_live"] == 192
    assert forest.path(fork).tokens.tolist() == list(range(192))
    forest.prune(fork, 2)
    stats = forest.stats()
    assert (stats["pages"], stats["tokens_live"], stats["tokens"]) == (0, 0, 264)
    assert forest.pruned().tolist() == [0, 1, 1, 0, 0]


def test_freed_pages_are_used_again() -> None:
    forest, branch = trunk(640)
    reserved = forest.stats()["bytes"]
    for _ in range(300):
        forest.prune(branch, 4)
        branch = forest.add_trunk(0, 1)
        append(forest, branch, [1.0] * 640)
    assert forest.stats()["bytes"] <= reserved + 4096
    assert forest.stats()["pages"] == 10


def test_a_pruned_handle_is_stale_in_every_call_even_if_its_slot_is_used_again() -> None:
    forest, branch = trunk(5)
    forest.prune(branch, 1)
    again = forest.add_trunk(0, 2)
    assert again != branch
    one = np.ones(1, np.float32)
    calls = [
        lambda: forest.append(handles(branch), one.astype(np.int32), one, one, one),
        lambda: forest.fork(branch, 0, seeds(1)),
        lambda: finish(forest, branch),
        lambda: forest.prune(branch, 1),
        lambda: forest.length(branch),
        lambda: forest.seed(branch),
        lambda: forest.tree_of(branch),
        lambda: forest.trunk_of(branch),
        lambda: forest.weight(branch),
        lambda: forest.path(branch),
        lambda: forest.leaf_table(handles(branch)),
        lambda: forest.tail_confidence(handles(branch), 1),
        lambda: forest.segments(handles(branch)),
        lambda: forest.top_entropy(branch, 1, 0, 0, 1),
    ]
    for call in calls:
        with pytest.raises(StaleHandleError, match=f"branch {branch}: expected a live branch"):
            call()


@pytest.mark.parametrize("handle", [-1, 0, 1, 1 << 32, (1 << 40) + 1, -(1 << 63), (1 << 63) - 1])
def test_a_handle_never_given_out_is_stale(handle: int) -> None:
    forest = Forest()
    forest.add_tree(np.array([1], np.int32))
    with pytest.raises(StaleHandleError):
        forest.length(handle)


# -- segments --


def test_an_independent_sample_is_one_segment_below_the_prompt() -> None:
    forest, branch = trunk(7)
    other = forest.add_trunk(0, 2)
    finish(forest, branch, other)
    segments = forest.segments(forest.leaves())
    assert segments.parent_S.tolist() == [-1, 0, 0]
    assert segments.length_S.tolist() == [2, 7, 0]
    assert segments.leaf_segment_N.tolist() == [1, 2]


def test_a_fork_of_which_one_side_is_left_out_is_no_fork() -> None:
    forest, branch = trunk(10)
    (fork,) = forest.fork(branch, 4, seeds(1)).tolist()
    assert forest.segments(handles(branch, fork)).length_S.tolist() == [2, 4, 6, 0]
    assert forest.segments(handles(branch)).length_S.tolist() == [2, 10]
    forest.prune(fork, 1)
    assert forest.segments(handles(branch)).length_S.tolist() == [2, 10]


def test_trees_without_a_leaf_have_no_segment() -> None:
    forest, branch = trunk(1)
    forest.add_tree(np.array([1, 2, 3], np.int32))
    last = forest.add_trunk(forest.add_tree(np.array([9], np.int32)), 5)
    segments = forest.segments(handles(last, branch))
    assert segments.tree_S.tolist() == [0, 0, 2, 2]
    assert segments.leaf_segment_N.tolist() == [3, 1]
    empty = forest.segments(handles())
    assert empty.parent_S.tolist() == []
    assert empty.entry_offset_N1.tolist() == [0]


# -- signals --


def test_top_entropy_keeps_the_gap_and_prefers_the_lowest_of_equals() -> None:
    forest, branch = trunk()
    append(forest, branch, [1, 5, 5, 2, 4, 3, 5, 0])
    assert forest.top_entropy(branch, 3, 0, 8, 1).tolist() == [1, 2, 6]
    assert forest.top_entropy(branch, 3, 0, 8, 2).tolist() == [1, 4, 6]
    assert forest.top_entropy(branch, 9, 0, 8, 4).tolist() == [1, 6]
    assert forest.top_entropy(branch, 2, 2, 5, 0).tolist() == [2, 4]
    assert forest.top_entropy(branch, 0, 0, 8, 1).tolist() == []


def test_a_nan_entropy_is_named() -> None:
    forest, branch = trunk(4)
    append(forest, branch, [float("nan")])
    assert forest.top_entropy(branch, 1, 0, 4, 1).tolist() == [3]
    with pytest.raises(ValueError, match="entropy is NaN at position 4"):
        forest.top_entropy(branch, 1, 0, 5, 1)


def test_tail_confidence_crosses_forks_and_takes_short_responses_whole() -> None:
    forest, branch = trunk()
    append(forest, branch, [0.0, 1.0, 3.0])  # confidence 1, 1/2, 1/4
    (fork,) = forest.fork(branch, 2, seeds(1)).tolist()
    append(forest, fork, [3.0])
    empty = forest.add_trunk(0, 1)
    tail_N = forest.tail_confidence(handles(fork, branch), 2)
    assert tail_N.tolist() == [0.375, 0.375]
    assert forest.tail_confidence(handles(fork), 100).tolist() == [pytest.approx(1.75 / 3)]
    assert np.isnan(forest.tail_confidence(handles(empty), 2)).all()


# -- what a path holds --


def test_forced_tokens_are_marked_for_the_whole_call_or_one_by_one() -> None:
    forest, branch = trunk()
    other = forest.add_trunk(0, 2)
    token_B, one_B = np.array([3, 2**31 - 1], np.int32), np.ones(2, np.float32)
    both = handles(branch, other)
    forest.append(both, token_B, one_B, one_B, one_B, forced=True)
    forest.append(both, token_B, one_B, one_B, one_B, forced=np.array([False, True]))
    forest.append(both, token_B, one_B, one_B, one_B)
    assert forest.path(branch).forced.tolist() == [True, False, False]
    assert forest.path(other).forced.tolist() == [True, True, False]
    assert forest.path(other).tokens.tolist() == [2**31 - 1] * 3


def test_a_path_outlives_its_forest() -> None:
    forest, branch = trunk(70)
    tokens = forest.path(branch).tokens
    forest.prune(branch, 1)
    del forest
    assert tokens.tolist() == list(range(70))
    assert tokens.dtype == np.int32


# -- saving --


def bushy() -> Forest:
    forest, branch = trunk(130)
    forks = forest.fork(branch, 70, seeds(1, 2)).tolist()
    append(forest, forks[0], [1.0] * 5, version=4)
    forest.prune(forks[1], 3)
    finish(forest, branch)
    forest.add_tree(np.array([1], np.int32))
    return forest


def test_a_saved_forest_loads_equal_and_goes_on_the_same_way() -> None:
    forest = bushy()
    data = forest.save()
    loaded = Forest.load(data)
    assert loaded == forest
    assert loaded.save() == data
    for twin in (forest, loaded):
        append(twin, twin.fork(int(twin.leaves()[0]), 65, seeds(8, 9))[0].item(), [2.0] * 80)
        twin.add_trunk(1, 3)
    assert loaded == forest
    assert loaded.open().tolist() == forest.open().tolist()
    loaded.add_trunk(1, 3)
    assert loaded != forest
    assert forest != "a forest"


def test_every_changed_or_missing_byte_is_noticed() -> None:
    data = bushy().save()
    for i in [*range(64), *range(64, len(data), 7)]:
        changed = bytearray(data)
        changed[i] ^= 1 << i % 8
        with pytest.raises(ValueError, match="forest bytes: "):
            Forest.load(bytes(changed))
        with pytest.raises(ValueError, match="forest bytes: expected"):
            Forest.load(data[:i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "expected a header of 28 bytes, got 0"),
        (lambda data: b"PK" + data[2:], "this is no saved forest"),
        (lambda data: data[:8] + b"\x07" + data[9:], "expected format 1, got 7"),
        (lambda data: data[:-1], "bytes after the header, got"),
        (lambda data: data + b"\0", "bytes after the header, got"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
    ],
)
def test_bad_bytes_are_named(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forest.load(change(bushy().save()))


def fnv1a(data: bytes) -> int:
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


def load_or_message(data: bytes) -> Forest | str:
    try:
        return Forest.load(data)
    except ValueError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_with_a_right_checksum_but_broken_structure_are_refused_or_harmless(
    data: st.DataObject,
) -> None:
    saved = bushy().save()
    payload = bytearray(saved[28:])
    for _ in range(data.draw(st.integers(1, 3))):
        # Behind the structure come the tokens, where any value is a token.
        payload[data.draw(st.integers(0, len(payload) - 1 - 135 * 16))] ^= data.draw(
            st.integers(1, 255)
        )
    forged = saved[:20] + fnv1a(payload).to_bytes(8, "little") + bytes(payload)
    loaded = load_or_message(forged)
    if isinstance(loaded, str):
        assert loaded.startswith("forest")
    else:
        loaded.check()
        assert len(loaded.segments(loaded.open()).leaf_segment_N) == len(loaded.open())


# -- bad input --


def test_append_says_what_is_wrong_and_changes_nothing() -> None:
    forest, branch = trunk(3)
    done = forest.add_trunk(0, 2)
    finish(forest, done)
    token_B, one_B = np.array([1, 2], np.int32), np.ones(2, np.float32)
    other = forest.add_trunk(0, 3)
    good, before = handles(branch, other), forest.save()
    bad = [
        ((good, token_B[:1], one_B, one_B, one_B), "2 elements in token, .* got 1"),
        ((good, token_B, one_B[:1], one_B, one_B), "2 elements in logprob, .* got 1"),
        ((good, token_B, one_B, one_B[:1], one_B), "2 elements in entropy, .* got 1"),
        ((good, token_B, one_B, one_B, one_B[:1]), "2 elements in confidence, .* got 1"),
        ((handles(branch, branch), token_B, one_B, one_B, one_B), "distinct branches"),
        ((handles(branch, done), token_B, one_B, one_B, one_B), "got the finished"),
        ((good, np.array([1, -2], np.int32), one_B, one_B, one_B), "token ids >= 0, got -2"),
        ((good, token_B, one_B, one_B, one_B, 0, np.array([True])), "2 elements in forced"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=f"append: expected {message}|append: .*{message}"):
            forest.append(*arguments)
        assert forest.save() == before
    with pytest.raises(TypeError, match="incompatible function arguments"):
        forest.append(good, token_B.astype(np.float64), one_B, one_B, one_B)


def test_fork_finish_and_prune_say_what_is_wrong() -> None:
    forest, branch = trunk(3)
    before = forest.save()
    for at in (-1, 4):
        with pytest.raises(ValueError, match=f"fork: expected 0 <= at <= 3.*got {at}"):
            forest.fork(branch, at, seeds(1))
    with pytest.raises(ValueError, match="fork: expected at least one seed"):
        forest.fork(branch, 1, seeds())
    for reason in (0, 3):
        with pytest.raises(ValueError, match=rf"reason 1 \(stopped\).*got {reason}"):
            finish(forest, branch, reason=reason)
    with pytest.raises(ValueError, match="finish: expected 1 reasons"):
        forest.finish(handles(branch), np.ones(2, np.uint8))
    with pytest.raises(ValueError, match="finish: expected distinct branches"):
        finish(forest, branch, branch)
    for reason in (0, 5):
        with pytest.raises(ValueError, match=f"a reason from 1 to 4, got {reason}"):
            forest.prune(branch, reason)
    assert forest.save() == before
    finish(forest, branch)
    with pytest.raises(ValueError, match="finish: expected open branches, got the finished"):
        finish(forest, branch)


def test_trees_and_queries_say_what_is_wrong() -> None:
    forest, branch = trunk(3)
    with pytest.raises(ValueError, match="a prompt of at least one token"):
        forest.add_tree(np.array([], np.int32))
    with pytest.raises(ValueError, match="token ids >= 0, got -5 at 1"):
        forest.add_tree(np.array([1, -5], np.int32))
    for tree in (-1, 1):
        for call in (forest.prompt, forest.leaves, forest.pruned):
            with pytest.raises(ValueError, match=f"an index below 1, got {tree}"):
                call(tree)
        with pytest.raises(ValueError, match=f"an index below 1, got {tree}"):
            forest.add_trunk(tree, 0)
    with pytest.raises(ValueError, match="expected distinct leaves"):
        forest.segments(handles(branch, branch))
    with pytest.raises(ValueError, match="a window of at least 1 token, got 0"):
        forest.tail_confidence(handles(branch), 0)
    for n, begin, end, gap in (
        (-1, 0, 3, 1),
        (1, -1, 3, 1),
        (1, 2, 1, 1),
        (1, 0, 4, 1),
        (1, 0, 3, -1),
    ):
        with pytest.raises(ValueError, match="top_entropy: expected"):
            forest.top_entropy(branch, n, begin, end, gap)
