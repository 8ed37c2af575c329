"""Random histories, told to the forest and to its slow Python model, which must agree."""

from __future__ import annotations

import forest_reference
import numpy as np
import pytest
from grow import finish, handles, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyrl.forest import Forest, StaleHandleError

OPERATIONS, CALLS = 300, 2500
"""In a random history: operations, four bytes each, and the calls of the forest that they make."""


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
            self.model.prune(number, 1 + choice % 5)
            self.forest.prune(self.handle[number], 1 + choice % 5)
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
        facts = (forest.length(handle), forest.seed(handle))
        assert facts == (len(branch.tokens), branch.seed)
        assert forest.weight(handle) == pytest.approx(branch.weight, rel=1e-9)
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
        assert table.weight_N.tolist() == pytest.approx([b.weight for b in branches], rel=1e-9)
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
