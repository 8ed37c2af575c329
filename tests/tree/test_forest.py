"""What each call of the forest promises."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from grow import append, finish, handles, seeds, trunk

from pyrl.forest import Forest, StaleHandleError

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


def test_a_fork_above_an_earlier_one_divides_what_lies_below_it() -> None:
    forest, branch = trunk(10)
    (late,) = forest.fork(branch, 8, seeds(1)).tolist()
    (early,) = forest.fork(branch, 3, seeds(2)).tolist()
    assert [forest.weight(b) for b in (branch, late, early)] == [0.25, 0.25, 0.5]
    (again,) = forest.fork(late, 3, seeds(3)).tolist()  # at the same place
    weights = [forest.weight(b) for b in (branch, late, early, again)]
    assert weights == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])


def test_a_matrix_is_no_prompt() -> None:
    with pytest.raises(ValueError, match="expected an array with one axis, got 2"):
        Forest().add_tree(np.ones((2, 2), np.int32))


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
    assert forest.pruned().tolist() == [0, 1, 1, 0, 0, 0, 0]


def test_freed_pages_are_used_again() -> None:
    forest, branch = trunk(640)
    reserved = forest.stats()["bytes"]
    for _ in range(60):
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
    for reason in (0, 7):
        with pytest.raises(ValueError, match=f"a reason from 1 to 6, got {reason}"):
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


THREADS = """
import threading, time
import numpy as np
from pyrl._core.tree import Forest, pack_flat

forest, until = Forest(), time.monotonic() + 1.5
tree = forest.add_tree(np.arange(8, dtype=np.int32))

def grow():
    x_B = np.ones(64, np.float32)
    while time.monotonic() < until:
        branch_B = np.array([forest.add_trunk(tree, seed) for seed in range(64)])
        for _ in range(8):
            forest.append(branch_B, np.ones(64, np.int32), x_B, x_B, x_B)
        forest.finish(branch_B, np.ones(64, np.uint8))

def read():
    while time.monotonic() < until:
        leaf_N = forest.leaves()[-200:]
        if len(leaf_N):
            forest.check()
            assert forest.leaf_table(leaf_N).length_N.tolist() == [8] * len(leaf_N)
            assert len(forest.path(int(leaf_N[-1])).tokens) == 8
            assert len(pack_flat(forest, leaf_N).label_T) == 8 * len(leaf_N)

threads = [threading.Thread(target=work) for work in (grow, read, read, read)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(forest.leaves()) >= 64
print("whole")
"""


def test_several_threads_may_call_one_forest() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", THREADS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", "")
